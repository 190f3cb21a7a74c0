"""Means over tokens, which the router losses are functions of: of this process, of all ranks, or of a batch in chunks.

T tokens of this process, X any shape.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# float[T, X] -> float[X]
TokenMean = Callable[[Tensor], Tensor]


class TokenMeans(Protocol):
    """Picks the mean of a tower's losses."""

    def __call__(self, *, local: bool) -> TokenMean:
        """The mean, `local`: over this process's tokens and not those of all ranks."""


def means_of_step(*, local: bool) -> TokenMean:
    """The means of a step of one forward."""
    return mean_of_process if local else mean_of_ranks


def mean_of_process(x_TX: Tensor) -> Tensor:
    """Mean over the tokens of this process."""
    return x_TX.mean(dim=0)


def mean_of_ranks(x_TX: Tensor) -> Tensor:
    """Mean over the tokens of all ranks, however many each has; every rank must call it.

    Gradients averaged over ranks, as DistributedDataParallel and DeepSpeed do, are those of one process that holds all
    tokens.
    """
    if _num_ranks() == 1:
        return mean_of_process(x_TX)
    total: Tensor = _SumOfRanks.apply(_sum_and_count(x_TX))
    return (total[:-1] / total[-1]).view(x_TX.shape[1:])


class ChunkMeans:
    """Means over the tokens of all chunks of a batch, for a step that runs each chunk twice.

    While it counts, the first time, its means are of no use. Afterwards their values are those of the whole batch, and
    their gradients those of the chunk at hand: summed over chunks, and averaged over ranks, those of the whole batch.
    """

    def __init__(self) -> None:
        self._totals: list[Tensor] = []
        self._local: list[bool] = []
        self._call = 0
        self._counts = True
        self._is_empty = False

    def next_chunk(self, *, is_empty: bool = False) -> None:
        """Comes before each chunk's forward, whose means come in the same order each time.

        Args:
            is_empty: the tokens of this forward do not count, its means are its own and shall not be used; it is run
                so that ranks do alike.
        """
        self._call = 0
        self._is_empty = is_empty

    def counted(self) -> None:
        """Ends the first time through; every rank must come here."""
        self._counts = False
        shared = [total for total, local in zip(self._totals, self._local, strict=True) if not local]
        if _num_ranks() == 1 or not shared:
            return
        together = torch.cat(shared)
        dist.all_reduce(together)
        sums = iter(together.split([len(total) for total in shared]))
        self._totals = [total if local else next(sums) for total, local in zip(self._totals, self._local, strict=True)]

    def __call__(self, *, local: bool) -> TokenMean:
        """See `TokenMeans`."""

        def mean(x_TX: Tensor) -> Tensor:
            own = _sum_and_count(x_TX)
            number, self._call = self._call, self._call + 1
            if self._counts:
                if number == len(self._totals):
                    self._totals.append(torch.zeros_like(own))
                    self._local.append(local)
                if not self._is_empty:
                    self._totals[number] += own.detach()
            if self._counts or self._is_empty:
                return mean_of_process(x_TX)
            # Ranks' gradients will be averaged, where these are to be summed.
            weight = 1 if local else _num_ranks()
            total = self._totals[number]
            return ((total + weight * (own - own.detach()))[:-1] / total[-1]).view(x_TX.shape[1:])

        return mean


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _sum_and_count(x_TX: Tensor) -> Tensor:
    """float[X + 1], flat."""
    return torch.cat([x_TX.sum(dim=0).flatten(), x_TX.new_full((1,), len(x_TX))])


class _SumOfRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_X: Tensor) -> Tensor:
        x_X = x_X.contiguous().clone()
        dist.all_reduce(x_X)
        return x_X

    @staticmethod
    def backward(ctx: Any, grad_X: Tensor) -> Tensor:
        # Of every rank's loss: they may weigh it differently.
        grad_X = grad_X.contiguous().clone()
        dist.all_reduce(grad_X)
        return grad_X
