"""Means over tokens, which the router losses are functions of: of this process, or of all ranks.

T tokens of this process, X any shape.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# float[T, X] -> float[X]
TokenMean = Callable[[Tensor], Tensor]


def mean_of_process(x_TX: Tensor) -> Tensor:
    """Mean over the tokens of this process."""
    return x_TX.mean(dim=0)


def mean_of_ranks(x_TX: Tensor) -> Tensor:
    """Mean over the tokens of all ranks, however many each has; every rank must call it.

    Gradients averaged over ranks, as DistributedDataParallel and DeepSpeed do, are those of one process that holds all
    tokens.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return mean_of_process(x_TX)
    count_1 = x_TX.new_full((1,), len(x_TX))
    total: Tensor = _SumOfRanks.apply(torch.cat([x_TX.sum(dim=0).flatten(), count_1]))
    return (total[:-1] / total[-1]).view(x_TX.shape[1:])


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
