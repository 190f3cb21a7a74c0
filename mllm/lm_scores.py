"""How well a language model answers dialogues with their pictures in words, and with no pictures at all.

python -m mllm.lm_scores --model DIR --data SCENES --pictures_in_words SCENES/pictures_in_words.json
"""

import json
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from mllm.collate import LlavaCollator
from mllm.conversation import IGNORE_INDEX
from mllm.language_model import resolve_language_model
from mllm.lm_text import Pictures, Sample, encode_dialogue, questions, read_dialogues, read_pictures, split
from vision_moe.config import parse

_EVAL_BATCH = 32
_KEYS = ("input_ids", "labels")


@dataclass(frozen=True, kw_only=True)
class ScoresConfig:
    """Scores a language model on dialogues that it was not trained on.

    Example:
        .venv/bin/python -m mllm.lm_scores --model scenes-llama --data outputs/scenes
    """

    model: str
    """Language model: "scenes-llama", a folder or a hub name."""
    data: Path
    """Folder with llava_pretrain.json and llava_finetune.json."""
    pictures_in_words: Path | None = None
    """JSON file {image: [text, ...]}: what stands in place of a picture; None: its longest caption in the data."""
    num_pictures: int = 200
    """Pictures whose dialogues are asked."""
    seed: int = 0
    """Draws the pictures and their texts."""


def main(args: list[str] | None = None) -> None:
    """Entry point."""
    config = parse(ScoresConfig, args)
    samples = read_dialogues(config.data)
    pictures = read_pictures(config.pictures_in_words, samples)
    _, asked = split(samples, config.num_pictures, config.seed)
    folder = resolve_language_model(config.model)
    model = AutoModelForCausalLM.from_pretrained(folder)
    scores = held_out_scores(model, AutoTokenizer.from_pretrained(folder), asked, pictures, config.seed)
    sys.stdout.write(json.dumps(scores) + "\n")


@torch.inference_mode()
def held_out_scores(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, samples: list[Sample], pictures: Pictures, seed: int
) -> dict[str, float]:
    """How well questions are answered with their pictures in words (a random text each) and with no pictures at all.

    Every question of a dialogue is asked alone, as a benchmark asks.

    Returns:
        num_dialogues, num_yes_no, and for either way the perplexity per answer token and the share of yes/no answers
        that are the likeliest ones.
    """
    model.eval()
    rng = random.Random(seed)
    drawn = {image: rng.choice(texts) for image, texts in sorted(pictures.items())}
    asked = [question for sample in samples for question in questions(sample)]
    scores: dict[str, float] = {"num_dialogues": len(samples)}
    for name, shown in (("with_picture", drawn), ("without_picture", {})):
        encoded = [encode_dialogue(question, shown.get(question["image"]), tokenizer) for question in asked]
        scores.update({f"{key}_{name}": value for key, value in _scores(model, tokenizer, encoded).items()})
    scores["num_yes_no"] = scores.pop("num_yes_no_with_picture")
    del scores["num_yes_no_without_picture"]
    return scores


def _scores(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, encoded: list[tuple[list[int], list[int]]]
) -> dict[str, float]:
    collate = LlavaCollator(tokenizer.pad_token_id)
    words = torch.tensor([tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in ("Yes", "No")])
    total, num_tokens, num_right, num_asked = 0.0, 0, 0, 0
    for start in range(0, len(encoded), _EVAL_BATCH):
        rows = [dict(zip(_KEYS, pair, strict=True)) for pair in encoded[start : start + _EVAL_BATCH]]
        batch = {key: tensor.to(model.device) for key, tensor in collate(rows).items()}
        targets_BS = batch.pop("labels")[:, 1:]
        logits_BSV = model(**batch).logits[:, :-1].float()
        total += float(cross_entropy(logits_BSV.transpose(1, 2), targets_BS, reduction="sum"))
        num_tokens += int((targets_BS != IGNORE_INDEX).sum())
        asked_BS = torch.isin(targets_BS, words)
        num_asked += int(asked_BS.sum())
        num_right += int((logits_BSV.argmax(dim=2) == targets_BS)[asked_BS].sum())
    return {
        "answer_perplexity": math.exp(total / num_tokens),
        "yes_no_accuracy": num_right / max(num_asked, 1),
        "num_yes_no": num_asked,
    }


if __name__ == "__main__":
    main()
