#!/usr/bin/env bash
# Sets up .venv and runs every stage; run it again to go on. Arguments go to run_pipeline.py, e.g. ./run.sh --profile paper
set -euo pipefail
cd "$(dirname "$0")"
source ./setup.sh
exec .venv/bin/python run_pipeline.py "$@"
