"""LLaVA's JSON as training samples: ids with image tokens expanded, labels, pixels."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mllm.conversation import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_ID, Template, encode
from mllm.images import pixels, read_image

Sample = dict[str, Any]


class LlavaDataset(Dataset[Sample]):
    """Samples of LLaVA's form {"id", "image" (absent for text), "conversations": [{"from", "value"}, ...]}.

    Conversations are tokenised and pictures read when a sample is asked for.

    Args:
        json_path: a JSON list, or JSON lines if it ends in .jsonl.
        image_folder: what the samples' image paths are relative to; None if there are none.
        tokenizer: knows `<image>` as one token.
        image_processor: from `mllm.images.build_image_processor`.
        template: of the conversations, see `mllm.conversation.encode`.
        num_image_tokens: tokens that a picture takes (the model's `config.image_seq_length`).
        max_length: longest sample in tokens, image tokens included; longer text is cut at its end.
        image_token_id: `<image>` in the vocabulary; None asks the tokenizer.

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
    ) -> None:
        if max_length <= num_image_tokens:
            raise ValueError(
                f"max_length must exceed num_image_tokens={num_image_tokens}, or no text is left, but got {max_length}"
            )
        self.samples = _read_samples(Path(json_path))
        self.image_folder = Path(image_folder) if image_folder is not None else None
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.template: Template = template
        self.num_image_tokens = num_image_tokens
        self.max_length = max_length
        self.image_token_id = image_token_id if image_token_id is not None else _image_token_id(tokenizer)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        """One sample.

        Returns:
            "input_ids" and "labels", lists of equal length; with a picture "pixel_values", float32[1, 3, H, W] (one
            row a picture).

        Raises:
            ValueError: naming the sample: its conversation is malformed, nothing in it is supervised, its pictures
                do not match its `<image>` placeholders or cannot be read.
        """
        sample = self.samples[index]
        try:
            return self._build(sample)
        except ValueError as error:
            raise ValueError(f"sample {sample.get('id', index)!r} (number {index}): {error}") from error

    @property
    def lengths(self) -> list[int]:
        """Words of each sample, for grouping by length; image tokens are as many wherever there is a picture."""
        return [max(1, sum(len(turn["value"].split()) for turn in sample["conversations"])) for sample in self.samples]

    @property
    def has_image(self) -> list[bool]:
        """Whether each sample brings a picture, for grouping by modality."""
        return [bool(_image_names(sample)) for sample in self.samples]

    def _build(self, sample: Mapping[str, Any]) -> Sample:
        names = _image_names(sample)
        input_ids, labels = encode(sample["conversations"], self.tokenizer, self.template)
        num_placeholders = input_ids.count(IMAGE_TOKEN_ID)
        if num_placeholders != len(names):
            raise ValueError(
                f"{len(names)} picture(s) but {num_placeholders} {IMAGE_TOKEN} placeholder(s) after the template "
                f"{self.template!r}; they must match"
            )
        input_ids, labels = self._expand(input_ids, labels)
        item: Sample = {"input_ids": input_ids, "labels": labels}
        if names:
            item["pixel_values"] = self._read_pixels(names)
        return item

    def _expand(self, input_ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        """Repeats image tokens and cuts text at max_length."""
        ids_out: list[int] = []
        labels_out: list[int] = []
        for token_id, label in zip(input_ids, labels, strict=True):
            is_image = token_id == IMAGE_TOKEN_ID
            repeats = self.num_image_tokens if is_image else 1
            ids_out += [self.image_token_id if is_image else token_id] * repeats
            labels_out += [label] * repeats
        if self.image_token_id in ids_out[self.max_length :]:
            raise ValueError(
                f"a picture's tokens end beyond max_length={self.max_length} (the sample has {len(ids_out)} tokens) "
                f"and may not be cut; raise max_length or move the picture to an earlier turn"
            )
        labels_out = labels_out[: self.max_length]
        if all(label == IGNORE_INDEX for label in labels_out):
            raise ValueError(
                f"no answer begins within max_length={self.max_length} tokens (the sample has {len(ids_out)}); raise "
                f"max_length or drop the sample"
            )
        return ids_out[: self.max_length], labels_out

    def _read_pixels(self, names: list[str]) -> Tensor:
        if self.image_folder is None:
            raise ValueError(f"it names the picture {names[0]!r}, but no image_folder was given")
        images = [read_image(self.image_folder / name) for name in names]
        return torch.stack([pixels(self.image_processor, image) for image in images])


def _read_samples(path: Path) -> list[Mapping[str, Any]]:
    text = path.read_text(encoding="utf-8")
    try:
        samples = _json_lines(text) if path.suffix == ".jsonl" else json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(samples, list) or not samples:
        raise ValueError(f"{path} must hold a list of at least one sample, but got {type(samples).__name__}")
    for index, sample in enumerate(samples):
        if not isinstance(sample, dict) or not isinstance(sample.get("conversations"), list):
            raise ValueError(f'sample {index} of {path} must be an object with a list "conversations"')
    return samples


def _json_lines(text: str) -> list[Any]:
    # Not splitlines(): JSON strings may hold other characters that it takes for line ends.
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _image_names(sample: Mapping[str, Any]) -> list[str]:
    image = sample.get("image") or []
    return [image] if isinstance(image, str) else list(image)


def _image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    token_id = tokenizer.get_vocab().get(IMAGE_TOKEN)
    if token_id is None:
        raise ValueError(f"the tokenizer has no {IMAGE_TOKEN} token; take the one that assemble() saved with the model")
    return token_id
