"""LLaVA's JSON as training samples: ids with image tokens expanded, labels, pixels."""

import logging
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mllm.branches import Row, join_branches
from mllm.conversation import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_ID, Template, ask_apart, encode
from mllm.data.index import SampleIndex, image_names
from mllm.images import pixels, read_image

logger = logging.getLogger(__name__)

Sample = dict[str, Any]


class SkippedSample(NamedTuple):
    """Stands for a sample that is left out; `reason` says why."""

    reason: str


class Encoded(NamedTuple):
    """A sample without its pixels.

    Attributes:
        columns: lists of equal length, at most max_length: "input_ids", every picture expanded to its tokens; "labels",
            -100 where nothing is supervised; where turns are independent also "position_ids" and "segments"
            (`mllm.branches.Row`).
        pictures: names of its pictures.
        num_cut: tokens that were cut off its end.
    """

    columns: Row
    pictures: list[str]
    num_cut: int

    @property
    def input_ids(self) -> list[int]:
        """Of its columns."""
        return self.columns["input_ids"]

    @property
    def labels(self) -> list[int]:
        """Of its columns."""
        return self.columns["labels"]


class UnusableSampleError(ValueError):
    """A well-formed sample that cannot be trained on: a picture cannot be read, or max_length leaves no answer."""


