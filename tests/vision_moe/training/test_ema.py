"""Averaged weights: the formula, what is averaged, exact resumption, and the finished model."""

import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerState, TrainingArguments

from vision_moe.config import parse
from vision_moe.ema import EMACallback
from vision_moe.recipe import TrainConfig


class Model(nn.Module):
    """One weight that trains, one that does not, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.full((1,), 5.0), requires_grad=False)
        self.register_buffer("counter", torch.zeros(1))

    def step(self, callback, value):
        with torch.no_grad():
            self.trained.fill_(value)
            self.counter.add_(1)
        callback.on_step_end(None, None, None)


def test_the_average_follows_the_formula_and_ends_up_in_the_model():
    model, callback = Model(), EMACallback(0.75)
    callback.on_train_begin(None, None, None, model=model)
    for value in (1.0, 3.0, 7.5):
        model.step(callback, value)
        assert model.trained.item() == value
    callback.on_train_end(None, None, None)
    # 1; 0.75 * 1 + 0.25 * 3 = 1.5; 0.75 * 1.5 + 0.25 * 7.5 = 3.
    assert model.trained.item() == 3.0
    assert model.frozen.item() == 5.0
    assert model.counter.item() == 3.0


def test_a_checkpoint_takes_the_average_up_where_it_was(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    model, callback = Model(), EMACallback(0.75)
    callback.on_train_begin(None, None, None, model=model)
    model.step(callback, 1.0)
    (tmp_path / "checkpoint-1").mkdir()
    callback.on_save(args, TrainerState(global_step=1), None)
    resumed, callback = Model(), EMACallback(0.75, str(tmp_path / "checkpoint-1"))
    callback.on_train_begin(None, None, None, model=resumed)
    resumed.step(callback, 3.0)
    callback.on_train_end(None, None, None)
    assert resumed.trained.item() == 1.5


def test_a_checkpoint_of_other_weights_is_refused(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    callback = EMACallback(0.75)
    callback.on_train_begin(None, None, None, model=nn.Linear(1, 1))
    (tmp_path / "checkpoint-1").mkdir()
    callback.on_save(args, TrainerState(global_step=1), None)
    with pytest.raises(ValueError, match="averages other weights than this stage trains"):
        EMACallback(0.75, str(tmp_path / "checkpoint-1")).on_train_begin(None, None, None, model=Model())


def test_a_stage_leaves_the_average_of_its_steps(train_dense, tmp_path, monkeypatch):
    steps = []
    on_step_end = EMACallback.on_step_end

    def watch(self, args, state, control, model=None, **kwargs):
        steps.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        on_step_end(self, args, state, control)

    monkeypatch.setattr(EMACallback, "on_step_end", watch)
    finished = load_file(train_dense(tmp_path / "run", "--dense.ema_decay", "0.5") / "model.safetensors")
    assert len(steps) == 4
    average = steps[0]
    for step in steps[1:]:
        average = {name: (average[name] + step[name]) / 2 for name in step}
    for name, expected in average.items():
        torch.testing.assert_close(finished[name], expected, rtol=1e-6, atol=1e-8, msg=name)
    assert any(not torch.equal(finished[name], steps[-1][name]) for name in average)


ALL_AT_ONCE = ("--dense.ema_decay", "0.5", "--dense.patch_dropout", "0.5", "--dense.grad_cache_batch_size", "12")


def test_a_stage_with_average_patch_dropout_and_gradient_cache_resumes_exactly(train_dense, tmp_path):
    expected = load_file(train_dense(tmp_path / "unbroken", *ALL_AT_ONCE) / "model.safetensors")
    with pytest.raises(InterruptedError):
        train_dense(tmp_path / "broken", *ALL_AT_ONCE, stop_in=3)
    got = load_file(train_dense(tmp_path / "broken", *ALL_AT_ONCE) / "model.safetensors")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mcl.ema_decay", "1.0"], r"ema_decay must be in \[0, 1\)"),
        (["--mcl.patch_dropout", "1.0"], r"patch_dropout must be in \[0, 1\)"),
        (["--mcl.grad_cache_batch_size", "0"], "grad_cache_batch_size must be positive"),
        (["--mcl.ema_decay", "0.9", "--deepspeed", "zero.json"], "mcl.ema_decay cannot run under DeepSpeed"),
        (["--mcl.optimizer", "muon", "--deepspeed", "zero2"], r"Muon needs whole matrices.*set mcl.optimizer to adamw"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_recipe(flags, message, tmp_path, capsys):
    with pytest.raises((SystemExit, ValueError)) as refused:
        parse(TrainConfig, ["--output", str(tmp_path), "--data.train", "x", *flags])
    assert re.search(message, capsys.readouterr().err + str(refused.value))
