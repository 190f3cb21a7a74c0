"""Skipped samples leave the batch and are counted; the log tells padding, speed and skips."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mllm.training_batch
from mllm.collate import LlavaCollator, PackedCollator
from mllm.data import SkippedSample
from mllm.training_batch import BatchTally, TrainingCollator

LONG = {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}
SHORT = {"input_ids": [5, 6], "labels": [-100, 6]}
SKIPPED = SkippedSample("no picture")


@pytest.mark.parametrize("collate", [LlavaCollator(0), PackedCollator(0, 4)])
def test_skipped_samples_are_left_out_and_counted(collate: Any) -> None:
    batch = TrainingCollator(collate, 0)([SKIPPED, LONG, SKIPPED, SHORT])
    # 4 + 2 tokens in 2 rows of 4.
    assert batch.pop("counts").tolist() == [6, 8, 4, 2]
    expected = collate([LONG, SHORT])
    assert all(torch.equal(batch[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("collate", [LlavaCollator(0), PackedCollator(0, 4)])
def test_a_batch_of_skipped_samples_has_a_row_and_supervises_nothing(collate: Any) -> None:
    batch = TrainingCollator(collate, 7)([SKIPPED, SKIPPED])
    assert batch["input_ids"].tolist() == [[7, 7]]
    assert batch["labels"].tolist() == [[-100, -100]]
    assert batch["counts"].tolist() == [0, 2, 2, 2]


def test_an_entry_tells_of_the_batches_since_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 16.0])
    # The module's clock alone: other threads of the process read the time as well.
    monkeypatch.setattr(mllm.training_batch, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    tally = BatchTally(torch.device("cpu"))
    tally.add(torch.tensor([30, 40, 4, 0]))
    tally.add(torch.tensor([50, 60, 4, 0]))
    assert tally.entry() == {"non_padding_share": 0.8, "tokens_per_second": 40.0}
    tally.add(torch.tensor([20, 40, 4, 1]))
    assert tally.entry() == {"non_padding_share": 0.5, "tokens_per_second": 5.0, "skipped_samples": 1.0}


def test_more_skipped_than_kept_stops_the_run() -> None:
    tally = BatchTally(torch.device("cpu"))
    tally.add(torch.tensor([4, 4, 4, 2]))
    assert tally.entry()["skipped_samples"] == 2
    tally.add(torch.tensor([4, 4, 4, 3]))
    with pytest.raises(ValueError, match="5 of 8 samples so far were skipped"):
        tally.entry()
