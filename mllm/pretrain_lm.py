"""Trains a small Llama on the text of LLaVA dialogues: `python -m mllm.pretrain_lm RECIPE --data DIR --output OUT`.

It stands in for a pretrained language model where none can be fetched. So that it learns to answer from its context,
and not only to guess, the picture of most dialogues is given to it in words: `<image>` is replaced by the picture's
longest caption. Training goes on where it was interrupted.
"""

import json
import logging
import math
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from mllm.collate import LlavaCollator
from mllm.conversation import IGNORE_INDEX, IMAGE_TOKEN, encode
from mllm.tokenizer import SMALLEST_VOCABULARY, train_tokenizer
from vision_moe.checkpoint import last_checkpoint, write_folder
from vision_moe.config import parse, write_yaml
from vision_moe.files import write_json
from vision_moe.tracking import MetricsCallback, setup_logging, write_environment

logger = logging.getLogger(__name__)

_FILES = ("llava_pretrain.json", "llava_finetune.json")
# More would not change which merges are frequent.
_TOKENIZER_DIALOGUES = 5000
_EVAL_BATCH = 32
_KEYS = ("input_ids", "labels")
Sample = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PretrainLMConfig:
    """A Llama of a few million parameters, its tokenizer and its training."""

    data: Path
    """Folder with llava_pretrain.json and llava_finetune.json."""
    output: Path
    """Folder of the run; the finished model is in its `model`."""
    vocab_size: int = 1000
    """Tokens of the byte-level BPE."""
    hidden_size: int = 256
    """Width."""
    intermediate_size: int = 640
    """Width of the feed-forward layers."""
    num_layers: int = 6
    """Blocks."""
    num_heads: int = 8
    """Attention heads."""
    max_position_embeddings: int = 1024
    """Longest sequence that the finished model takes, in tokens."""
    row_length: int = 384
    """Tokens of a training row; dialogues are packed into rows, so all positions up to it are trained."""
    num_tokens: int = 2_000_000
    """Tokens seen in training."""
    caption_share: float = 0.75
    """Share of dialogues whose picture is replaced by its longest caption."""
    num_held_out: int = 200
    """Pictures whose dialogues are kept for the perplexity at the end."""
    batch_size: int = 6
    """Rows per step."""
    learning_rate: float = 2e-3
    """Peak learning rate; cosine decay to 0."""
    warmup_steps: float = 0.03
    """Linear warm-up: steps, or a share of all steps when below 1."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay."""
    dtype: str = "bfloat16"
    """Type of the saved weights: bfloat16, float16 or float32; training keeps float32 weights."""
    bf16: bool = True
    """bfloat16 autocast in training."""
    save_steps: int = 100
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of the weights, the order and the captions."""

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype must be bfloat16, float16 or float32, but got {self.dtype!r}")


class PackedRows(Dataset[dict[str, Tensor]]):
    """Rows of equal length cut from a stream of token ids and labels.

    Args:
        stream: (token id, label) pairs; a label of -100 is not supervised.
        row_length: tokens per row; an incomplete last row is dropped.

    Raises:
        ValueError: the stream does not fill one row.
    """

    def __init__(self, stream: list[tuple[int, int]], row_length: int) -> None:
        num_rows = len(stream) // row_length
        if num_rows == 0:
            raise ValueError(f"{len(stream)} tokens do not fill one row of {row_length}; use more data or shorter rows")
        pairs = torch.tensor(stream[: num_rows * row_length], dtype=torch.int32)
        self.input_ids_RS, self.labels_RS = pairs.view(num_rows, row_length, 2).unbind(dim=2)

    def __len__(self) -> int:
        return len(self.input_ids_RS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids_RS[index].long(), "labels": self.labels_RS[index].long()}


def main() -> None:
    """Entry point."""
    setup_logging()
    scores = run(parse(PretrainLMConfig))
    sys.stdout.write(json.dumps(scores) + "\n")


def run(config: PretrainLMConfig) -> dict[str, float]:
    """Trains tokenizer and model, writes `output/model` and returns the held-out scores."""
    write_yaml(config, config.output / "config.yaml")
    write_environment(config.output)
    set_seed(config.seed)
    samples = [sample for name in _FILES for sample in json.loads((config.data / name).read_text(encoding="utf-8"))]
    captions = longest_captions(samples)
    train, held_out = split(samples, config.num_held_out, config.seed)
    tokenizer = train_tokenizer(_texts(train, config.seed), config.vocab_size)
    rows = PackedRows(_training_stream(train, captions, tokenizer, config), config.row_length)
    trainer = _trainer(config, build_llama(config, tokenizer), rows)
    trainer.train(resume_from_checkpoint=last_checkpoint(config.output / "checkpoints"))
    scores = held_out_scores(trainer.model, tokenizer, held_out, captions)
    write_folder(config.output / "model", lambda folder: save(trainer.model, tokenizer, config.dtype, folder))
    write_json(config.output / "scores.json", scores)
    logger.info("%s; the model is in %s", scores, config.output / "model")
    return scores


def longest_captions(samples: list[Sample]) -> dict[str, str]:
    """The longest answer that describes each picture, from dialogues of one turn."""
    captions: dict[str, str] = {}
    for sample in samples:
        if "image" in sample and len(sample["conversations"]) == 2:
            caption = sample["conversations"][1]["value"]
            captions[sample["image"]] = max(captions.get(sample["image"], ""), caption, key=len)
    return captions


def split(samples: list[Sample], num_held_out: int, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Keeps all dialogues of `num_held_out` random pictures apart.

    Raises:
        ValueError: nothing would be left to train on.
    """
    images = sorted({sample["image"] for sample in samples if "image" in sample})
    if num_held_out >= len(images):
        raise ValueError(f"num_held_out must be below the {len(images)} pictures of the data, but got {num_held_out}")
    held_out = set(random.Random(seed).sample(images, num_held_out))
    train = [sample for sample in samples if sample.get("image") not in held_out]
    return train, [sample for sample in samples if sample.get("image") in held_out]


