"""The language model's loss from the positions that are supervised, which are few.

B batch, S sequence, D model dim, M supervised positions, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from mllm.conversation import IGNORE_INDEX

# Positions whose float32 logits exist at one time: 1024 of 32,000 entries are 131 MB.
_CHUNK = 1024


def supervised_loss(
    hidden_BSD: Tensor, labels_BS: Tensor, lm_head: nn.Module, num_items: Tensor | int | None = None
) -> tuple[Tensor, Tensor]:
    """Next-token cross-entropy, with the head applied at supervised positions only.

    The same number as the head over all positions and -100 ignored. The logits keep the head's dtype; only a chunk of
    them is float32 at a time, in the backward pass too.

    Args:
        hidden_BSD: the language model's last hidden states.
        labels_BS: int64[B, S], -100 where nothing is supervised; label s is predicted from position s - 1.
        lm_head: called exactly once whatever the labels are, so that ranks that share its weight (ZeRO-3) stay in step.
        num_items: divisor of the summed loss, the supervised tokens of all micro batches and ranks of a step; None =
            this batch's own.

    Returns:
        float32 scalar loss, and the number M of supervised positions, int64 scalar.
    """
    targets_BS = labels_BS[:, 1:]
    supervised_BS = targets_BS != IGNORE_INDEX
    num_supervised = supervised_BS.sum()
    hidden_MD, targets_M = hidden_BSD[:, :-1][supervised_BS], targets_BS[supervised_BS]
    if targets_M.numel() == 0:
        # An ignored position gives loss 0 and zero gradients, where nothing at all would leave none.
        hidden_MD, targets_M = hidden_BSD[:1, 0], labels_BS.new_full((1,), IGNORE_INDEX)
    logits_MV = lm_head(hidden_MD)
    sums = [
        checkpoint(_summed_loss, logits, targets, use_reentrant=False, preserve_rng_state=False)
        for logits, targets in zip(logits_MV.split(_CHUNK), targets_M.split(_CHUNK), strict=True)
    ]
    divisor = num_supervised.clamp(min=1) if num_items is None else num_items
    if isinstance(divisor, Tensor):
        divisor = divisor.to(logits_MV.device)
    return torch.stack(sums).sum() / divisor, num_supervised


def _summed_loss(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    return cross_entropy(logits_MV.float(), targets_M, ignore_index=IGNORE_INDEX, reduction="sum")
