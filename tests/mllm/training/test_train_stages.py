"""A LLaVA run in one process without DeepSpeed: what trains, what it leaves, and that a killed run goes on exactly."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import TrainerCallback

import mllm.stages
from mllm.train import run


class KilledError(Exception):
    """Stands for kill -9 in one process."""


class _KillAt(TrainerCallback):
    def __init__(self, stage: str, step: int) -> None:
        self.stage, self.step = stage, step

    def on_step_end(self, args, state, control, **kwargs):
        # Before on_save of this step: the last complete checkpoint is the one of the step before.
        if Path(args.output_dir).parent.name == self.stage and state.global_step == self.step:
            raise KilledError


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def kill_at(monkeypatch):
    """Makes the next runs die at a step of a stage."""

    def arm(stage: str, step: int) -> None:
        class DyingTrainer(mllm.stages.LlavaTrainer):
            def __init__(self, *args, callbacks, **kwargs):
                super().__init__(*args, callbacks=[*callbacks, _KillAt(stage, step)], **kwargs)

        monkeypatch.setattr(mllm.stages, "LlavaTrainer", DyingTrainer)

    return arm


def test_run_trains_the_projector_then_the_language_model_and_leaves_the_tower(make_config, tmp_path, tiny_parts):
    config = make_config(tmp_path / "run")
    model = run(config)
    pretrained, finetuned = _weights(config.output / "pretrain" / "model"), _weights(model)
    tower = {name for name in finetuned if "vision_tower" in name}
    llm = {name for name in finetuned if "language_model" in name}
    projector = {name for name in finetuned if "multi_modal_projector" in name}
    assert tower | llm | projector == set(finetuned)
    card = ModelCard.load(model / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "| samples seen | 12 |" in card.text
    assert "No benchmark was part of this run" in card.text
    assert all(torch.equal(pretrained[name], finetuned[name]) for name in tower)
    assert any(not torch.equal(pretrained[name], finetuned[name]) for name in llm)
    assert all(not torch.equal(pretrained[name], finetuned[name]) for name in projector)
    llama = load_file(Path(tiny_parts["llm"]) / "model.safetensors")
    (start,) = [name for name in llm if name.endswith("layers.0.mlp.up_proj.weight")]
    assert torch.equal(pretrained[start], llama["model.layers.0.mlp.up_proj.weight"])


def test_run_leaves_config_environment_metrics_and_markers_and_no_checkpoints(make_config, tmp_path):
    config = make_config(tmp_path / "run")
    run(config)
    files = _files(config.output)
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "pretrain/stage.json", "finetune/stage.json"):
        assert name in files
    assert not any("checkpoint" in name or name.startswith("start/") for name in files)
    metrics = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    assert [(m["stage"], m["step"]) for m in metrics if "loss" in m] == [
        (stage, step) for stage in ("pretrain", "finetune") for step in (1, 2, 3)
    ]


def test_log_names_trained_parts_with_counts_and_the_derived_accumulation(make_config, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="mllm.stages"):
        run(make_config(tmp_path / "run"))
    assert "3 steps of 4 dialogues = 1 per forward x 1 processes x 4 accumulated forwards" in caplog.text
    assert "llm: trains 0 of" in caplog.text
    counts = json.loads((tmp_path / "run" / "finetune" / "stage.json").read_text())["parameters"]
    assert counts["tower"]["trained"] == 0 < counts["tower"]["all"]
    assert counts["llm"]["trained"] == counts["llm"]["all"] > 0
    # Linear(32, 32) twice, with biases.
    assert counts["projector"] == {"trained": 2 * (32 * 32 + 32), "all": 2 * (32 * 32 + 32)}


@pytest.mark.parametrize(
    ("stage", "llm", "quantization"),
    [
        ("pretrain", "full", None),
        ("finetune", "full", None),
        pytest.param("finetune", "lora", None, marks=pytest.mark.slow),
        ("finetune", "lora", "4bit"),
        pytest.param("finetune", "lora", "8bit", marks=pytest.mark.slow),
    ],
)
def test_killed_run_ends_with_the_same_files_and_weights_as_an_unbroken_one(
    make_config, tmp_path, kill_at, monkeypatch, stage, llm, quantization
):
    if quantization is not None:
        pytest.importorskip("bitsandbytes")
    unbroken = make_config(tmp_path / "unbroken", finetune={"llm": llm, "quantization": quantization})
    run(unbroken)
    broken = replace(unbroken, output=tmp_path / "broken")
    kill_at(stage, 3)
    with pytest.raises(KilledError):
        run(broken)
    monkeypatch.undo()
    run(broken)
    assert _files(broken.output) == _files(unbroken.output)
    expected, got = _weights(unbroken.output / "model"), _weights(broken.output / "model")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize("damage", ["unfinished", "truncated"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    make_config, tmp_path, kill_at, monkeypatch, caplog, damage
):
    unbroken = make_config(tmp_path / "unbroken")
    run(unbroken)
    broken = replace(unbroken, output=tmp_path / "broken")
    kill_at("pretrain", 3)
    with pytest.raises(KilledError):
        run(broken)
    monkeypatch.undo()
    newest = broken.output / "pretrain" / "checkpoints" / "checkpoint-2"
    if damage == "unfinished":
        # As a kill leaves it while it is being written.
        (newest / "complete.json").unlink()
    (newest / "trained.safetensors").write_bytes(b"half")
    run(broken)
    assert "going back to checkpoint-1" in caplog.text
    expected, got = _weights(unbroken.output / "model"), _weights(broken.output / "model")
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_finished_run_trains_nothing_again(make_config, tmp_path, monkeypatch):
    config = make_config(tmp_path / "run")
    model = run(config)
    before = _weights(model)
    monkeypatch.setattr(mllm.stages.LlavaTrainer, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    assert run(config) == model
    assert all(torch.equal(before[name], tensor) for name, tensor in _weights(model).items())


@pytest.mark.parametrize("tower", ["frozen", "full"])
def test_accumulation_does_not_change_the_result(make_config, tmp_path, tower):
    """Nor with router losses, one of whose micro batches is text alone."""
    config = make_config(tmp_path / "two", finetune={"tower": tower, "tower_lr": 1e-3})
    whole = replace(
        config,
        output=tmp_path / "one",
        pretrain=replace(config.pretrain, per_device_batch_size=4),
        finetune=replace(config.finetune, per_device_batch_size=4),
    )
    expected, got = _weights(run(whole)), _weights(run(config))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=2e-5)


def test_lora_leaves_plain_weights_that_differ_from_the_start(make_config, tmp_path):
    config = make_config(tmp_path / "run", finetune={"llm": "lora"})
    model = run(config)
    pretrained, finetuned = _weights(config.output / "pretrain" / "model"), _weights(model)
    assert pretrained.keys() == finetuned.keys()
    changed = {name for name in finetuned if not torch.equal(pretrained[name], finetuned[name])}
    assert any("q_proj" in name and "language_model" in name for name in changed)
    assert not any("embed_tokens" in name or "norm" in name or "vision_tower" in name for name in changed)


def test_unfrozen_tower_trains_and_its_aux_loss_is_logged(make_config, tmp_path):
    config = make_config(tmp_path / "run", finetune={"tower": "full", "tower_lr": 1e-3})
    model = run(config)
    pretrained, finetuned = _weights(config.output / "pretrain" / "model"), _weights(model)
    assert any("vision_tower" in n and not torch.equal(pretrained[n], finetuned[n]) for n in finetuned)
    metrics = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    assert all("aux_loss" in m for m in metrics if m["stage"] == "finetune" and "loss" in m)


def test_routers_and_experts_train_apart_from_the_tower_at_their_own_rates(make_config, tmp_path, monkeypatch):
    rates = {}

    def watched(trainer, *rest):
        groups = trainer.create_optimizer().param_groups
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        rates.update({names[id(p)]: group["lr"] for group in groups for p in group["params"] if id(p) in names})
        trainer.optimizer = None

    monkeypatch.setattr(mllm.stages, "preflight", watched)
    stage = {"llm": "frozen", "projector": "frozen", "routers": "full", "experts": "full"}
    finetune = {**stage, "tower_lr": 1e-4, "router_lr": 1e-2}
    config = make_config(tmp_path / "run", finetune=finetune)
    model = run(config)
    pretrained, finetuned = _weights(config.output / "pretrain" / "model"), _weights(model)
    changed = {name for name in finetuned if not torch.equal(pretrained[name], finetuned[name])}
    assert changed
    assert all(".experts." in name or ".router." in name for name in changed)
    assert {rate for name, rate in rates.items() if ".router." in name} == {1e-2}
    assert {rate for name, rate in rates.items() if ".experts." in name} == {1e-4}
    counts = json.loads((config.output / "finetune" / "stage.json").read_text())["parameters"]
    assert {part: bool(count["trained"]) for part, count in counts.items()} == {
        "projector": False,
        "llm": False,
        "tower": False,
        "routers": True,
        "experts": True,
    }
    metrics = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    assert all("aux_loss" in m for m in metrics if m["stage"] == "finetune" and "loss" in m)


def test_routers_of_a_dense_tower_are_refused(make_config, tmp_path):
    config = make_config(tmp_path / "run", vision="scenes-clip", finetune={"enabled": False})
    config = replace(config, pretrain=replace(config.pretrain, routers="full"))
    with pytest.raises(ValueError, match="routers cannot train: the vision tower is dense"):
        run(config)


def test_pretrain_alone_leaves_a_model(make_config, tmp_path):
    config = make_config(tmp_path / "run", finetune={"enabled": False})
    assert (run(config) / "model.safetensors").is_file()


def test_folder_of_another_recipe_is_refused(make_config, tmp_path):
    config = make_config(tmp_path / "run", finetune={"enabled": False})
    run(config)
    with pytest.raises(ValueError, match="other settings of seed"):
        run(replace(config, seed=1))


def test_stage_without_data_is_an_error_that_says_what_to_give(make_config, tmp_path):
    config = make_config(tmp_path / "run")
    config = replace(config, pretrain=replace(config.pretrain, data=None))
    with pytest.raises(ValueError, match=r"stage pretrain names no data; give --pretrain\.data"):
        run(config)
