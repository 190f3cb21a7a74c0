"""The check before a stage's first step: it finds what would go wrong, and changes nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mllm.stages
from mllm.memory import estimate_memory
from mllm.preflight import PreflightError, preflight
from mllm.stage_recipe import LoraSettings
from mllm.train import run
from mllm.trainer import LlavaTrainer


def _losses(folder: Path) -> list[float]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_weights_are_those_of_a_run_without_it(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    finetune = {
        "llm": "lora",
        "lora": LoraSettings(r=2, alpha=4, dropout=0.5),
        "tower": "full",
        "tower_lr": 1e-3,
        "gradient_checkpointing": checkpointing,
    }
    calls = []
    monkeypatch.setattr(
        mllm.stages, "preflight", lambda trainer, *rest: calls.append(trainer) or preflight(trainer, *rest)
    )
    checked = run(make_config(tmp_path / "checked", finetune=finetune))
    assert len(calls) == 2
    monkeypatch.setattr(mllm.stages, "preflight", lambda *args: None)
    plain = run(make_config(tmp_path / "plain", finetune=finetune))
    assert _losses(tmp_path / "checked") == _losses(tmp_path / "plain")
    expected, got = load_file(plain / "model.safetensors"), load_file(checked / "model.safetensors")
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def _freeze_projector(trainer: LlavaTrainer) -> None:
    trainer.model.model.multi_modal_projector.requires_grad_(False)


def _free_tower(trainer: LlavaTrainer) -> None:
    trainer.model.model.vision_tower.requires_grad_(True)


def _spoil_projector(trainer: LlavaTrainer) -> None:
    nn.init.constant_(trainer.model.model.multi_modal_projector.linear_1.weight, torch.nan)


def _detach_projector(trainer: LlavaTrainer) -> None:
    trainer.model.model.multi_modal_projector.linear_1.register_forward_hook(lambda *given: given[-1].detach())


def _silence_projector(trainer: LlavaTrainer) -> None:
    trainer.model.model.multi_modal_projector.register_forward_hook(lambda *given: 0 * given[-1])


def _spoil_gradient(trainer: LlavaTrainer) -> None:
    trainer.model.model.multi_modal_projector.linear_2.weight.register_hook(lambda gradient: gradient * torch.inf)


def _halve_pictures(trainer: LlavaTrainer) -> None:
    trainer.model.config.image_seq_length = 2


def _lose_features(trainer: LlavaTrainer) -> None:
    trainer.model.model.vision_tower.register_forward_hook(_without_last_patch)


def _without_last_patch(module: nn.Module, inputs: Any, output: Any) -> Any:
    output.last_hidden_state = output.last_hidden_state[:, :-1]
    if output.hidden_states is not None:
        output.hidden_states = tuple(None if state is None else state[:, :-1] for state in output.hidden_states)
    return output


def _mask_labels(trainer: LlavaTrainer) -> None:
    collate = trainer.data_collator

    def masked(samples: Any) -> Any:
        batch = collate(samples)
        batch["labels"].fill_(-100)
        return batch

    trainer.data_collator = masked


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_freeze_projector, "projector should be 'full', but 0 of its 4 parameters train"),
        (_free_tower, "tower should be 'frozen', but"),
        (_spoil_projector, "the loss is nan, and not all weights are finite: model.multi_modal_projector.linear_1.wei"),
        (_detach_projector, "no gradient reaches projector: model.multi_modal_projector.linear_1.weight"),
        (_silence_projector, "all gradients of projector are zero"),
        (_spoil_gradient, "gradients of projector are not finite: model.multi_modal_projector.linear_2.weight"),
        (_halve_pictures, "4 image tokens for 1 pictures, but 2 are wanted"),
        (_lose_features, "the tower gives 3 features for 4 image tokens"),
        (_mask_labels, "nothing is supervised in the first 8 forwards"),
    ],
)
def test_a_stage_that_would_train_wrongly_fails_before_its_first_step(
    make_config: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[LlavaTrainer], None],
    message: str,
) -> None:
    def spoiled(trainer: LlavaTrainer, stage: Any, folder: Path) -> None:
        spoil(trainer)
        preflight(trainer, stage, folder)

    monkeypatch.setattr(mllm.stages, "preflight", spoiled)
    config = make_config(tmp_path / "run")
    with pytest.raises((PreflightError, ValueError), match=message):
        run(config)
    assert not (config.output / "metrics.jsonl").exists()


def test_a_folder_that_cannot_be_written_is_found(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(dir: Path) -> None:  # noqa: A002  # tempfile's name
        raise PermissionError(f"read-only: {dir}")

    monkeypatch.setattr("mllm.preflight.tempfile.TemporaryFile", refuse)
    with pytest.raises(PreflightError, match=r"checkpoints cannot be written to .*pretrain/checkpoints \(read-only"):
        run(make_config(tmp_path / "run"))


def test_a_disk_too_full_for_a_checkpoint_is_found(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mllm.preflight.shutil.disk_usage", lambda folder: SimpleNamespace(free=5_000))
    # 12 bytes for each of 2 * (32 * 32 + 32) weights of the projector: 25 kB.
    with pytest.raises(PreflightError, match=r"has 0\.0 GB left, but a checkpoint takes about 0\.0 GB"):
        run(make_config(tmp_path / "run"))


@pytest.mark.parametrize(("zero_stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_memory_is_that_of_the_zero_paper(zero_stage: int, gigabytes: float) -> None:
    # Rajbhandari et al. 2020, figure 1: 7.5 billion parameters in 16 bits, Adam, 64 processes.
    model = nn.ParameterList([nn.Parameter(torch.empty(7_500_000_000, dtype=torch.bfloat16, device="meta"))])
    memory = estimate_memory(model, zero_stage, 64)
    assert (memory.weights + memory.gradients + memory.optimizer) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_frozen_weights_have_no_gradients_and_no_optimizer() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 5, bias=False))
    model[0].requires_grad_(False)
    memory = estimate_memory(model, None, 2)
    # 150 weights in float32, of which 50 train.
    assert (memory.weights, memory.gradients, memory.optimizer, memory.checkpoint) == (600, 200, 400, 600)
