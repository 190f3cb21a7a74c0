"""Stops a run at the first loss that is not finite, and says which samples it was.

The check comes before a step's last backward pass, so no weight has been spoiled yet: the last checkpoint is as good as
before. Ranks talk and the device is waited for once a step, however many forwards it has.
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
    """Looks at the losses of a step on all ranks.

    Args:
        sampler: knows which samples each rank sees in each forward.
        dataset: knows their ids.
    """

    def __init__(self, sampler: DialogueBatchSampler, dataset: LlavaDataset) -> None:
        self.sampler = sampler
        self.dataset = dataset
        self._losses: list[Tensor] = []

    def check(self, loss: Tensor, step: int) -> None:
        """Takes the loss of one forward, and checks those of the step with its last one; all ranks must call it.

        Args:
            loss: scalar.
            step: steps that are complete.

        Raises:
            NonFiniteLossError: some loss of the step is not finite on some rank; raised on all of them.
        """
        self._losses.append(loss.detach().float())
        if len(self._losses) < self.sampler.accumulation:
            return
        losses_WA = gather(torch.stack(self._losses)[None])
        self._losses = []
        if not torch.isfinite(losses_WA).all():
            raise NonFiniteLossError(self._message(losses_WA.tolist(), step))

    def _message(self, losses_WA: list[list[float]], step: int) -> str:
        """Which forward of which rank it was; the first one tells of the others' cause, if they have one."""
        ids = [self._sample_ids(number, step) for number in range(len(losses_WA))]
        broken = [(forward, number) for number, row in enumerate(losses_WA) for forward in _not_finite(row)]
        first, _ = min(broken)
        told = [
            f"{losses_WA[number][forward]} on rank {number}, samples {', '.join(ids[number][forward])}"
            for forward, number in broken
            if forward == first
        ]
        everything = ", ".join(name for forwards in ids for forward in forwards for name in forward)
        return (
            f"the loss of step {step + 1}, forward {first + 1} of {self.sampler.accumulation}, is not finite: "
            f"{'; '.join(told)}. All samples of the step: {everything}. Nothing was learnt from it; look at these "
            f"samples, or lower the learning rate"
        )

    def _sample_ids(self, number: int, step: int) -> list[list[str]]:
        """Ids of a rank's samples in a step, forward by forward."""
        sampler = copy.copy(self.sampler)
        sampler.rank = number
        first = step * sampler.accumulation
        forwards = islice(sampler, first, first + sampler.accumulation)
        return [[self.dataset.sample_id(index) for index in forward] for forward in forwards]


def _not_finite(losses: list[float]) -> list[int]:
    return [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
