"""Several training runs at a time on one machine, each on GPUs of its own."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TypeVar

import torch

Run = TypeVar("Run")


@dataclass(frozen=True, kw_only=True)
class RunsConfig:
    """What the training runs of an experiment share."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """One run for each; where something is swept, the first is the sweep's."""
    num_processes: int = 1
    """Processes of each training run."""
    parallel_runs: int = 1
    """Training runs at a time; each has its own `num_processes` GPUs as long as the machine has enough."""

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("seeds is empty; name at least one")
        for name in ("num_processes", "parallel_runs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but got {getattr(self, name)}")


def train_all(train: Callable[[Run, list[str]], None], runs: Sequence[Run], parallel_runs: int, gpus_each: int) -> None:
    """Calls `train(run, gpus)` for all runs, in their order and `parallel_runs` at a time.

    Args:
        train: trains in a process of its own that sees these GPUs only; an empty list is a machine without GPUs.
        runs: what to train.
        parallel_runs: at a time. More than the machine has GPUs for share them.
        gpus_each: GPUs of a run, at most those of the machine.

    Raises:
        Exception: what the first failing run raised; runs under way end, and no further one begins.
    """
    slots: SimpleQueue[int] = SimpleQueue()
    for slot in range(parallel_runs):
        slots.put(slot)
    visible = _visible_gpus()

    def in_a_slot(run: Run) -> None:
        slot = slots.get()
        try:
            train(run, gpus_of(slot, gpus_each, visible))
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(parallel_runs) as pool:
        list(pool.map(in_a_slot, runs))


def gpus_of(slot: int, gpus_each: int, visible: Sequence[str]) -> list[str]:
    """The GPUs of the slot-th of the runs at a time: the next `gpus_each`, from the first again after the last."""
    return [visible[(slot * gpus_each + index) % len(visible)] for index in range(min(gpus_each, len(visible)))]


def _visible_gpus() -> list[str]:
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name]
    return [str(index) for index in range(torch.cuda.device_count())]
