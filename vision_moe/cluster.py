"""Features to pseudo-labels: k-means, and labels accumulated over stages (MCL; CLIP-MoE v3, section 4).

Shapes: N samples, D feature dim, K clusters, C rows of a chunk.
"""

import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_INT64_MAX = 2**63 - 1


class KMeansResult(NamedTuple):
    """Partition of N rows."""

    labels_N: Tensor
    """int64[N], nearest centroid of every row."""
    centroids_KD: Tensor
    """float32[K, D]."""
    inertia: float
    """Sum over rows of the squared distance to their centroid."""


def kmeans(
    x_ND: Tensor, num_clusters: int, *, seed: int, num_iters: int = 50, tol: float = 1e-5, chunk: int = 2048
) -> KMeansResult:
    """Lloyd's algorithm from a greedy k-means++ start (Arthur & Vassilvitskii 2007), in chunks of rows.

    The same input and seed give the same result. A cluster that loses all its rows starts again at the row
    farthest from its centroid.

    Args:
        x_ND: float[N, D] of any float dtype, on any device; half precision is widened chunk by chunk.
        num_clusters: K.
        seed: of the start.
        num_iters: at most this many updates of the centroids.
        tol: stop when the centroids' summed squared shift is at most this share of a column's mean variance.
        chunk: rows handled at once; a chunk that fits the cache is read from memory once an iteration.

    Raises:
        ValueError: fewer rows than clusters, or rows that are not finite.
    """
    if x_ND.ndim != 2 or not x_ND.is_floating_point():
        raise ValueError(f"x_ND must be float[N, D], but got {x_ND.dtype} of shape {tuple(x_ND.shape)}")
    if not 1 <= num_clusters <= len(x_ND):
        raise ValueError(f"num_clusters must be in [1, {len(x_ND)}], the number of rows, but got {num_clusters}")
    rows = _Rows(x_ND, chunk)
    centroids_KD = _plus_plus(rows, num_clusters, torch.Generator().manual_seed(seed))
    parts = rows.assign(centroids_KD)
    for _ in range(num_iters):
        updated_KD = _means(rows, parts)
        shift = float((updated_KD - centroids_KD).square().sum())
        centroids_KD = updated_KD
        parts = rows.assign(centroids_KD)
        if shift <= tol * rows.mean_variance:
            break
    num_empty = int((parts.counts_K == 0).sum())
    if num_empty:
        logger.warning("k-means: %d of %d clusters are empty: too few distinct rows", num_empty, num_clusters)
    inertia = float(parts.distances_N.sum(dtype=torch.float64))
    return KMeansResult(parts.labels_N, centroids_KD + rows.mean_D, inertia)


def accumulate_labels(
    previous_N: Tensor | None,
    image_labels_N: Tensor,
    text_labels_N: Tensor,
    num_image_clusters: int,
    num_text_clusters: int,
) -> Tensor:
    """Label of the tuple of all stages' labels so far; a stage's label is a pair of text and image cluster.

    accumulated = previous * (num_text_clusters * num_image_clusters) + text * num_image_clusters + image

    Args:
        previous_N: int[N], accumulated labels up to the stage before; None at the first stage.
        image_labels_N: int[N] in [0, num_image_clusters).
        text_labels_N: int[N] in [0, num_text_clusters).
        num_image_clusters: K of the image features.
        num_text_clusters: K of the text features.

    Returns:
        int64[N].

    Raises:
        ValueError: lengths differ, a label is out of range, or the result would not fit 64 bits.
    """
    for name, labels_N, count in (
        ("image_labels_N", image_labels_N, num_image_clusters),
        ("text_labels_N", text_labels_N, num_text_clusters),
    ):
        if labels_N.numel() and not 0 <= int(labels_N.min()) <= int(labels_N.max()) < count:
            raise ValueError(f"{name} must be in [0, {count}), but got {int(labels_N.min())} to {int(labels_N.max())}")
    lengths = [len(labels) for labels in (previous_N, image_labels_N, text_labels_N) if labels is not None]
    if len(set(lengths)) > 1:
        raise ValueError(f"all labels must be of the same samples, but got lengths {lengths}")
    num_labels = num_image_clusters * num_text_clusters
    stage_N = text_labels_N.long() * num_image_clusters + image_labels_N.long()
    if previous_N is None or not len(previous_N):
        return stage_N
    if int(previous_N.max()) >= _INT64_MAX // num_labels:
        raise ValueError(f"too many stages: labels of {num_labels} clusters each no longer fit 64 bits")
    return previous_N.long() * num_labels + stage_N


