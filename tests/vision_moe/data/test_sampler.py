"""Batch samplers: what a global batch holds, and that ranks share it."""

from itertools import chain

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from torch.utils.data import DataLoader

from vision_moe.data.cluster_sampler import ClusterBatchSampler
from vision_moe.data.sampler import EpochBatchSampler

# 23 samples in clusters of 9, 8, 4 and 2; labels with gaps, as accumulated labels have.
_SHUFFLE = torch.randperm(23, generator=torch.Generator().manual_seed(0))
LABELS_N = torch.tensor([10] * 9 + [3] * 8 + [70] * 4 + [71] * 2)[_SHUFFLE]


def test_epoch_sampler_uses_every_sample_once_before_any_twice():
    batches = list(EpochBatchSampler(num_samples=12, global_batch_size=4, num_steps=6, seed=0))
    assert sorted(index for batch in batches[:3] for index, _ in batch) == list(range(12))
    assert sorted(index for batch in batches[3:] for index, _ in batch) == list(range(12))
    assert [{epoch for _, epoch in batch} for batch in batches] == [{0}] * 3 + [{1}] * 3
    assert batches[0] != batches[3]


def test_epoch_sampler_drops_other_samples_each_epoch():
    batches = list(EpochBatchSampler(num_samples=10, global_batch_size=4, num_steps=40, seed=0))
    seen = {index for batch in batches for index, _ in batch}
    assert all(len({index for index, _ in batch}) == 4 for batch in batches)
    assert seen == set(range(10))


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("kind", ["epoch", "cluster", "back_off"])
def test_slices_of_all_ranks_are_the_batch_of_one_process(kind, world_size):
    def sampler(rank, world_size):
        if kind == "epoch":
            return EpochBatchSampler(23, 4, 9, 5, rank, world_size)
        extra = {"small_clusters": "back_off", "ancestors": [LABELS_N // 10]} if kind == "back_off" else {}
        return ClusterBatchSampler(LABELS_N, 4, 9, 5, rank, world_size, **extra)

    alone = list(sampler(0, 1))
    ranks = [list(sampler(rank, world_size)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {9}
    joined = [list(chain(*parts)) for parts in zip(*ranks, strict=True)]
    assert joined == alone
    assert all(len({index for index, _ in batch}) == 4 for batch in alone)


def test_sampler_repeats_itself_and_its_seed_matters():
    sampler = ClusterBatchSampler(LABELS_N, 4, 12, seed=1)
    assert list(sampler) == list(sampler) == list(ClusterBatchSampler(LABELS_N, 4, 12, seed=1))
    assert list(sampler) != list(ClusterBatchSampler(LABELS_N, 4, 12, seed=2))


def test_sampler_does_not_touch_global_random_state():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(ClusterBatchSampler(LABELS_N, 4, 3, seed=1))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_cluster_batches_hold_one_label_in_round_robin():
    batches = list(ClusterBatchSampler(LABELS_N, 4, 5, seed=0))
    labels = [{int(LABELS_N[index]) for index, _ in batch} for batch in batches]
    # Sizes 8, 9, 4, 2 of labels 3, 10, 70, 71: two, two, one and no whole batch of 4.
    assert labels == [{3}, {10}, {70}, {3}, {10}]
    indices = [index for batch in batches for index, _ in batch]
    assert len(set(indices)) == len(indices)


def test_cluster_report_says_what_was_dropped():
    sampler = ClusterBatchSampler(LABELS_N, 4, 5, seed=0)
    assert sampler.report() == {
        "clusters": 4,
        "sizes": {3: 8, 10: 9, 70: 4, 71: 2},
        "batches": 5,
        "dropped": 3,
        "dropped_clusters": 1,
        "dropped_in_small_clusters": 2,
        "backed_off": 0,
    }
    assert sampler.dropped == 23 - 5 * 4


def test_leftovers_of_a_cluster_change_between_epochs():
    sampler = ClusterBatchSampler(torch.zeros(6, dtype=torch.int64), 4, 40, seed=0)
    assert {index for batch in sampler for index, _ in batch} == set(range(6))


def test_back_off_pools_small_clusters_below_their_parent_only():
    # Parent 0: clusters of 5, 3, 3; parent 1: clusters of 3 and 2; batches of 5.
    labels_N = torch.tensor([0] * 5 + [1] * 3 + [2] * 3 + [7] * 3 + [8] * 2)
    parents_N = torch.tensor([0] * 11 + [1] * 5)
    sampler = ClusterBatchSampler(labels_N, 5, 30, seed=0, small_clusters="back_off", ancestors=[parents_N])
    report = sampler.report()
    assert (report["batches"], report["dropped"], report["backed_off"], report["dropped_clusters"]) == (3, 1, 11, 0)
    for batch in sampler:
        labels = {int(labels_N[index]) for index, _ in batch}
        assert labels == {0} or labels <= {1, 2} or labels == {7, 8}


def test_back_off_keeps_members_of_a_cluster_together():
    # Four clusters of 3 in batches of 6: each batch must hold two whole clusters.
    labels_N = torch.arange(4).repeat_interleave(3)
    sampler = ClusterBatchSampler(labels_N, 6, 20, seed=0, small_clusters="back_off")
    batches = [sorted(int(labels_N[index]) for index, _ in batch) for batch in sampler]
    assert all(batch[0:3] == [batch[0]] * 3 and batch[3:] == [batch[3]] * 3 for batch in batches)
    # Which two clusters meet changes between epochs.
    assert len({tuple(batch) for batch in batches}) > 2


def test_back_off_climbs_to_the_finest_ancestor_that_fills_a_batch():
    # Pairs 0 to 7 below parents 0 0 1 1 2 2 3 3, these below grandparents 0 0 1 1; batches of 4 and of 8.
    labels_N, parents_N, grandparents_N = (torch.arange(8).repeat_interleave(2) // 2**level for level in range(3))
    for batch_size, groups in ((4, parents_N), (8, grandparents_N)):
        sampler = ClusterBatchSampler(
            labels_N, batch_size, 8, seed=0, small_clusters="back_off", ancestors=[parents_N, grandparents_N]
        )
        assert sampler.dropped == 0
        for batch in sampler:
            assert len({int(groups[index]) for index, _ in batch}) == 1


def test_back_off_drops_a_pool_that_fills_no_batch():
    labels_N = torch.tensor([0] * 4 + [1] * 2)
    sampler = ClusterBatchSampler(labels_N, 4, 3, seed=0, small_clusters="back_off", ancestors=[labels_N])
    assert sampler.dropped == 2
    assert sampler.report()["dropped_clusters"] == 1


def test_resumption_skips_batches_without_changing_the_rest():
    sampler = ClusterBatchSampler(LABELS_N, 4, 9, seed=3, rank=1, world_size=2)
    loader = DataLoader(_Echo(), batch_sampler=sampler, collate_fn=list)
    assert list(skip_first_batches(loader, 4)) == list(loader)[4:]
    assert len(loader) == 9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClusterBatchSampler(LABELS_N, 16, 1, 0), "none of 4 clusters fills a global batch of 16"),
        (lambda: ClusterBatchSampler(LABELS_N, 4, 1, 0, small_clusters="merge"), "choose one of: drop, back_off"),
        (
            lambda: ClusterBatchSampler(LABELS_N, 4, 1, 0, small_clusters="back_off", ancestors=[torch.zeros(5)]),
            "must have shape",
        ),
        (
            lambda: ClusterBatchSampler(
                torch.zeros(8, dtype=torch.int64), 9, 1, 0, small_clusters="back_off", ancestors=[torch.arange(8)]
            ),
            "coarser",
        ),
        (lambda: ClusterBatchSampler(torch.empty(0, dtype=torch.int64), 4, 1, 0), "non-empty"),
        (lambda: EpochBatchSampler(3, 4, 1, 0), "num_samples=3"),
        (lambda: EpochBatchSampler(9, 3, 1, 0, 0, 2), "multiple of world_size"),
        (lambda: EpochBatchSampler(9, 2, 1, 0, 2, 2), "rank must be"),
        (lambda: EpochBatchSampler(9, 2, 0, 0), "num_steps"),
    ],
)
def test_impossible_plans_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class _Echo(torch.utils.data.Dataset):
    def __len__(self):
        return len(LABELS_N)

    def __getitem__(self, key):
        return key
