#!/usr/bin/env bash
# Trains LLaVA-1.5 in two stages, under DeepSpeed; run again, it goes on where it stopped.
#
#   bash scripts/llava_finetune.sh RECIPE.yaml [--field value ...]
#   bash scripts/llava_finetune.sh mllm/recipes/scenes.yaml --output outputs/llava_scenes
#   NPROC=2 bash scripts/llava_finetune.sh RECIPE.yaml ...     processes; default: the number of GPUs, or one
#   ... --deepspeed zero3 | none                               default of every recipe: zero2, of llava15_7b: zero3
# Several machines: MASTER_ADDR, MASTER_PORT, NNODES and NODE_RANK as torchrun knows them.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$checkout/scripts/setup.sh"
python="$checkout/.venv/bin/python"

NPROC=${NPROC:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
NNODES=${NNODES:-1}
if [ "$NPROC" = 1 ] && [ "$NNODES" = 1 ]; then
    exec "$python" -m mllm.train "$@"
fi
# Ranks on one processor share its cores; without a limit each would start a thread for every core.
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)))')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( cores > NPROC ? cores / NPROC : 1 ))}
if [ "$NNODES" = 1 ]; then
    exec "$python" -m torch.distributed.run --standalone --nproc_per_node "$NPROC" -m mllm.train "$@"
fi
exec "$python" -m torch.distributed.run --nnodes "$NNODES" --node_rank "${NODE_RANK:?}" \
    --master_addr "${MASTER_ADDR:?}" --master_port "${MASTER_PORT:-29500}" --nproc_per_node "$NPROC" -m mllm.train "$@"
