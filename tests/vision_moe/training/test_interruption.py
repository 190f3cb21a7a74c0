"""Ctrl-C ends a stage after its step with a checkpoint and a word on how to go on."""

import logging
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from vision_moe.checkpoint import CheckpointMarker
from vision_moe.interruption import says_how_to_go_on


def test_a_run_stopped_by_ctrl_c_goes_on_to_the_same_weights(train_dense, tmp_path, monkeypatch, caplog):
    unbroken = train_dense(tmp_path / "unbroken")
    caplog.set_level(logging.WARNING)
    before = signal.getsignal(signal.SIGINT)

    def press(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointMarker, "on_step_begin", press)
        with pytest.raises(SystemExit) as stopped:
            train_dense(tmp_path / "stopped", "--save_steps", "100")
    assert stopped.value.code == 130
    assert "a checkpoint holds step 2 of 4" in caplog.text
    assert "the same command, started again" in caplog.text
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in (tmp_path / "stopped" / "dense" / "checkpoints").iterdir()] == ["checkpoint-2"]
    resumed = train_dense(tmp_path / "stopped", "--save_steps", "100")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (resumed, unbroken))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_ctrl_c_between_the_steps_says_where_to_go_on(tmp_path, caplog):
    with pytest.raises(SystemExit) as stopped, says_how_to_go_on(tmp_path):
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    assert str(tmp_path) in caplog.text
