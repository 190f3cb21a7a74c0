"""Pictures and captions of a batch, made into the tensors that a dual encoder takes."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import ProcessorMixin

from vision_moe.data.captions import CaptionSample

_TEXT_INPUTS = ("input_ids", "attention_mask")
# transformers gives tokenizers without a stated length 1e30.
_LONGEST_PLAUSIBLE = 1_000_000


def stated_length(tokenizer: Any) -> int | None:
    """A tokenizer's limit; None if it states none."""
    length = int(tokenizer.model_max_length)
    return None if length > _LONGEST_PLAUSIBLE else length


class CaptionCollator:
    """Runs a processor over a batch; captions are cut at the model's length and padded.

    Args:
        processor: image processor and tokenizer of the model.
        max_length: tokens per caption at most, special ones included. None: the tokenizer's own limit.
        padding: "longest" of the batch, with an attention mask; "max_length" always, as SigLIP, which attends to
            padding and takes no mask.

    Raises:
        ValueError: the tokenizer states no limit and none is given.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        max_length: int | None = None,
        padding: Literal["longest", "max_length"] = "longest",
    ) -> None:
        self.processor = processor
        self.padding = padding
        stated = stated_length(processor.tokenizer) if max_length is None else max_length
        if stated is None:
            raise ValueError(
                "the tokenizer states no model_max_length; pass max_length, the text tower's max_position_embeddings"
            )
        self.max_length = stated

    def __call__(self, samples: Sequence[CaptionSample]) -> dict[str, Tensor]:
        """Batch of samples.

        Returns:
            What the image processor gives, for most "pixel_values" float32[B, 3, H, W]; "input_ids" and, unless
            padding is part of the text, "attention_mask" int64[B, S]; and "index" int64[B], each sample's position in
            its data set.
        """
        inputs = self.processor(
            images=[sample["image"] for sample in samples],
            text=[sample["caption"] for sample in samples],
            padding=self.padding,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        # Captions are one segment each, which is what towers with segments take by default.
        left_out = {"token_type_ids", "attention_mask"} if self.padding == "max_length" else {"token_type_ids"}
        batch = {name: tensor for name, tensor in inputs.items() if name not in left_out}
        return {**batch, "index": torch.tensor([sample["index"] for sample in samples])}


def image_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a batch that the image tower takes."""
    return {name: tensor for name, tensor in batch.items() if name not in (*_TEXT_INPUTS, "index")}


def text_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a batch that the text tower takes."""
    return {name: batch[name] for name in _TEXT_INPUTS if name in batch}
