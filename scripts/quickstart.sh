#!/usr/bin/env bash
# The whole road on one machine, from parts that ship with the package: a dense CLIP becomes a CLIP-MoE, becomes LLaVA's
# eyes, is scored by lmms-eval, and waits for you in a chat.
#
#   bash scripts/quickstart.sh                   everything, into outputs/quickstart
#   bash scripts/quickstart.sh --smoke           a few steps of everything in two and a half minutes; its numbers mean nothing
#   bash scripts/quickstart.sh --llm smollm2     with SmolLM2-135M-Instruct as the language model: more than an hour
#   bash scripts/quickstart.sh --output DIR
#
# Interrupted, it goes on where it stopped when it is started again with the same options.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

command="bash scripts/quickstart.sh${*:+ $*}"
smoke=0 llm=scenes-llama output=
usage() { sed -n '2,11p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'; }
while [ $# -gt 0 ]; do
    case $1 in
        --smoke) smoke=1 ;;
        --llm) llm=${2:?--llm needs scenes-llama, smollm2, a folder or a hub name}; shift ;;
        --output) output=${2:?--output needs a folder}; shift ;;
        -h|--help) usage; exit 0 ;;
        *) printf 'quickstart: unknown option %s\n\n' "$1" >&2; usage >&2; exit 2 ;;
    esac
    shift
done
if [ "$smoke" = 1 ]; then
    output=${output:-outputs/quickstart_smoke}
    scenes="--num 240 --num-test 200" encoder_flags="--smoke --model scenes-clip" llava_flags="--smoke" limit="--limit 24"
else
    output=${output:-outputs/quickstart}
    scenes="--num 8000 --num-test 1000" encoder_flags="" llava_flags="" limit=""
fi
recipe=mllm/recipes/scenes.yaml
if [ "$llm" != scenes-llama ]; then
    recipe=mllm/recipes/smollm2_scenes.yaml
    echo "quickstart: with SmolLM2 this took 103 minutes on two busy cores (docs/results.md); a larger model takes longer"
fi

bash scripts/setup.sh
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=false
python=.venv/bin/python
if [ "$($python -c 'import torch; print(torch.cuda.device_count())')" = 0 ] && [ "$(nproc)" -ge 2 ]; then
    # Two processes of one thread use two cores better than one process of two threads, and show data parallelism.
    export NPROC=${NPROC:-2}
fi
step() { printf '\n\033[1m== %s\033[0m (%s)\n' "$1" "$(date +%H:%M:%S)"; }
started=$SECONDS
trap 'printf "\nstopped; to go on:  %s\n" "$command" >&2; exit 130' INT

step "1/6 Scenes: pictures, captions, dialogues, questions"
# shellcheck disable=SC2086  # several arguments on purpose, here and below
$python -m vision_moe.data.scenes --out "$output/scenes" $scenes --seed 1

step "2/6 Encoder: dense CLIP -> CLIP-MoE by DMU, beside direct fine-tuning"
# Sparse upcycling, the recipe's third method, would take four minutes more.
bash scripts/train_encoder.sh vision_moe/recipes/scenes.yaml $encoder_flags --methods "[direct, dmu]" \
    --data.train "$output/scenes" --output "$output/encoder"

step "3/6 Which expert sees what: utilization"
$python -m vision_moe.analysis --model "$output/encoder/dmu/model" --data "$output/scenes" --split test \
    --caption_field long --output "$output/utilization" $limit

step "4/6 LLaVA: projector, then instruction tuning, under DeepSpeed"
bash scripts/llava_finetune.sh $recipe $llava_flags --vision "$output/encoder/dmu/model" --llm "$llm" \
    --pretrain.data "$output/scenes/llava_pretrain.json" --finetune.data "$output/scenes/llava_finetune.json" \
    --image_folder "$output/scenes/images" --output "$output/llava"

step "5/6 POPE on Scenes through lmms-eval, with the pictures and with blank ones"
$python -m eval.run --model "$output/llava/model" --tasks pope_scenes --data "$output/scenes" \
    --output "$output/pope" --pictures own,blank $limit

step "6/6 Report"
$python scripts/quickstart_report.py --run "$output" --seconds $((SECONDS - started)) --command "$command"
