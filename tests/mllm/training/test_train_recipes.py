"""Recipes of the LLaVA trainer: all of them parse, and what a user can get wrong is said clearly."""

import json
from pathlib import Path

import pytest

import mllm.recipe
from mllm.deepspeed_setup import PACKAGED, deepspeed_config, zero_stage
from mllm.recipe import LlavaConfig, enabled_stages
from mllm.stage_recipe import StageConfig
from vision_moe.config import parse, to_dict, write_yaml

_RECIPES = Path(mllm.recipe.__file__).parent / "recipes"
_LLAVA = sorted(path.name for path in _RECIPES.glob("*.yaml") if path.name not in ("smoke.yaml", "scenes_lm.yaml"))


@pytest.mark.parametrize("name", _LLAVA)
def test_recipe_parses_and_reads_back_equal(name, tmp_path):
    config = parse(LlavaConfig, [str(_RECIPES / name), "--output", str(tmp_path)])
    write_yaml(config, tmp_path / "config.yaml")
    assert parse(LlavaConfig, [str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize("name", _LLAVA)
def test_smoke_makes_two_steps_per_stage_of_any_recipe_with_packaged_parts(name, tmp_path):
    config = parse(
        LlavaConfig, [str(_RECIPES / name), "--smoke", "--output", str(tmp_path)], smoke=_RECIPES / "smoke.yaml"
    )
    assert (config.vision, config.llm) == ("scenes-clip", "scenes-llama")
    for _, stage in enabled_stages(config):
        assert stage.samples == 2 * stage.global_batch_size
        assert stage.data is None


_FULL = {"llm": "full", "llm_lr": 2e-5, "quantization": None}
_LORA = {"llm": "lora", "llm_lr": 2e-4, "lora": {"r": 128, "alpha": 256, "dropout": 0.05}, "quantization": None}


@pytest.mark.parametrize(
    ("name", "llm", "llm_tuning"),
    [
        ("llava15_7b", "lmsys/vicuna-7b-v1.5", _FULL),
        ("llava15_13b", "lmsys/vicuna-13b-v1.5", _FULL),
        ("llava15_7b_lora", "lmsys/vicuna-7b-v1.5", _LORA),
        ("llava15_7b_qlora", "lmsys/vicuna-7b-v1.5", {**_LORA, "quantization": "4bit"}),
    ],
)
def test_llava15_recipes_have_the_published_hyper_parameters(tmp_path, name, llm, llm_tuning):
    config = parse(LlavaConfig, [str(_RECIPES / f"{name}.yaml"), "--output", str(tmp_path)])
    assert config.llm == llm
    pretrain, finetune = to_dict(config.pretrain), to_dict(config.finetune)
    common = {"epochs": 1.0, "warmup": 0.03, "schedule": "cosine", "weight_decay": 0.0, "tower": "frozen"}
    published = {"template": "plain", "llm": "frozen", "projector_lr": 1e-3, "global_batch_size": 256}
    assert {name: pretrain[name] for name in common | published} == common | published
    published = {**llm_tuning, "projector_lr": 2e-5, "global_batch_size": 128, "group_by_modality_length": True}
    assert {name: finetune[name] for name in common | published} == common | published
    assert (config.select_layer, config.max_length, config.image_aspect_ratio) == (-2, 2048, "pad")


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 8), (2, 4), (8, 1)])
def test_accumulation_follows_from_the_global_batch(world_size, accumulation):
    assert StageConfig(global_batch_size=128, per_device_batch_size=16).accumulation(world_size) == accumulation


def test_global_batch_that_does_not_divide_is_refused_with_the_numbers():
    stage = StageConfig(global_batch_size=128, per_device_batch_size=16)
    with pytest.raises(ValueError, match="16 x 3 = 48, but got 128"):
        stage.accumulation(3)


def test_stage_that_trains_nothing_is_refused():
    with pytest.raises(ValueError, match="all frozen"):
        StageConfig(projector="frozen")


def test_run_without_stages_is_refused(tmp_path):
    off = StageConfig(enabled=False)
    with pytest.raises(ValueError, match="both stages are disabled"):
        LlavaConfig(output=tmp_path, pretrain=off, finetune=off)


def test_unknown_deepspeed_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be zero2, .*none or an existing JSON file, but got 'zero4'"):
        LlavaConfig(output=tmp_path, deepspeed="zero4")


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_deepspeed_json_has_its_stage_and_leaves_scheduler_and_optimizer_to_the_recipe(name):
    path = deepspeed_config(name)
    assert path is not None
    settings = json.loads(Path(path).read_text())
    assert settings["zero_optimization"]["stage"] == zero_stage(name) == int(name[4])
    assert ("offload_optimizer" in settings["zero_optimization"]) is name.endswith("_offload")
    assert not {"scheduler", "optimizer"} & settings.keys()
    assert deepspeed_config("none") is None
