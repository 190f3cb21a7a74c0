"""Damaged checkpoints: which one a training goes on from, what it says, and that it ends as an unbroken one."""

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState, TrainingArguments

from vision_moe.checkpoint import CheckpointMarker, last_checkpoint


@pytest.fixture
def checkpoints(tmp_path):
    """Three whole checkpoints: 8, 9 and 10, the newest though its name sorts first."""
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    for step in (8, 9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / f"global_step{step}").mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(range(200)))
        (folder / f"global_step{step}" / "rank_0.pt").write_bytes(b"optimizer")
        CheckpointMarker().on_save(args, TrainerState(global_step=step), None)
    return tmp_path


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "model.safetensors", 120)


def lose(checkpoint: Path) -> None:
    next(checkpoint.glob("global_step*/rank_0.pt")).unlink()


def flip(checkpoint: Path) -> None:
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.seek(150)
        file.write(b"\0")


def leave_unfinished(checkpoint: Path) -> None:
    (checkpoint / "complete.json").unlink()


def cut_the_list(checkpoint: Path) -> None:
    os.truncate(checkpoint / "complete.json", 10)


DAMAGES = {
    truncate: "model.safetensors has 120 bytes, 200 were written",
    lose: "global_step10/rank_0.pt is missing, 9 were written",
    flip: "model.safetensors: not the bytes that were written",
    leave_unfinished: "not written to its end",
    cut_the_list: "complete.json is unreadable",
}


def test_the_newest_whole_checkpoint_is_taken_without_a_word(checkpoints, caplog):
    assert last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-10")
    assert caplog.records == []


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_newest_checkpoint_is_passed_over_with_one_warning(checkpoints, caplog, damage):
    damage(checkpoints / "checkpoint-10")
    assert last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-9")
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert f"checkpoint-10 ({DAMAGES[damage]})" in warning.getMessage()
    assert "going back to checkpoint-9" in warning.getMessage()
    # The Trainer, which keeps the two newest by name or time, must not count it.
    assert not (checkpoints / "checkpoint-10").exists()
    assert (checkpoints / "damaged-checkpoint-10").is_dir()
    assert last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-9")


def test_all_damaged_begins_anew_with_one_warning(checkpoints, caplog):
    for step, damage in zip((8, 9, 10), (flip, lose, leave_unfinished), strict=True):
        damage(checkpoints / f"checkpoint-{step}")
    assert last_checkpoint(checkpoints) is None
    (warning,) = caplog.records
    assert "no checkpoint is left, the training begins anew" in warning.getMessage()
    assert all(f"checkpoint-{step} (" in warning.getMessage() for step in (8, 9, 10))


def test_damaged_checkpoints_do_not_pile_up(checkpoints):
    for step in (10, 9):
        truncate(checkpoints / f"checkpoint-{step}")
        assert last_checkpoint(checkpoints) == str(checkpoints / f"checkpoint-{step - 1}")
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-8", "damaged-checkpoint-9"}


def test_no_checkpoints_is_no_warning(tmp_path, caplog):
    assert last_checkpoint(tmp_path / "none") is None
    assert caplog.records == []


def test_two_checkpoints_are_kept_and_a_damaged_one_changes_nothing_in_the_end(train_dense, tmp_path, caplog):
    expected = load_file(train_dense(tmp_path / "unbroken") / "model.safetensors")
    with pytest.raises(InterruptedError):
        train_dense(tmp_path / "stopped", stop_in=4)
    kept = tmp_path / "stopped" / "dense" / "checkpoints"
    assert {path.name for path in kept.iterdir()} == {"checkpoint-2", "checkpoint-3"}
    for number, damaged in enumerate(([3], [2, 3])):
        output = shutil.copytree(tmp_path / "stopped", tmp_path / f"damaged{number}")
        for step in damaged:
            os.truncate(output / "dense" / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt", 1000)
        # The folder is part of the recipe.
        recipe = output / "config.yaml"
        recipe.write_text(recipe.read_text().replace(str(tmp_path / "stopped"), str(output)))
        caplog.clear()
        got = load_file(train_dense(output) / "model.safetensors")
        assert all(torch.equal(expected[name], got[name]) for name in expected)
        (warning,) = [record for record in caplog.records if record.name == "vision_moe.checkpoint"]
        assert ("going back to checkpoint-2" if damaged == [3] else "begins anew") in warning.getMessage()
