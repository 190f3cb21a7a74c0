"""Which dialogues each forward of each rank sees: global batches planned from the seed, then dealt out.

The global batches depend on the seed alone, so a run does not change with the number of processes or with gradient
accumulation.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

Indices = NDArray[np.int64]


class DialogueBatchSampler(Sampler[list[int]]):
    """Yields this rank's indices, forward by forward; `accumulation` forwards make a step.

    Each epoch is a new order of all samples; its last global batch is filled up from the epoch's beginning.

    Args:
        num_samples: length of the data set.
        global_batch_size: samples per step over all ranks and forwards.
        num_steps: steps to yield.
        seed: decides every batch.
        rank: number of this process.
        world_size: number of processes.
        accumulation: forwards per step.
        lengths: one number per sample, positive with a picture, negative without, its size the sample's length.
            Given, a global batch holds one modality, and its forwards dialogues of similar length (LLaVA-1.5's
            `group_by_modality_length`); what is left of both at an epoch's end is mixed.

    Raises:
        ValueError: no samples, or a global batch that does not divide evenly.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        num_steps: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        lengths: Sequence[int] | Indices | None = None,
    ) -> None:
        if num_samples < 1:
            raise ValueError("the data set is empty")
        if global_batch_size % (world_size * accumulation):
            raise ValueError(
                f"global_batch_size must be a multiple of world_size x accumulation = {world_size} x {accumulation}, "
                f"but got {global_batch_size}"
            )
        if lengths is not None and len(lengths) != num_samples:
            raise ValueError(f"lengths must have one entry for each of {num_samples} samples, but got {len(lengths)}")
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.num_steps = num_steps
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.accumulation = accumulation
        self.lengths_N = None if lengths is None else np.asarray(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return self.num_steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for batch in islice(self._global_batches(), self.num_steps):
            if self.lengths_N is not None:
                # Similar lengths side by side: little padding within a forward, similar work on every rank.
                batch = batch[np.argsort(-np.abs(self.lengths_N[batch]), kind="stable")]
            for forward in np.split(batch, self.accumulation):
                yield forward[self.rank :: self.world_size].tolist()

    def _global_batches(self) -> Iterator[Indices]:
        epoch = 0
        while True:
            rng = np.random.default_rng([self.seed, epoch])
            order = rng.permutation(self.num_samples)
            yield from self._filled(order) if self.lengths_N is None else self._by_modality(order, rng)
            epoch += 1

    def _filled(self, order: Indices) -> list[Indices]:
        size = self.global_batch_size
        num_batches = -(-len(order) // size)
        return np.split(np.resize(order, num_batches * size), num_batches)

    def _by_modality(self, order: Indices, rng: np.random.Generator) -> list[Indices]:
        assert self.lengths_N is not None
        size = self.global_batch_size
        whole: list[Indices] = []
        rest: list[Indices] = []
        for own in (order[self.lengths_N[order] > 0], order[self.lengths_N[order] <= 0]):
            num_whole = len(own) // size
            whole += [own[i * size : (i + 1) * size] for i in range(num_whole)]
            rest.append(own[num_whole * size :])
        batches = [whole[i] for i in rng.permutation(len(whole))]
        mixed = np.concatenate(rest)
        return batches + self._filled(mixed) if len(mixed) else batches
