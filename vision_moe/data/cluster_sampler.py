"""Batches from one cluster, for multistage contrastive learning (MCL)."""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vision_moe.data.sampler import GlobalBatchSampler

Indices = NDArray[np.int64]
# Label and members of each.
Clusters = list[tuple[int, Indices]]


class ClusterBatchSampler(GlobalBatchSampler):
    """Multistage contrastive learning: a global batch comes from one cluster, so that all negatives share its label.

    Round robin over the clusters in order of their label; a cluster is shuffled anew each epoch and gives as
    many whole batches as it holds, one a visit. Clusters smaller than a batch are dropped (as the official
    CLIP-MoE code does), or back off: they are pooled with the other small ones below the finest coarser label that
    fills a batch, members of one cluster side by side. A pooled batch holds several labels; the loss must then not
    count pairs of different label as negatives (`groups_B` of contrastive_loss).

    Args:
        labels_N: int[N], accumulated label of every sample.
        global_batch_size: samples per step, over all ranks.
        num_steps: batches to yield.
        seed: decides every batch.
        rank: number of this process.
        world_size: number of processes.
        small_clusters: what becomes of clusters smaller than a global batch.
        ancestors: int[N] each, coarser labels for "back_off", from the stage before back to the first; above the last
            one all samples are one pool.

    Attributes:
        dropped: samples of an epoch that are in none of its batches.

    Raises:
        ValueError: no cluster or pool fills a batch, or the ancestors do not fit the labels.
    """

    def __init__(
        self,
        labels_N: Tensor | NDArray[np.int64],
        global_batch_size: int,
        num_steps: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        small_clusters: Literal["drop", "back_off"] = "drop",
        ancestors: Sequence[Tensor | NDArray[np.int64]] = (),
    ) -> None:
        super().__init__(global_batch_size, num_steps, seed, rank, world_size)
        if small_clusters not in ("drop", "back_off"):
            raise ValueError(f"unknown small_clusters {small_clusters!r}; choose one of: drop, back_off")
        members = _members(np.asarray(labels_N))
        ancestors = [_same_length(np.asarray(labels), len(labels_N)) for labels in ancestors]
        self.cluster_sizes = {label: len(indices) for label, indices in members.items()}
        small = {label: indices for label, indices in members.items() if len(indices) < global_batch_size}
        # A source of batches is a list of clusters: a large one alone, or pooled small ones.
        self._sources = [[(label, indices)] for label, indices in members.items() if label not in small]
        self._pooled: set[int] = set()
        if small_clusters == "back_off":
            pools = _pools(small, ancestors, global_batch_size)
            self._sources += pools
            self._pooled = {label for pool in pools for label, _ in pool}
        self.batches_per_epoch = sum(_size(source) // global_batch_size for source in self._sources)
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"none of {len(members)} clusters fills a global batch of {global_batch_size}: the largest has "
                f"{max(self.cluster_sizes.values())} of {sum(self.cluster_sizes.values())} samples; lower "
                'global_batch_size or the number of clusters, or set small_clusters="back_off"'
            )
        self.dropped = sum(self.cluster_sizes.values()) - self.batches_per_epoch * global_batch_size

    def global_batches(self, epoch: int) -> Iterator[NDArray[np.int64]]:
        size = self.global_batch_size
        orders = [self._order(source, epoch) for source in self._sources]
        for visit in range(max(len(order) // size for order in orders)):
            for order in orders:
                if (visit + 1) * size <= len(order):
                    yield order[visit * size : (visit + 1) * size]

    def report(self) -> dict[str, int | dict[int, int]]:
        """Clusters and their sizes; batches, dropped and backed off samples of one epoch."""
        lost = [
            label
            for label, size in self.cluster_sizes.items()
            if size < self.global_batch_size and label not in self._pooled
        ]
        return {
            "clusters": len(self.cluster_sizes),
            "sizes": dict(self.cluster_sizes),
            "batches": self.batches_per_epoch,
            "dropped": self.dropped,
            "dropped_clusters": len(lost),
            "dropped_in_small_clusters": sum(self.cluster_sizes[label] for label in lost),
            "backed_off": sum(self.cluster_sizes[label] for label in self._pooled),
        }

    def _order(self, source: Clusters, epoch: int) -> NDArray[np.int64]:
        turns = self.shuffled(np.arange(len(source)), epoch, 0, source[0][0])
        return np.concatenate([self.shuffled(source[turn][1], epoch, 1, source[turn][0]) for turn in turns])


def _members(labels_N: NDArray[np.int64]) -> dict[int, Indices]:
    if labels_N.ndim != 1 or labels_N.size == 0 or labels_N.dtype.kind not in "iu" or labels_N.min() < 0:
        raise ValueError(
            "labels_N must be a non-empty vector of integers from 0, but got shape "
            f"{labels_N.shape}, dtype {labels_N.dtype}"
        )
    order = np.argsort(labels_N, kind="stable")
    labels, starts = np.unique(labels_N[order], return_index=True)
    parts = np.split(order, starts[1:])
    return {int(label): part for label, part in zip(labels, parts, strict=True)}


def _same_length(labels_N: NDArray[np.int64], num_samples: int) -> NDArray[np.int64]:
    if labels_N.shape != (num_samples,):
        raise ValueError(f"ancestors must have shape ({num_samples},) like the labels, but got {labels_N.shape}")
    return labels_N


def _pools(small: dict[int, Indices], ancestors: list[NDArray[np.int64]], batch: int) -> list[Clusters]:
    """Small clusters, each below its finest ancestor that fills a batch; what fills none is left out."""
    waiting: list[Clusters] = [[cluster] for cluster in small.items()]
    num_samples = max((int(indices.max()) + 1 for indices in small.values()), default=0)
    pools = []
    for labels_N in [*ancestors, np.zeros(num_samples, dtype=np.int64)]:
        merged: dict[int, Clusters] = {}
        for group in waiting:
            merged.setdefault(_label_above(group, labels_N), []).extend(group)
        groups = [merged[label] for label in sorted(merged)]
        pools += [group for group in groups if _size(group) >= batch]
        waiting = [group for group in groups if _size(group) < batch]
    return pools


def _label_above(group: Clusters, labels_N: NDArray[np.int64]) -> int:
    """The one coarser label of a group of clusters."""
    above = np.unique(np.concatenate([labels_N[indices] for _, indices in group]))
    if len(above) > 1:
        raise ValueError(
            f"ancestors must be coarser than labels, but cluster {group[0][0]} has ancestors {above[:5].tolist()}"
        )
    return int(above[0])


def _size(source: Clusters) -> int:
    return sum(len(indices) for _, indices in source)
