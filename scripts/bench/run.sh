#!/usr/bin/env bash
# The CPU benchmark: one table on stdout and as table.md in runs/bench, with bench.json and growth.png.
#
#   bash scripts/bench/run.sh             a quarter of an hour on one core; run nothing beside it
#   bash scripts/bench/run.sh --tiny      small sizes: that everything runs, no figures
#
# faiss-cpu and scikit-learn are peers: .venv/bin/python -m pip install -c constraints.txt -e ".[bench]"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=$PWD
exec "${PYTHON:-.venv/bin/python}" scripts/bench "$@"
