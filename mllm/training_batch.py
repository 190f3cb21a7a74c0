"""What the trainer gets from its loader: a batch, and what was counted while it was made."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import is_flash_attention_requested

from mllm.collate import BranchedCollator, LlavaCollator, PackedCollator
from mllm.conversation import IGNORE_INDEX
from mllm.data import SkippedSample
from mllm.recipe import LlavaConfig
from mllm.stage_recipe import StageConfig
from vision_moe.distributed import sum_over_ranks

Collator = Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]]


def training_collator(stage: StageConfig, config: LlavaConfig, pad_token_id: int) -> "TrainingCollator":
    """The collator that a stage's fields ask for."""
    if stage.independent_turns:
        additive = config.attn_implementation == "eager"
        return TrainingCollator(BranchedCollator(pad_token_id, additive_mask=additive), pad_token_id)
    if not stage.packing:
        return TrainingCollator(LlavaCollator(pad_token_id), pad_token_id)
    # The variable-length kernel is taken for one row only, and other kernels' cost grows with its length squared.
    one_row = is_flash_attention_requested(requested_attention_implementation=config.attn_implementation)
    return TrainingCollator(PackedCollator(pad_token_id, None if one_row else config.max_length), pad_token_id)


class TrainingCollator:
    """Leaves skipped samples out, makes a batch of the others, and counts.

    Args:
        collate: `LlavaCollator` or `PackedCollator`.
        pad_token_id: the only token of a batch that has no sample left, and that is supervised nowhere.
    """

    def __init__(self, collate: Collator, pad_token_id: int) -> None:
        self.collate = collate
        self.nothing = {"input_ids": [pad_token_id] * 2, "labels": [IGNORE_INDEX] * 2}

    def __call__(self, samples: Sequence[dict[str, Any] | SkippedSample]) -> dict[str, Tensor]:
        """The batch of the collator, and "counts", int64[4]: tokens, places for tokens, samples, skipped samples."""
        kept = [sample for sample in samples if not isinstance(sample, SkippedSample)]
        # Every rank has to run its forward, whatever it was left with.
        batch = self.collate(kept or [self.nothing])
        num_tokens = sum(len(sample["input_ids"]) for sample in kept)
        num_skipped = len(samples) - len(kept)
        batch["counts"] = torch.tensor([num_tokens, batch["input_ids"].numel(), len(samples), num_skipped])
        return batch


class BatchTally:
    """Adds up the counts of batches between two entries of a log.

    Args:
        device: that the ranks talk on.
    """

    def __init__(self, device: torch.device) -> None:
        self._window = torch.zeros(4, dtype=torch.int64, device=device)
        self._total = torch.zeros(4, dtype=torch.int64, device=device)
        self._began: float | None = None

    def add(self, counts: Tensor) -> None:
        """Counts one batch of this rank; the clock starts with the first."""
        if self._began is None:
            self._began = time.monotonic()
        self._window += counts.to(self._window.device)

    def entry(self) -> dict[str, float]:
        """What all ranks have seen since the last entry; all ranks must ask.

        Returns:
            "non_padding_share" of the places for tokens, "tokens_per_second" without padding, and "skipped_samples"
            since the beginning if there are any.

        Raises:
            ValueError: more than half of all samples so far were skipped.
        """
        window = sum_over_ranks(self._window)
        self._total += window
        self._window.zero_()
        now = time.monotonic()
        seconds = now - (self._began if self._began is not None else now)
        self._began = now
        num_tokens, num_places, _, _ = window.tolist()
        _, _, num_samples, num_skipped = self._total.tolist()
        if 2 * num_skipped > num_samples:
            raise ValueError(
                f"{num_skipped} of {num_samples} samples so far were skipped, so there is little to train on; look at "
                f"data, image_folder and max_length with `python -m mllm.data.check RECIPE`"
            )
        entry = {
            "non_padding_share": num_tokens / max(1, num_places),
            "tokens_per_second": num_tokens / max(1e-9, seconds),
        }
        return entry | ({"skipped_samples": float(num_skipped)} if num_skipped else {})
