#!/usr/bin/env bash
# Installs the project with everything it needs: into the activated environment (except conda's base), or into .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -n "${VIRTUAL_ENV:-}" ]; then
    python=$VIRTUAL_ENV/bin/python
elif [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
    python=$CONDA_PREFIX/bin/python
else
    "${BASE_PYTHON:-python3}" -m venv .venv
    python=.venv/bin/python
fi
environment=$($python -c 'import sys; print(sys.prefix)')
$python - <<'CHECK'
import sys
if sys.version_info < (3, 10):
    sys.exit(f"error: this is Python {sys.version.split()[0]}; 3.10 or newer is needed (make setup BASE_PYTHON=python3.11).")
CHECK
echo "installing llava-skip and what it needs into $environment"
pip="$python -m pip --disable-pip-version-check"
# torch first and alone: packages that need just "torch" then accept the pinned build.
$pip install --quiet "$(grep '^torch==' constraints.txt)"
PYTHONWARNINGS=ignore $pip install --quiet --constraint constraints.txt --editable '.[all]'
echo "$PWD" >"$environment/.llava-skip-ready"
echo "ready: $environment"
