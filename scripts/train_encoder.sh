#!/usr/bin/env bash
# Trains an encoder from a recipe; started again, it goes on where it stopped.
#
#   bash scripts/train_encoder.sh vision_moe/recipes/scenes.yaml --data.train outputs/scenes --output outputs/scenes_encoder
#   bash scripts/train_encoder.sh --help                   what a recipe can say
#   NPROC=8 bash scripts/train_encoder.sh RECIPE ...       processes on this machine (default: one per GPU, else one)
#   TORCHRUN_ARGS="--nnodes 2 --rdzv-backend c10d --rdzv-endpoint host:29500" NPROC=8 bash scripts/train_encoder.sh ...
# Several machines: NNODES, NODE_RANK, MASTER_ADDR as in scripts/launch.sh; by SLURM: scripts/slurm/train.sbatch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec bash scripts/launch.sh vision_moe.train "$@"
