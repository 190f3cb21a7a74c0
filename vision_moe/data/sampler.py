"""Batch samplers whose batches are shared by all ranks, and the one of ordinary training: random epochs.

A dataset key is (index, epoch): the epoch decides which of a picture's captions is drawn. Every sampler plans
the global batch from the seed alone, so all ranks plan the same one, and each takes its own slice of it.
"""

from abc import abstractmethod
from collections.abc import Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

DatasetKey = tuple[int, int]


class GlobalBatchSampler(Sampler[list[DatasetKey]]):
    """Yields this rank's slice of each global batch; the slices in rank order are the batch of one process.

    Args:
        global_batch_size: samples per step, over all ranks.
        num_steps: batches to yield, across as many epochs as that takes.
        seed: decides every batch.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        ValueError: the batch cannot be divided evenly, or a number is out of range.
    """

    def __init__(self, global_batch_size: int, num_steps: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if global_batch_size < 1 or num_steps < 1 or seed < 0:
            raise ValueError(
                "global_batch_size and num_steps must be at least 1 and seed at least 0, but got "
                f"global_batch_size={global_batch_size}, num_steps={num_steps}, seed={seed}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size), but got rank={rank}, world_size={world_size}")
        if global_batch_size % world_size:
            raise ValueError(
                f"global_batch_size must be a multiple of world_size, but got {global_batch_size} with "
                f"world_size={world_size}"
            )
        self.global_batch_size = global_batch_size
        self.num_steps = num_steps
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[DatasetKey]]:
        size = self.global_batch_size // self.world_size
        own = slice(self.rank * size, (self.rank + 1) * size)
        for epoch, batch in islice(self._epochs(), self.num_steps):
            yield [(int(index), epoch) for index in batch[own]]

    def _epochs(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        epoch = 0
        while True:
            for batch in self.global_batches(epoch):
                yield epoch, batch
            epoch += 1

    @abstractmethod
    def global_batches(self, epoch: int) -> Iterator[NDArray[np.int64]]:
        """Sample indices of the global batches of one epoch; at least one batch, and no index twice."""

    def shuffled(self, indices: NDArray[np.int64], *stream: int) -> NDArray[np.int64]:
        """The indices in an order that depends on the seed and on `stream` (epoch, cluster, ...) only."""
        return np.random.default_rng([self.seed, *stream]).permutation(indices)


class EpochBatchSampler(GlobalBatchSampler):
    """Ordinary training: each epoch a new order of all samples, cut into batches, the incomplete last one dropped.

    Args:
        num_samples: length of the data set.
        global_batch_size: samples per step, over all ranks.
        num_steps: batches to yield.
        seed: decides every batch.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        ValueError: fewer samples than one global batch, or as GlobalBatchSampler.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        num_steps: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(global_batch_size, num_steps, seed, rank, world_size)
        if num_samples < global_batch_size:
            raise ValueError(
                f"num_samples={num_samples} is less than global_batch_size={global_batch_size}; lower the latter"
            )
        self.num_samples = num_samples

    def global_batches(self, epoch: int) -> Iterator[NDArray[np.int64]]:
        order = self.shuffled(np.arange(self.num_samples), epoch)
        for start in range(0, self.num_samples - self.global_batch_size + 1, self.global_batch_size):
            yield order[start : start + self.global_batch_size]
