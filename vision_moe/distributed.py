"""Ranks, barriers, objects between ranks, and a gather that gradients flow through.

Works before torch.distributed is set up: torchrun and deepspeed announce the world in RANK and WORLD_SIZE,
and the process group is made the first time that ranks have to wait for each other.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


def rank() -> int:
    """Number of this process among all processes of the run, from 0."""
    return dist.get_rank() if _has_group() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if _has_group() else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is rank 0, the one that writes shared files and shows progress."""
    return rank() == 0


def barrier() -> None:
    """Waits until every rank is here; sets the process group up if nobody has yet."""
    if world_size() == 1:
        return
    if not _has_group():
        from accelerate import PartialState

        # The same choice of backend and device that transformers' TrainingArguments finds later.
        PartialState(cpu=not torch.cuda.is_available())
    if dist.get_backend() == "nccl":
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """Runs the block on rank 0, then on the other ranks, which then find what rank 0 wrote to disk."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        # Also when rank 0 fails: the others must not wait for ever; they meet the same error themselves.
        if is_main():
            barrier()


def from_main(value: Value) -> Value:
    """Rank 0's value on every rank; any object that can be pickled."""
    if world_size() == 1:
        return value
    barrier()
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather_objects(value: Value) -> list[Value]:
    """The values of all ranks in rank order, on every rank; any objects that can be pickled."""
    if world_size() == 1:
        return [value]
    barrier()
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, value)
    return parts


def gather(x_BD: Tensor) -> Tensor:
    """Rows of all ranks in rank order, without gradient.

    Args:
        x_BD: [B, ...], of one shape and dtype on every rank.

    Returns:
        [world_size * B, ...]; `x_BD` itself in a world of one.
    """
    if world_size() == 1:
        return x_BD
    x_BD = x_BD.detach().contiguous()
    parts = [torch.empty_like(x_BD) for _ in range(world_size())]
    dist.all_gather(parts, x_BD)
    return torch.cat(parts)


def gather_with_grad(x_BD: Tensor) -> Tensor:
    """Rows of all ranks in rank order; a rank's rows receive the gradient of every rank's loss, summed.

    Args:
        x_BD: float[B, ...], of one shape and dtype on every rank.

    Returns:
        float[world_size * B, ...]; `x_BD` itself in a world of one.
    """
    return x_BD if world_size() == 1 else _GatherWithGrad.apply(x_BD)


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a tensor over all ranks, without gradient."""
    return sum_over_ranks(value) / world_size()


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of a tensor over all ranks, without gradient."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BD: Tensor) -> Tensor:
        ctx.num_rows = len(x_BD)
        return gather(x_BD)

    @staticmethod
    def backward(ctx: Any, grad_GD: Tensor) -> Tensor:
        # Not reduce_scatter, which gloo lacks for some dtypes: embeddings are small beside what DDP sends.
        grad_GD = grad_GD.contiguous().clone()
        dist.all_reduce(grad_GD)
        return grad_GD[rank() * ctx.num_rows : (rank() + 1) * ctx.num_rows]


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()
