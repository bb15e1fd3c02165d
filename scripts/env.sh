# Sourced by the scripts and the Makefile's recipes: sets PYTHON to the environment that runs the project.
# An activated environment (conda's base apart) is used, otherwise .venv; what is missing in it is installed first.

if [ -n "${VIRTUAL_ENV:-}" ]; then
    ENVIRONMENT=$VIRTUAL_ENV
elif [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
    ENVIRONMENT=$CONDA_PREFIX
else
    ENVIRONMENT=$PWD/.venv
fi
PYTHON=$ENVIRONMENT/bin/python
export PATH="$ENVIRONMENT/bin:$PATH" # DeepSpeed calls ninja by its name

# The stamp is newer than what was asked for, and written last: a broken installation is repeated.
STAMP=$ENVIRONMENT/.llava-skip-ready
if [ ! -f "$STAMP" ] || [ setup.py -nt "$STAMP" ] || [ constraints.txt -nt "$STAMP" ] || [ "$(cat "$STAMP")" != "$PWD" ]; then
    bash scripts/setup.sh >&2
fi
