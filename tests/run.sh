#!/usr/bin/env bash
# Makes a virtual environment, installs fxquant with its test requirements, and runs the tests.
#   bash tests/run.sh                                   newest torch, in .venv
#   bash tests/run.sh .venv-2.13 torch==2.13.0          another torch, elsewhere
#   PYTEST_ADDOPTS="-k affine" bash tests/run.sh        some of them
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
torch=${2:-torch}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check "$torch"
"$venv/bin/pip" install --quiet --disable-pip-version-check -e ".[test,lint]"
"$venv/bin/python" -c "import torch; print('torch', torch.__version__)"
"$venv/bin/python" -m pytest
