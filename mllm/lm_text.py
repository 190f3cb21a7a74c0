"""Dialogues as text for a language model: each picture is replaced by words that tell it, or left out."""

import functools
import json
import random
import re
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from mllm.branches import Row, join_branches, one_branch
from mllm.conversation import IMAGE_TOKEN, encode

_FILES = ("llava_pretrain.json", "llava_finetune.json")
Sample = dict[str, Any]
# By image: texts that each tell what is in the picture.
Pictures = dict[str, list[str]]


class DialogueRows(Dataset[Row]):
    """Dialogues as rows of tokens, each with or without a text in place of its picture.

    Most rows are trees: the system prompt and the picture are the trunk, and every question with its answer is a branch
    that sees the trunk and itself. So each answer must be found in the picture, not in what was asked and answered
    before, and the picture is read once for all questions. The other rows are dialogues as they are.

    Args:
        samples: LLaVA records.
        pictures: what can stand in place of each picture.
        tokenizer: with BOS and EOS.
        num_rows: length; beyond one pass over the samples each further pass has a new order and new draws.
        picture_share: share of the rows that get a random text of their picture.
        tree_share: share of the rows that are trees.
        seed: of all draws.
    """

    def __init__(
        self,
        samples: list[Sample],
        pictures: Pictures,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_rows: int,
        picture_share: float,
        tree_share: float,
        seed: int,
    ) -> None:
        self.samples, self.pictures, self.tokenizer, self.num_rows = samples, pictures, tokenizer, num_rows
        self.picture_share, self.tree_share, self.seed = picture_share, tree_share, seed
        self._order = functools.lru_cache(maxsize=2)(self._order_of)

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> Row:
        """The row: its content depends on the seed and the index alone."""
        epoch, position = divmod(index, len(self.samples))
        sample = self.samples[self._order(epoch)[position]]
        rng = random.Random(f"{self.seed} {index}")
        texts = self.pictures.get(sample.get("image", ""), [])
        picture = rng.choice(texts) if texts and rng.random() < self.picture_share else None
        encode_row = encode_tree if rng.random() < self.tree_share else encode_chain
        return encode_row(sample, picture, self.tokenizer)

    def _order_of(self, epoch: int) -> list[int]:
        return random.Random(f"order {self.seed} {epoch}").sample(range(len(self.samples)), len(self.samples))


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


def encode_dialogue(
    sample: Sample, picture: str | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Ids and labels of a dialogue; `picture` is the text in place of its picture, None leaves it out."""
    first, *rest = sample["conversations"]
    # A picture stands at the head of its turn (LLaVA moves it there), so its text does too.
    question = first["value"].replace(IMAGE_TOKEN, "").strip()
    text = question if picture is None else f"{picture}\n{question}"
    return encode([{**first, "value": text}, *rest], tokenizer, template="v1")


def questions(sample: Sample) -> list[Sample]:
    """Each question of a dialogue with its answer, as a dialogue of its own."""
    turns = sample["conversations"]
    return [{**sample, "conversations": turns[start : start + 2]} for start in range(0, len(turns), 2)]


def encode_chain(sample: Sample, picture: str | None, tokenizer: PreTrainedTokenizerBase) -> Row:
    """A dialogue as it is: one segment."""
    return one_branch(*encode_dialogue(sample, picture, tokenizer))


def keep_questions(samples: list[Sample], pattern: str) -> list[Sample]:
    """The dialogues with those questions alone in which a regular expression is found; pictures are told in words.

    Raises:
        ValueError: it is found in no question, or is no regular expression.
    """
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"questions must be a regular expression, but got {pattern!r}: {error}") from error
    kept = []
    for sample in samples:
        turns = [
            turn
            for asked in questions(sample)
            if regex.search(asked["conversations"][0]["value"])
            for turn in asked["conversations"]
        ]
        if turns:
            kept.append({**sample, "conversations": turns})
    if not kept:
        raise ValueError(f"no question of {len(samples)} dialogues matches {pattern!r}; look at the data's own words")
    return kept


def encode_tree(sample: Sample, picture: str | None, tokenizer: PreTrainedTokenizerBase) -> Row:
    """A dialogue as branches on what all of its questions, asked first, begin with; its labels are in the branches."""
    return join_branches([encode_dialogue(asked, picture, tokenizer) for asked in questions(sample)])
