#!/usr/bin/env bash
# Trains LLaVA-1.5 in two stages, under DeepSpeed; run again, it goes on where it stopped.
#
#   bash scripts/llava_finetune.sh RECIPE.yaml [--field value ...]
#   bash scripts/llava_finetune.sh mllm/recipes/scenes.yaml --output outputs/llava_scenes
#   NPROC=2 bash scripts/llava_finetune.sh RECIPE.yaml ...     processes; default: the number of GPUs, or one
#   ... --deepspeed zero3 | none                               default of every recipe: zero2, of llava15_7b: zero3
# Several machines: NNODES, NODE_RANK, MASTER_ADDR as in scripts/launch.sh; by SLURM: scripts/slurm/train.sbatch.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }

scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bash "$scripts/setup.sh"
exec bash "$scripts/launch.sh" mllm.train "$@"
