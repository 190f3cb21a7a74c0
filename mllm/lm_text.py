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
    samples: list[Sample], pictures: Pictures, tokenizer: PreTrainedTokenizerBase, share: float, seed: int
) -> Iterator[tuple[int, int]]:
    """Token ids and labels of all dialogues in random order; `share` of them get a random text of their picture."""
    rng = random.Random(seed)
    for sample in rng.sample(samples, len(samples)):
        texts = pictures.get(sample.get("image", ""), [])
        shown = rng.choice(texts) if texts and rng.random() < share else None
        yield from zip(*encode_dialogue(sample, shown, tokenizer), strict=True)


def encode_dialogue(
    sample: Sample, picture: str | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Ids and labels of a dialogue; `picture` is the text in place of its picture, None leaves it out."""
    first, *rest = sample["conversations"]
    # A picture stands at the head of its turn (LLaVA moves it there), so its text does too.
    question = first["value"].replace(IMAGE_TOKEN, "").strip()
    text = question if picture is None else f"{picture}\n{question}"
    return encode([{**first, "value": text}, *rest], tokenizer, template="v1")
