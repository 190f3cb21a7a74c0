"""Global batches that depend on the seed alone, dealt out to ranks and forwards."""

from itertools import chain, islice

import pytest

from mllm.sampler import DialogueBatchSampler


def _steps(sampler: DialogueBatchSampler) -> list[list[int]]:
    forwards = iter(sampler)
    return [list(chain.from_iterable(islice(forwards, sampler.accumulation))) for _ in range(sampler.num_steps)]


@pytest.mark.parametrize(
    "lengths", [None, [(1 if i % 3 else -1) * (i + 1) for i in range(20)]], ids=["plain", "grouped"]
)
@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_global_batches_do_not_change_with_ranks_and_accumulation(lengths, world_size, accumulation):
    alone = _steps(DialogueBatchSampler(20, 4, 12, seed=3, lengths=lengths))
    ranks = [
        _steps(
            DialogueBatchSampler(
                20, 4, 12, seed=3, rank=rank, world_size=world_size, accumulation=accumulation, lengths=lengths
            )
        )
        for rank in range(world_size)
    ]
    together = [sorted(chain.from_iterable(step)) for step in zip(*ranks, strict=True)]
    assert together == [sorted(step) for step in alone]


def test_an_epoch_shows_every_sample_and_fills_its_last_batch_up():
    steps = _steps(DialogueBatchSampler(10, 4, 3, seed=0))
    seen = list(chain.from_iterable(steps))
    assert set(seen) == set(range(10))
    assert len(seen) == 12


def test_epochs_differ_in_order():
    steps = _steps(DialogueBatchSampler(8, 8, 2, seed=0))
    assert steps[0] != steps[1]
    assert sorted(steps[0]) == sorted(steps[1])


def test_grouped_batches_hold_one_modality_and_only_the_rest_is_mixed():
    lengths = [5 + i for i in range(11)] + [-5 - i for i in range(9)]
    steps = _steps(DialogueBatchSampler(20, 4, 5, seed=1, lengths=lengths))
    kinds = [{lengths[i] > 0 for i in step} for step in steps]
    # 11 pictures and 9 texts: two whole batches of each, and one of what is left: three pictures, one text.
    assert sorted(len(kind) for kind in kinds) == [1, 1, 1, 1, 2]
    assert set(chain.from_iterable(steps)) == set(range(20))


def test_forwards_of_a_grouped_batch_hold_similar_lengths():
    sampler = DialogueBatchSampler(8, 8, 1, seed=0, accumulation=2, lengths=[1, 9, 2, 8, 3, 7, 4, 6])
    first, second = list(sampler)
    assert sorted(first) == [1, 3, 5, 7]
    assert sorted(second) == [0, 2, 4, 6]


def test_fewer_samples_than_a_batch_are_repeated():
    (step,) = _steps(DialogueBatchSampler(3, 8, 1, seed=0))
    assert len(step) == 8
    assert set(step) == {0, 1, 2}


def test_global_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiple of world_size x accumulation = 2 x 3, but got 8"):
        DialogueBatchSampler(10, 8, 1, seed=0, world_size=2, accumulation=3)