def render(
    samples: list[Sample], captions: dict[str, str], tokenizer: PreTrainedTokenizerBase, share: float, seed: int
) -> Iterator[tuple[int, int]]:
    """Token ids and labels of all dialogues in random order; `share` of the pictures are given by their captions."""
    rng = random.Random(seed)
    for sample in rng.sample(samples, len(samples)):
        input_ids, labels = _encode(sample, captions if rng.random() < share else {}, tokenizer)
        yield from zip(input_ids, labels, strict=True)


@torch.inference_mode()
def held_out_scores(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, samples: list[Sample], captions: dict[str, str]
) -> dict[str, float]:
    """Perplexity per answer token of dialogues, with their pictures given in words and with no pictures at all."""
    model.eval()
    collate = LlavaCollator(tokenizer.pad_token_id)
    scores: dict[str, float] = {"num_dialogues": len(samples)}
    for name, shown in (("with_caption", captions), ("without_caption", {})):
        total, num_tokens = 0.0, 0
        encoded = [dict(zip(_KEYS, _encode(sample, shown, tokenizer), strict=True)) for sample in samples]
        for start in range(0, len(encoded), _EVAL_BATCH):
            batch = collate(encoded[start : start + _EVAL_BATCH])
            batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
            targets_BS = batch.pop("labels")[:, 1:]
            logits_BSV = model(**batch).logits[:, :-1].float()
            total += float(cross_entropy(logits_BSV.transpose(1, 2), targets_BS, reduction="sum"))
            num_tokens += int((targets_BS != IGNORE_INDEX).sum())
        scores[f"answer_perplexity_{name}"] = math.exp(total / num_tokens)
    return scores


def _encode(
    sample: Sample, captions: dict[str, str], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Ids and labels of a dialogue with its picture replaced by its caption, or left out if there is none."""
    first, *rest = sample["conversations"]
    caption = captions.get(sample.get("image", ""))
    # A picture stands at the head of its turn (LLaVA moves it there), so its caption does too.
    question = first["value"].replace(IMAGE_TOKEN, "").strip()
    text = question if caption is None else f"{caption}\n{question}"
    return encode([{**first, "value": text}, *rest], tokenizer, template="v1")


def _texts(samples: list[Sample], seed: int) -> Iterator[str]:
    """Some dialogues as the template writes them, system prompt and roles included, for the tokenizer to learn from."""
    rng = random.Random(seed)
    plain_bytes = train_tokenizer([], SMALLEST_VOCABULARY)
    for sample in rng.sample(samples, min(_TOKENIZER_DIALOGUES, len(samples))):
        text = plain_bytes.decode(_encode(sample, {}, plain_bytes)[0])
        yield from re.split("|".join(map(re.escape, plain_bytes.all_special_tokens)), text)


def build_llama(config: PretrainLMConfig, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A randomly initialised Llama with tied embeddings.

    The standard deviation grows as the width shrinks: at the usual 0.02 a narrow model attends almost uniformly, and
    takes very long to find what it could read off its context.
    """
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.max_position_embeddings,
            initializer_range=config.hidden_size**-0.5,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, dtype: str, folder: Path) -> None:
    """Writes a Hugging Face folder with weights of `dtype`."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _training_stream(
    samples: list[Sample], captions: dict[str, str], tokenizer: PreTrainedTokenizerBase, config: PretrainLMConfig
) -> list[tuple[int, int]]:
    """Passes over the data, each in a new order with new draws, until there are enough tokens."""
    stream: list[tuple[int, int]] = []
    epoch = 0
    while len(stream) < config.num_tokens:
        missing = config.num_tokens - len(stream)
        stream += islice(render(samples, captions, tokenizer, config.caption_share, config.seed + epoch), missing)
        epoch += 1
    logger.info("%d dialogues, %d passes begun, %d tokens", len(samples), epoch, len(stream))
    return stream


def _trainer(config: PretrainLMConfig, model: LlamaForCausalLM, rows: PackedRows) -> Trainer:
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    logger.info("%d parameters, %d rows of %d tokens", num_parameters, len(rows), config.row_length)
    args = TrainingArguments(
        output_dir=str(config.output / "checkpoints"),
        num_train_epochs=1,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        adam_beta2=0.95,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type="cosine",
        bf16=config.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        logging_steps=10,
        save_steps=config.save_steps,
        save_total_limit=2,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=not sys.stderr.isatty(),
    )
    return Trainer(
        model=model, args=args, train_dataset=rows, callbacks=[MetricsCallback(config.output, "pretrain_lm")]
    )


if __name__ == "__main__":
    main()
