"""Pictures and captions of a batch, made into the tensors that a CLIP takes."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPProcessor

from vision_moe.data.captions import CaptionSample

# transformers gives tokenizers without a stated length 1e30.
_LONGEST_PLAUSIBLE = 1_000_000


class CaptionCollator:
    """Runs a CLIPProcessor over a batch; captions are cut at the model's length and padded to the longest.

    Args:
        processor: image processor and tokenizer of the model.
        max_length: tokens per caption at most, special ones included. None: the tokenizer's own limit.

    Raises:
        ValueError: the tokenizer states no limit and none is given.
    """

    def __init__(self, processor: CLIPProcessor, max_length: int | None = None) -> None:
        self.processor = processor
        self.max_length = processor.tokenizer.model_max_length if max_length is None else max_length
        if self.max_length > _LONGEST_PLAUSIBLE:
            raise ValueError(
                "the tokenizer states no model_max_length; pass max_length, the text tower's max_position_embeddings"
            )

    def __call__(self, samples: Sequence[CaptionSample]) -> dict[str, Tensor]:
        """Batch of samples.

        Returns:
            "pixel_values" float32[B, 3, H, W], "input_ids" and "attention_mask" int64[B, S], and "index"
            int64[B], each sample's position in its data set.
        """
        inputs = self.processor(
            images=[sample["image"] for sample in samples],
            text=[sample["caption"] for sample in samples],
            padding="longest",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return {
            "pixel_values": inputs["pixel_values"],
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
            "index": torch.tensor([sample["index"] for sample in samples]),
        }
