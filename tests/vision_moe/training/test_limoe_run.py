"""The LIMoE recipe: two steps, what they leave, the control."""

import json

import pytest
from transformers import AutoModel, AutoProcessor

from vision_moe.config import parse
from vision_moe.recipe import TrainConfig
from vision_moe.train import run


@pytest.fixture
def limoe_run(small_scenes, recipes, tmp_path):
    """Runs two steps of the recipe with further flags; gives the run's folder and the model folders."""

    def two_steps(*flags):
        output = tmp_path / "run"
        data = ["--data.train", str(small_scenes), "--output", str(output)]
        recipe = [str(recipes / "scenes_limoe.yaml"), "--smoke", *data, *flags]
        return output, run(parse(TrainConfig, recipe, smoke=recipes / "smoke.yaml"))

    return two_steps


def test_the_recipe_trains_a_limoe_from_nothing_and_reports_experts_by_modality(limoe_run):
    output, models = limoe_run()
    assert set(models) == {"limoe"}
    model = AutoModel.from_pretrained(models["limoe"])
    assert model.config.model_type == "limoe"
    assert model.config.moe_block_indices == (1,)
    assert (model.config.image_size, model.config.max_position_embeddings) == (32, 77)
    assert model.config.text_loss_weights.local_entropy == 0.04
    tokenizer = AutoProcessor.from_pretrained(models["limoe"]).tokenizer
    assert model.config.eos_token_id == tokenizer.eos_token_id
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in logged if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2]
    for modality in ("image", "text"):
        for name in ("routing_entropy", "gate_entropy", "experts_used", "dropped_fraction"):
            assert all(entry[f"{modality}/{name}"] == entry[f"{modality}/layer1/{name}"] for entry in steps)
        assert all(1.0 <= entry[f"{modality}/experts_used"] <= 8.001 for entry in steps)
    row = json.loads((output / "results.json").read_text())["models"]["limoe"]
    assert row["retrieval"]["num_images"] == 24
    assert row["routing"]["towers"]["vision"]["num_tokens"] == 24 * 16
    report = (output / "report.md").read_text()
    assert "| LIMoE (one tower, from nothing) |" in report
    assert "| 1 | image |" in report
    assert "| 1 | text |" in report


def test_the_control_differs_in_the_entropy_losses_alone(limoe_run):
    _, models = limoe_run("--limoe_tower.entropy_losses", "false")
    config = AutoModel.from_pretrained(models["limoe"]).config
    for weights in (config.aux_loss_weights, config.image_loss_weights, config.text_loss_weights):
        assert weights.local_entropy == weights.global_entropy == 0.0
    assert config.aux_loss_weights.importance == config.aux_loss_weights.load == 0.005


def test_a_limoe_stands_beside_a_dense_start_in_one_report(limoe_run):
    output, models = limoe_run("--methods", "[dense,limoe]")
    assert list(models) == ["dense", "limoe"]
    rows = json.loads((output / "results.json").read_text())["models"]
    assert "routing" not in rows["dense"]
    assert "routing" in rows["limoe"]
