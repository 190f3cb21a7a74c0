"""Training runs at a time: each has its own GPUs, and a failing one ends the experiment."""

import threading
import time

import pytest

from eval.parallel_runs import RunsConfig, gpus_of, train_all


@pytest.mark.parametrize("name", ["num_processes", "parallel_runs"])
def test_no_process_or_no_run_at_a_time_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, but got 0"):
        RunsConfig(**{name: 0})


@pytest.mark.parametrize(
    ("slots", "gpus_each", "visible", "wanted"),
    [
        (2, 2, ["0", "1", "2", "3"], [["0", "1"], ["2", "3"]]),
        (3, 1, ["4", "5"], [["4"], ["5"], ["4"]]),
        (2, 2, ["0"], [["0"], ["0"]]),
        (2, 1, [], [[], []]),
    ],
)
def test_each_slot_has_the_next_gpus(slots, gpus_each, visible, wanted):
    assert [gpus_of(slot, gpus_each, visible) for slot in range(slots)] == wanted


def test_runs_at_a_time_see_different_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    both, seen = threading.Barrier(2, timeout=30), []

    def train(run, gpus):
        both.wait()  # Passed by two runs at a time only.
        seen.append((run // 2, *gpus))

    train_all(train, range(4), 2, 1)
    assert sorted(seen) == [(0, "2"), (0, "5"), (1, "2"), (1, "5")]


def test_after_a_failing_run_no_further_one_begins():
    begun = []

    def train(run, gpus):
        begun.append(run)
        time.sleep(0.01)
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        train_all(train, range(100), 1, 1)
    assert len(begun) < 100
