"""Batches of LLaVA samples."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mllm.conversation import IGNORE_INDEX


class LlavaCollator:
    """Pads samples of `LlavaDataset` to the longest, on the right.

    Args:
        pad_token_id: fills input_ids; the attention mask, not this id, says what is padding.
        pad_to_multiple_of: lengths are rounded up to a multiple of this.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 1) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """B samples as one batch of length S.

        Returns:
            int64[B, S] "input_ids", "labels" and "attention_mask"; "pixel_values" float32[N, 3, H, W], the pictures
            of all samples in order, absent where no sample has one.
        """
        longest = max(len(sample["input_ids"]) for sample in samples)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {
            "input_ids": _pad([sample["input_ids"] for sample in samples], length, self.pad_token_id),
            "labels": _pad([sample["labels"] for sample in samples], length, IGNORE_INDEX),
            "attention_mask": _pad([[1] * len(sample["input_ids"]) for sample in samples], length, 0),
        }
        pixel_values = [sample["pixel_values"] for sample in samples if sample.get("pixel_values") is not None]
        if pixel_values:
            batch["pixel_values"] = torch.cat(pixel_values)
        return batch


def _pad(rows: Sequence[Sequence[int]], length: int, value: int) -> Tensor:
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.long)
