#!/usr/bin/env bash
# Sets up .venv and runs the tests. Arguments go to pytest, e.g. ./test.sh tests/test_pruning.py -k taylor
set -euo pipefail
cd "$(dirname "$0")"
source ./setup.sh
.venv/bin/ruff check .
exec .venv/bin/python -m pytest "$@"
