"""Batches of LLaVA samples: padded, several samples to a row, or with questions that do not see each other.

B rows, S their length, N pictures.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mllm.branches import collate_rows, one_branch
from mllm.conversation import IGNORE_INDEX
from mllm.packing import pack_rows


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
        return {
            "input_ids": _pad([sample["input_ids"] for sample in samples], length, self.pad_token_id),
            "labels": _pad([sample["labels"] for sample in samples], length, IGNORE_INDEX),
            "attention_mask": _pad([[1] * len(sample["input_ids"]) for sample in samples], length, 0),
            **_pictures(samples),
        }


class PackedCollator:
    """Puts several samples into a row; each sees itself only and counts its positions from 0.

    Without an attention mask and with positions that start anew, transformers keeps the samples of a row apart: by a
    block-diagonal mask for "sdpa" and "eager", and by the variable-length kernel for flash attention, which takes all
    samples as one row.

    Args:
        pad_token_id: fills the ends of rows, which nothing else sees.
        row_length: longest row in tokens, at least that of the longest sample; None puts all samples into one row.
    """

    def __init__(self, pad_token_id: int, row_length: int | None) -> None:
        self.pad_token_id = pad_token_id
        self.row_length = row_length

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Samples as B rows of length S.

        Returns:
            int64[B, S] "input_ids", "labels" and "position_ids"; "pixel_values" as by `LlavaCollator`, in the order in
            which their samples lie in the rows.
        """
        rows = pack_rows([len(sample["input_ids"]) for sample in samples], self.row_length)
        packed = [[samples[number] for number in row] for row in rows]
        length = max(sum(len(sample["input_ids"]) for sample in row) for row in packed)
        # A sample's first token has nothing before it to be predicted from; in a row it would be the sample before.
        labels = [[label for sample in row for label in (IGNORE_INDEX, *sample["labels"][1:])] for row in packed]
        ids = [[token_id for sample in row for token_id in sample["input_ids"]] for row in packed]
        positions = [[position for sample in row for position in range(len(sample["input_ids"]))] for row in packed]
        return {
            "input_ids": _pad(ids, length, self.pad_token_id),
            "labels": _pad(labels, length, IGNORE_INDEX),
            # Position 0 again and again: every token of padding is a sample of its own.
            "position_ids": _pad(positions, length, 0),
            **_pictures([sample for row in packed for sample in row]),
        }


class BranchedCollator:
    """Pads samples whose questions do not see each other (`LlavaDataset(independent_turns=True)`).

    Args:
        pad_token_id: fills input_ids.
        additive_mask: see `mllm.branches.collate_rows`.
    """

    def __init__(self, pad_token_id: int, *, additive_mask: bool) -> None:
        self.pad_token_id = pad_token_id
        self.additive_mask = additive_mask

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """B samples as one batch of length S.

        Returns:
            what `mllm.branches.collate_rows` does, and "pixel_values" as by `LlavaCollator`.
        """
        rows = [s if "segments" in s else one_branch(s["input_ids"], s["labels"]) for s in samples]
        return {**collate_rows(rows, self.pad_token_id, additive_mask=self.additive_mask), **_pictures(samples)}


def _pictures(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    pixel_values = [sample["pixel_values"] for sample in samples if sample.get("pixel_values") is not None]
    return {"pixel_values": torch.cat(pixel_values)} if pixel_values else {}


def _pad(rows: Sequence[Sequence[int]], length: int, value: int) -> Tensor:
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.long)