class LlavaDataset(Dataset[Sample | SkippedSample]):
    """Samples of LLaVA's form {"id", "image" (absent for text), "conversations": [{"from", "value"}, ...]}.

    A sample with several pictures has a list "images" and as many `<image>` in its questions. Samples are parsed,
    tokenised and their pictures read when they are asked for; only their places in the file are kept.

    Args:
        json_path: a JSON list, or JSON lines if it ends in .jsonl.
        image_folder: what the samples' image paths are relative to; None if there are none.
        tokenizer: knows `<image>` as one token.
        image_processor: from `mllm.images.build_image_processor`.
        template: of the conversations, see `mllm.conversation.encode`.
        num_image_tokens: tokens that a picture takes (the model's `config.image_seq_length`).
        max_length: longest sample in tokens, image tokens included; longer text is cut at its end.
        image_token_id: `<image>` in the vocabulary; None asks the tokenizer.
        bad_samples: "error", or "skip" to give a `SkippedSample` in place of an `UnusableSampleError`. A malformed
            sample is an error in any case.
        index_cache: see `mllm.data.index.SampleIndex`.
        independent_turns: in a sample with one picture, every question sees the picture and not the questions and
            answers before it (`mllm.branches`); other samples stay as they are.

    Raises:
        ValueError: the file is no such list, or the tokenizer has no `<image>`.
        FileNotFoundError: there is no such file.
    """

    def __init__(
        self,
        json_path: str | Path,
        image_folder: str | Path | None,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: LlavaImageProcessorPil,
        template: Template,
        num_image_tokens: int,
        max_length: int = 2048,
        image_token_id: int | None = None,
        bad_samples: Literal["error", "skip"] = "error",
        index_cache: Path | None = None,
        independent_turns: bool = False,
    ) -> None:
        if max_length <= num_image_tokens:
            raise ValueError(
                f"max_length must exceed num_image_tokens={num_image_tokens}, or no text is left, but got {max_length}"
            )
        self.index = SampleIndex(Path(json_path), index_cache)
        self.image_folder = Path(image_folder) if image_folder is not None else None
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.template: Template = template
        self.num_image_tokens = num_image_tokens
        self.max_length = max_length
        self.image_token_id = image_token_id if image_token_id is not None else _image_token_id(tokenizer)
        self.bad_samples = bad_samples
        self.independent_turns = independent_turns

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Sample | SkippedSample:
        """One sample.

        Returns:
            the columns of `Encoded`; with a picture "pixel_values", float32[n, 3, H, W] (one row a picture).

        Raises:
            UnusableSampleError: naming the sample, unless such samples are skipped: its pictures cannot be read, or
                max_length cuts into them or leaves no answer.
            ValueError: naming the sample: its conversation is malformed, nothing in it is supervised, or its pictures
                do not match its `<image>` placeholders.
        """
        try:
            encoded = self.encoded(number)
            sample: Sample = {**encoded.columns}
            if encoded.pictures:
                sample["pixel_values"] = self._read_pixels(encoded.pictures)
        except UnusableSampleError as error:
            if self.bad_samples == "error":
                raise UnusableSampleError(f"{self._name(number)}: {error}") from error
            logger.warning("skipped %s: %s", self._name(number), error)
            return SkippedSample(str(error))
        except ValueError as error:
            raise ValueError(f"{self._name(number)}: {error}") from error
        return sample

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64[N], words of each sample and the tokens of its pictures, for grouping by length."""
        return np.maximum(1, self.index.num_words + self.index.num_images.astype(np.int64) * self.num_image_tokens)

    @property
    def has_image(self) -> NDArray[np.bool_]:
        """bool[N], whether each sample brings a picture, for grouping by modality."""
        return self.index.num_images > 0

    def encoded(self, number: int) -> Encoded:
        """A sample's ids and labels; its pictures are not opened.

        Raises:
            UnusableSampleError: max_length cuts into a picture or leaves no answer.
            ValueError: as `__getitem__`.
        """
        sample = self.index[number]
        names = image_names(sample)
        if self.independent_turns and len(names) == 1:
            asked = [encode(turns, self.tokenizer, self.template) for turns in ask_apart(sample["conversations"])]
            return self._cut(join_branches([self._expand(*pair) for pair in asked]), names)
        input_ids, labels = encode(
            sample["conversations"], self.tokenizer, self.template, several_images=len(names) > 1
        )
        num_placeholders = input_ids.count(IMAGE_TOKEN_ID)
        if num_placeholders != len(names):
            raise ValueError(
                f"{len(names)} picture(s) but {num_placeholders} {IMAGE_TOKEN} placeholder(s) after the template "
                f"{self.template!r}; they must match"
            )
        return self._cut(dict(zip(("input_ids", "labels"), self._expand(input_ids, labels), strict=True)), names)

    def sample_id(self, number: int) -> str:
        """What the file calls a sample: its "id", or its number if it has none."""
        return str(self.index[number].get("id", number))

    def picture_path(self, name: str) -> Path:
        """Where a picture lies.

        Raises:
            ValueError: there is no image folder.
        """
        if self.image_folder is None:
            raise ValueError(f"it names the picture {name!r}, but no image_folder was given")
        return self.image_folder / name

    def _expand(self, input_ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        ids_out: list[int] = []
        labels_out: list[int] = []
        for token_id, label in zip(input_ids, labels, strict=True):
            is_image = token_id == IMAGE_TOKEN_ID
            repeats = self.num_image_tokens if is_image else 1
            ids_out += [self.image_token_id if is_image else token_id] * repeats
            labels_out += [label] * repeats
        return ids_out, labels_out

    def _cut(self, columns: Row, pictures: list[str]) -> Encoded:
        """Cuts text at max_length."""
        length = len(columns["input_ids"])
        if self.image_token_id in columns["input_ids"][self.max_length :]:
            raise UnusableSampleError(
                f"a picture's tokens end beyond max_length={self.max_length} (the sample has {length} tokens) "
                f"and may not be cut; raise max_length or move the picture to an earlier turn"
            )
        kept = {name: values[: self.max_length] for name, values in columns.items()}
        if all(label == IGNORE_INDEX for label in kept["labels"]):
            raise UnusableSampleError(
                f"no answer begins within max_length={self.max_length} tokens (the sample has {length}); raise "
                f"max_length or drop the sample"
            )
        return Encoded(kept, pictures, max(0, length - self.max_length))

    def _read_pixels(self, names: list[str]) -> Tensor:
        paths = [self.picture_path(name) for name in names]
        try:
            images = [read_image(path) for path in paths]
        except ValueError as error:
            raise UnusableSampleError(str(error)) from error
        return torch.stack([pixels(self.image_processor, image) for image in images])

    def _name(self, number: int) -> str:
        return f"sample {self.index[number].get('id', number)!r} (number {number})"


def _image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    token_id = tokenizer.get_vocab().get(IMAGE_TOKEN)
    if token_id is None:
        raise ValueError(f"the tokenizer has no {IMAGE_TOKEN} token; take the one that assemble() saved with the model")
    return token_id
