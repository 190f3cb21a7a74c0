#!/usr/bin/env bash
# Starts one of our trainers on this machine's GPUs; what train_encoder.sh and llava_finetune.sh share.
#
#   bash scripts/launch.sh MODULE ARGUMENT ...       MODULE: vision_moe.train or mllm.train
#   NPROC=8                                          processes on this machine; default: one per GPU, or one
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0           on each of several machines, which see the same files under the
#                                                    same names; MASTER_PORT (29500) must be free on the first of them
#   TORCHRUN_ARGS="--rdzv-backend c10d ..."          further options of torchrun
#   VISION_MOE_PYTHON=...                            another Python than that of .venv
# Without GPUs processes of several machines talk through gloo: GLOO_SOCKET_IFNAME=eth0 where it takes the wrong network.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${VISION_MOE_PYTHON:-$checkout/.venv/bin/python}
NPROC=${NPROC:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
NNODES=${NNODES:-1}
if [ "$NPROC" = 1 ] && [ "$NNODES" = 1 ] && [ -z "${TORCHRUN_ARGS:-}" ]; then
    exec "$python" -m "$@"
fi
# Ranks on one processor share its cores; without a limit each would start a thread for every core.
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)))')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( cores > NPROC ? cores / NPROC : 1 ))}
# After Ctrl-C torchrun kills what has not ended in 30 seconds; a step and its checkpoint may take longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-1800}
where=(--standalone)
if [ "$NNODES" != 1 ]; then
    for name in NODE_RANK MASTER_ADDR; do
        [ -n "${!name:-}" ] || { echo "launch: NNODES=$NNODES needs $name, on every machine" >&2; exit 2; }
    done
    where=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
elif [ -n "${TORCHRUN_ARGS:-}" ]; then
    where=()
fi
# shellcheck disable=SC2086  # several arguments on purpose
exec "$python" -m torch.distributed.run "${where[@]}" --nproc_per_node "$NPROC" ${TORCHRUN_ARGS:-} -m "$@"
