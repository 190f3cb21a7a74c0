#!/usr/bin/env bash
# Trains an encoder from a recipe; started again, it goes on where it stopped.
#
#   bash scripts/train_encoder.sh vision_moe/recipes/scenes.yaml --data.train outputs/scenes --output outputs/scenes_encoder
#   bash scripts/train_encoder.sh --help                   what a recipe can say
#   NPROC=8 bash scripts/train_encoder.sh RECIPE ...       processes on this machine (default: one per GPU, else one)
#   TORCHRUN_ARGS="--nnodes 2 --rdzv-backend c10d --rdzv-endpoint host:29500" NPROC=8 bash scripts/train_encoder.sh ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh

python=.venv/bin/python
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
NPROC=${NPROC:-$((gpus > 0 ? gpus : 1))}
# Ranks on one processor share its cores; without a limit each would start a thread for every core.
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)))')
[ "$NPROC" = 1 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( cores > NPROC ? cores / NPROC : 1 ))}
if [ "$NPROC" -gt 1 ] || [ -n "${TORCHRUN_ARGS:-}" ]; then
    # shellcheck disable=SC2086  # several arguments on purpose
    exec "$python" -m torch.distributed.run --nproc-per-node "$NPROC" ${TORCHRUN_ARGS:-} -m vision_moe.train "$@"
fi
exec "$python" -m vision_moe.train "$@"
