#!/usr/bin/env bash
# The CPU benchmarks, one after the other: tables on stdout, JSON under OUT (default runs/bench).
#
#   bash scripts/bench/run.sh             about an hour on one core; run nothing beside it
#   bash scripts/bench/run.sh --tiny      small sizes: that everything runs, no figures
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${OUT:-runs/bench}
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=$PWD
for name in experts encoder; do
    .venv/bin/python "scripts/bench/$name.py" --output "$out/$name.json" "$@"
done
