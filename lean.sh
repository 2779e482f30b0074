#!/bin/sh
# lean.sh FOLDER [PYTHON]: makes an environment that searches and serves an index that exists, without torch.
# The `search` target of the Dockerfile runs it, and so does a test.
set -eu
source=$(cd "$(dirname "$0")" && pwd)
python=${2:-python3}
"$python" -m venv --without-pip "$1"
pip="$python -m pip --python $1/bin/python --disable-pip-version-check"
$pip install --quiet --no-compile -r "$source/requirements-search.txt"
$pip install --quiet --no-compile --no-deps "$source"
# tokenizers needs these only to download.
$pip uninstall --quiet -y huggingface-hub hf-xet
packages=$("$1/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
# For programs in C: the module for Python has the same inside.
rm -f "$packages"/onnxruntime/capi/libonnxruntime.so.*
find "$packages" -type d -name tests -prune -exec rm -rf {} +
# Tables for debuggers: five sixths of PyAV's own modules.
if command -v strip >/dev/null; then find "$packages/av" -name '*.so' -exec strip --strip-unneeded {} +; fi
