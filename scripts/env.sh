# Sourced by the scripts and the Makefile's recipes: sets PYTHON to the environment that runs the project.
# It is the activated environment (except conda's base), otherwise .venv; missing packages are installed first.

if [ -n "${VIRTUAL_ENV:-}" ]; then
    ENVIRONMENT=$VIRTUAL_ENV
elif [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
    ENVIRONMENT=$CONDA_PREFIX
else
    ENVIRONMENT=$PWD/.venv
fi
PYTHON=$ENVIRONMENT/bin/python
export PATH="$ENVIRONMENT/bin:$PATH" # DeepSpeed calls ninja by its name

# The stamp is written last, and is newer than the requirements: an interrupted installation is repeated.
STAMP=$ENVIRONMENT/.llava-skip-ready
if [ ! -f "$STAMP" ] || [ setup.py -nt "$STAMP" ] || [ constraints.txt -nt "$STAMP" ] || [ "$(cat "$STAMP")" != "$PWD" ]; then
    bash scripts/setup.sh >&2
fi
