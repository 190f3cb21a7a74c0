#!/usr/bin/env bash
# Sets up, then runs the test suite; arguments go to pytest.
#
#   bash scripts/test.sh                      everything but the tests marked slow or gpu, two files at a time
#   bash scripts/test.sh -m slow              the slow ones
#   bash scripts/test.sh tests/vision_moe -k upcycle
#   bash scripts/test.sh -n 0 --pdb           one after the other, in this process
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
# Tests bring their own models and data: a try to reach a hub is a mistake, and must fail at once.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export VISION_MOE_LLAVA_TOKENIZER=${VISION_MOE_LLAVA_TOKENIZER:-$PWD/.venv/share/mistral_common/mistral_common/data/tokenizer.model.v1}
# Two processes of one thread are faster than one of two; a file's tests stay together, as they share what they trained.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
