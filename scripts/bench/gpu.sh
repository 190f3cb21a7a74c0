#!/usr/bin/env bash
# For a machine with an NVIDIA GPU: first checks every kernel against the reference, then times them. One command:
#
#   bash scripts/bench/gpu.sh [--rounds N]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash scripts/setup.sh
export HF_HUB_OFFLINE=1 PYTHONPATH=$PWD
.venv/bin/python -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA device"'
.venv/bin/python -m pytest -q -m gpu tests/vision_moe/kernels
.venv/bin/python scripts/bench/experts_gpu.py "$@"
.venv/bin/python scripts/bench/encoder_gpu.py "$@"