class _Assignment(NamedTuple):
    """Rows by their nearest centroid."""

    labels_N: Tensor
    """int64[N], number of the centroid."""
    distances_N: Tensor
    """float32[N], squared distance to it."""
    sums_KD: Tensor
    """float64[K, D], sum of each centroid's centered rows."""
    counts_K: Tensor
    """int64[K], their number."""


class _Rows:
    """Rows to cluster, seen from their mean: |x|^2 - 2xc + |c|^2 loses its digits far from the origin.

    Centroids are always relative to the mean; the rows themselves are never copied.
    """

    def __init__(self, x_ND: Tensor, chunk: int) -> None:
        self.x_ND = x_ND
        self.chunk = chunk
        self.starts = range(0, len(x_ND), chunk)
        total_D = torch.stack([self.at(start).sum(dim=0, dtype=torch.float64) for start in self.starts]).sum(dim=0)
        self.mean_D = (total_D / len(x_ND)).float()
        if not bool(self.mean_D.isfinite().all()):
            raise ValueError("x_ND holds values that are not finite; the model that made the features has diverged")
        squares = [(self.at(start) - self.mean_D).square().sum(dim=1) for start in self.starts]
        self.squares_N = torch.cat(squares)
        self.mean_variance = float(self.squares_N.sum(dtype=torch.float64)) / x_ND.numel()

    def at(self, start: int) -> Tensor:
        """float32[C, D], the chunk that begins at `start`, as it is."""
        return self.x_ND[start : start + self.chunk].float()

    def pick(self, indices: Tensor) -> Tensor:
        """float32[len(indices), D], single rows, centered."""
        return self.x_ND[indices.to(self.x_ND.device)].float() - self.mean_D

    def distances(self, start: int, centroids_KD: Tensor) -> Tensor:
        """float32[C, K], squared distances of a chunk."""
        cross_CK = self.at(start) @ centroids_KD.T - self.mean_D @ centroids_KD.T
        squares_C1 = self.squares_N[start : start + self.chunk, None]
        return (squares_C1 - 2 * cross_CK + centroids_KD.square().sum(dim=1)).clamp_min_(0.0)

    def assign(self, centroids_KD: Tensor) -> _Assignment:
        """Nearest centroid of every row, and what the next centroids are made of, in one pass over the rows."""
        num_clusters = len(centroids_KD)
        sums_KD = torch.zeros(centroids_KD.shape, dtype=torch.float64, device=centroids_KD.device)
        nearest = []
        for start in self.starts:
            nearest.append(self.distances(start, centroids_KD).min(dim=1))
            # A product with one-hot rows: index_add_ is not deterministic on CUDA.
            one_hot_CK = torch.nn.functional.one_hot(nearest[-1].indices, num_clusters).float()
            sums_KD += (one_hot_CK.T @ self.at(start)).double()
        labels_N = torch.cat([n.indices for n in nearest])
        counts_K = torch.bincount(labels_N, minlength=num_clusters)
        sums_KD -= counts_K[:, None] * self.mean_D.double()
        return _Assignment(labels_N, torch.cat([n.values for n in nearest]), sums_KD, counts_K)


def _plus_plus(rows: _Rows, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++: the next centroid is the best of 2 + log K rows drawn in proportion to distance^2."""
    num_trials = 2 + int(math.log(num_clusters))
    centroids_KD = rows.pick(torch.randint(len(rows.x_ND), (1,), generator=generator))
    distances_N = torch.cat([rows.distances(start, centroids_KD) for start in rows.starts]).squeeze(1)
    for _ in range(1, num_clusters):
        # A search in the running sum and not torch.multinomial, which takes 2^24 rows at most.
        running_N = distances_N.double().cumsum(0)
        draws_T = torch.rand(num_trials, generator=generator, dtype=torch.float64).to(running_N.device)
        trials_T = torch.searchsorted(running_N, draws_T * running_N[-1], right=True)
        candidates_TD = rows.pick(trials_T.clamp_max(len(running_N) - 1))
        to_candidates_NT = torch.cat([rows.distances(start, candidates_TD) for start in rows.starts])
        closest_NT = torch.minimum(to_candidates_NT, distances_N[:, None])
        best = int(closest_NT.sum(dim=0, dtype=torch.float64).argmin())
        centroids_KD = torch.cat([centroids_KD, candidates_TD[best : best + 1]])
        distances_N = closest_NT[:, best].contiguous()
    return centroids_KD


def _means(rows: _Rows, parts: _Assignment) -> Tensor:
    """float32[K, D], means of the clusters; empty ones move to the rows farthest from their centroids."""
    means_KD = (parts.sums_KD / parts.counts_K.clamp_min(1)[:, None]).float()
    empty_M = (parts.counts_K == 0).nonzero().squeeze(1)
    if len(empty_M):
        means_KD[empty_M] = rows.pick(parts.distances_N.topk(len(empty_M)).indices)
    return means_KD
