"""Dialogues as text for a language model: each picture is replaced by words that tell it, or left out."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from mllm.conversation import IMAGE_TOKEN, encode

_FILES = ("llava_pretrain.json", "llava_finetune.json")
Sample = dict[str, Any]
# By image: texts that each tell what is in the picture.
Pictures = dict[str, list[str]]
# Token id, label, position in its dialogue.
Token = tuple[int, int, int]
_MAX_CUT_PAIRS = 3


class PackedRows(Dataset[dict[str, Tensor]]):
    """Rows of equal length cut from a stream of tokens; no dialogue attends to another one of its row.

    transformers builds the block-diagonal mask from position ids that start anew. Without it, what other dialogues
    say looks like context, and a small model takes far longer to learn to use its own.

    Args:
        stream: (token id, label, position in its dialogue); a label of -100 is not supervised.
        row_length: tokens per row; an incomplete last row is dropped.

    Raises:
        ValueError: the stream does not fill one row.
    """

    def __init__(self, stream: list[Token], row_length: int) -> None:
        num_rows = len(stream) // row_length
        if num_rows == 0:
            raise ValueError(f"{len(stream)} tokens do not fill one row of {row_length}; use more data or shorter rows")
        self.tokens_RS3 = torch.tensor(stream[: num_rows * row_length], dtype=torch.int32).view(num_rows, row_length, 3)

    def __len__(self) -> int:
        return len(self.tokens_RS3)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        input_ids_S, labels_S, positions_S = self.tokens_RS3[index].long().unbind(dim=1)
        return {"input_ids": input_ids_S, "labels": labels_S, "position_ids": positions_S}


def read_dialogues(folder: Path) -> list[Sample]:
    """All records of the folder's LLaVA lists."""
    return [sample for name in _FILES for sample in json.loads((folder / name).read_text(encoding="utf-8"))]


def read_pictures(path: Path | None, samples: list[Sample]) -> Pictures:
    """The pictures in words: from a JSON file {image: [text, ...]}, or each picture's longest caption in `samples`.

    Raises:
        ValueError: the file tells pictures of other dialogues.
    """
    if path is None:
        return {image: [caption] for image, caption in longest_captions(samples).items()}
    pictures: Pictures = json.loads(path.read_text(encoding="utf-8"))
    if missing := {sample["image"] for sample in samples if "image" in sample} - pictures.keys():
        raise ValueError(f"{path} has no text for {len(missing)} pictures of the dialogues, {min(missing)!r} for one")
    return pictures


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
    samples: list[Sample],
    pictures: Pictures,
    tokenizer: PreTrainedTokenizerBase,
    *,
    picture_share: float,
    cut_share: float = 0.0,
    seed: int,
) -> Iterator[Token]:
    """The tokens of all dialogues in random order.

    Args:
        samples: LLaVA records.
        pictures: what can stand in place of each picture.
        tokenizer: with BOS and EOS.
        picture_share: share of the dialogues that get a random text of their picture.
        cut_share: share of the dialogues of which only one to three successive question-answer pairs are kept.
        seed: of all draws.
    """
    rng = random.Random(seed)
    for sample in rng.sample(samples, len(samples)):
        texts = pictures.get(sample.get("image", ""), [])
        shown = rng.choice(texts) if texts and rng.random() < picture_share else None
        piece = _cut(sample, rng) if rng.random() < cut_share else sample
        input_ids, labels = encode_dialogue(piece, shown, tokenizer)
        yield from zip(input_ids, labels, range(len(input_ids)), strict=True)


def _cut(sample: Sample, rng: random.Random) -> Sample:
    turns = sample["conversations"]
    num_pairs = len(turns) // 2
    kept = min(rng.randint(1, _MAX_CUT_PAIRS), num_pairs)
    first = rng.randint(0, num_pairs - kept)
    return {**sample, "conversations": turns[2 * first : 2 * (first + kept)]}


def encode_dialogue(
    sample: Sample, picture: str | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Ids and labels of a dialogue; `picture` is the text in place of its picture, None leaves it out."""
    first, *rest = sample["conversations"]
    # A picture stands at the head of its turn (LLaVA moves it there), so its text does too.
    question = first["value"].replace(IMAGE_TOKEN, "").strip()
    text = question if picture is None else f"{picture}\n{question}"
    return encode([{**first, "value": text}, *rest], tokenizer, template="v1")
