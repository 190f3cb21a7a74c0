"""k-means against known optima, and the base-K code of accumulated labels."""

import itertools
import logging

import pytest
import torch

from vision_moe.cluster import accumulate_labels, kmeans


@pytest.fixture
def blobs() -> torch.Tensor:
    """Four blobs of 50 points, 10 apart with spread 0.5, in shuffled order; row i belongs to blob `blob_of[i]`."""
    generator = torch.Generator().manual_seed(0)
    centers_KD = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    return centers_KD.repeat_interleave(50, dim=0) + 0.5 * torch.randn(200, 2, generator=generator)


def _inertia_of(x_ND, labels_N):
    groups = [x_ND[labels_N == label].double() for label in labels_N.unique()]
    return sum(float((group - group.mean(dim=0)).square().sum()) for group in groups)


@pytest.mark.parametrize("seed", range(5))
def test_separate_blobs_are_found_at_their_optimum(blobs, seed):
    order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
    truth_N = torch.arange(4).repeat_interleave(50)[order]
    result = kmeans(blobs[order], 4, seed=seed)
    assert result.inertia == pytest.approx(_inertia_of(blobs[order], truth_N), rel=1e-4)
    pairs = set(zip(result.labels_N.tolist(), truth_N.tolist(), strict=True))
    assert len(pairs) == 4


def test_best_partition_of_few_points_is_found():
    # The optimum by trying all 3^6 partitions.
    x_ND = torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
    best = min(_inertia_of(x_ND, torch.tensor(labels)) for labels in itertools.product(range(3), repeat=6))
    found = min(kmeans(x_ND, 3, seed=seed).inertia for seed in range(10))
    assert found == pytest.approx(best, rel=1e-4)


def test_result_is_consistent_with_itself(blobs):
    result = kmeans(blobs, 3, seed=1)
    distances_NK = torch.cdist(blobs, result.centroids_KD).square()
    assert torch.equal(distances_NK.argmin(dim=1), result.labels_N)
    assert result.inertia == pytest.approx(float(distances_NK.min(dim=1).values.sum()), rel=1e-4)
    assert result.labels_N.dtype == torch.int64


def test_same_seed_same_result_and_no_global_random_state(blobs):
    torch.manual_seed(1)
    first = kmeans(blobs, 5, seed=7)
    torch.manual_seed(2)
    second = kmeans(blobs, 5, seed=7)
    assert torch.equal(first.labels_N, second.labels_N)
    assert torch.equal(first.centroids_KD, second.centroids_KD)
    starts = {tuple(kmeans(blobs, 7, seed=seed, num_iters=0).labels_N.tolist()) for seed in range(5)}
    assert len(starts) > 1


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunks_do_not_change_the_result(blobs, chunk):
    whole = kmeans(blobs, 4, seed=0)
    parts = kmeans(blobs, 4, seed=0, chunk=chunk)
    assert torch.equal(whole.labels_N, parts.labels_N)
    assert parts.inertia == pytest.approx(whole.inertia, rel=1e-5)


def test_points_far_from_the_origin_keep_their_distances(blobs):
    near = kmeans(blobs, 4, seed=0)
    far = kmeans(blobs + 1000.0, 4, seed=0)
    assert torch.equal(near.labels_N, far.labels_N)
    assert far.inertia == pytest.approx(near.inertia, rel=1e-3)


def test_half_precision_features_are_widened(blobs):
    half_ND = blobs.half()
    result = kmeans(half_ND, 4, seed=0)
    assert result.centroids_KD.dtype == torch.float32
    assert torch.equal(result.labels_N, kmeans(half_ND.float(), 4, seed=0).labels_N)


def test_emptied_cluster_starts_again_at_the_farthest_row(monkeypatch):
    # Centroids are relative to the mean, 6.3. The second one has no row, so the update puts it on the row that is
    # farthest from the first one: 20.1.
    x_ND = torch.tensor([[0.0], [0.1], [5.0], [20.1]])
    monkeypatch.setattr("vision_moe.cluster._plus_plus", lambda *_: torch.tensor([[0.0], [900.0]]))
    result = kmeans(x_ND, 2, seed=0, num_iters=1)
    assert result.centroids_KD.flatten().tolist() == pytest.approx([6.3, 20.1], abs=1e-4)
    assert result.labels_N.tolist() == [0, 0, 0, 1]


def test_too_few_distinct_rows_leave_clusters_empty_and_say_so(caplog):
    with caplog.at_level(logging.WARNING):
        result = kmeans(torch.ones(5, 3), 2, seed=0)
    assert result.inertia == 0.0
    assert "1 of 2 clusters are empty" in caplog.text


@pytest.mark.parametrize(
    ("x_ND", "num_clusters", "message"),
    [
        (torch.zeros(3, 2), 4, r"num_clusters must be in \[1, 3\]"),
        (torch.zeros(3, 2), 0, "num_clusters"),
        (torch.tensor([[0.0], [float("nan")]]), 1, "not finite"),
        (torch.tensor([[0.0], [float("inf")]]), 1, "not finite"),
        (torch.zeros(3), 1, "float"),
        (torch.zeros(3, 2, dtype=torch.int64), 1, "float"),
    ],
)
def test_impossible_clusterings_are_refused(x_ND, num_clusters, message):
    with pytest.raises(ValueError, match=message):
        kmeans(x_ND, num_clusters, seed=0)


def test_accumulated_labels_are_the_base_k_code_of_all_stages():
    # 2 image and 3 text clusters: stage label = 2 * text + image in [0, 6).
    first_N = accumulate_labels(None, torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 2, 2]), 2, 3)
    assert first_N.tolist() == [0, 1, 4, 5]
    second_N = accumulate_labels(first_N, torch.tensor([1, 0, 1, 1]), torch.tensor([2, 0, 0, 2]), 2, 3)
    assert second_N.tolist() == [0 * 6 + 5, 1 * 6 + 0, 4 * 6 + 1, 5 * 6 + 5]
    assert second_N.dtype == torch.int64
    assert torch.equal(second_N // 6, first_N)


def test_three_stages_of_three_by_three_give_9_81_729_labels():
    labels_N, counts = None, []
    digits = torch.cartesian_prod(*[torch.arange(3)] * 6)
    for stage in range(3):
        labels_N = accumulate_labels(labels_N, digits[:, 2 * stage], digits[:, 2 * stage + 1], 3, 3)
        counts.append(len(labels_N.unique()))
    assert counts == [9, 81, 729]
    assert int(labels_N.max()) == 728


def test_labels_that_cannot_be_accumulated_are_refused():
    two = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"image_labels_N must be in \[0, 1\)"):
        accumulate_labels(None, two, two, 1, 2)
    with pytest.raises(ValueError, match="text_labels_N"):
        accumulate_labels(None, two, -two, 2, 2)
    with pytest.raises(ValueError, match="lengths"):
        accumulate_labels(torch.tensor([0]), two, two, 2, 2)
    with pytest.raises(ValueError, match="64 bits"):
        accumulate_labels(torch.tensor([0, 2**62]), two, two, 2, 2)
