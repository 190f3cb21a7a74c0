"""Stops a run at the first loss that is not finite, and says which samples it was.

The check comes before the backward pass, so no weight has been spoiled yet: the last checkpoint is as good as before.
"""

import copy
import math
from itertools import islice

import torch
from torch import Tensor

from mllm.data import LlavaDataset
from mllm.sampler import DialogueBatchSampler
from vision_moe.distributed import gather


class NonFiniteLossError(RuntimeError):
    """A loss is NaN or infinite."""


class LossWatch:
    """Looks at the loss of every forward on all ranks.

    Args:
        sampler: knows which samples each rank sees in each forward.
        dataset: knows their ids.
    """

    def __init__(self, sampler: DialogueBatchSampler, dataset: LlavaDataset) -> None:
        self.sampler = sampler
        self.dataset = dataset
        self._step = -1
        self._forward = 0

    def check(self, loss: Tensor, step: int) -> None:
        """Checks one forward; all ranks must call it.

        Args:
            loss: scalar.
            step: steps that are complete.

        Raises:
            NonFiniteLossError: some rank's loss is not finite; raised on all of them.
        """
        self._forward = self._forward + 1 if step == self._step else 0
        self._step = step
        losses_W = gather(loss.detach().float().reshape(1))
        if torch.isfinite(losses_W).all():
            return
        ids = [self._sample_ids(number) for number in range(len(losses_W))]
        told = [
            f"{value} on rank {number}, samples {', '.join(ids[number][self._forward])}"
            for number, value in enumerate(losses_W.tolist())
            if not math.isfinite(value)
        ]
        everything = ", ".join(name for forwards in ids for forward in forwards for name in forward)
        raise NonFiniteLossError(
            f"the loss of step {step + 1}, forward {self._forward + 1} of {self.sampler.accumulation}, is not finite: "
            f"{'; '.join(told)}. All samples of the step: {everything}. Nothing was learnt from it; look at these "
            f"samples, or lower the learning rate"
        )

    def _sample_ids(self, number: int) -> list[list[str]]:
        """Ids of a rank's samples in the present step, forward by forward."""
        sampler = copy.copy(self.sampler)
        sampler.rank = number
        first = self._step * sampler.accumulation
        forwards = islice(sampler, first, first + sampler.accumulation)
        return [[self.dataset.sample_id(index) for index in forward] for forward in forwards]
