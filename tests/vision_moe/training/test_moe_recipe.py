"""The recipe's mixture: every routing field of the model can be set, and reaches it."""

import dataclasses

import pytest
from transformers import CLIPProcessor

from vision_moe.config import parse, to_dict
from vision_moe.data.captions import open_captions
from vision_moe.data.collate import CaptionCollator
from vision_moe.mixture import batches, init_routers
from vision_moe.model.configuration import MoEFields
from vision_moe.moe_recipe import MoEConfig, RoutingConfig
from vision_moe.recipe import TrainConfig
from vision_moe.router_init import router_from_centroids
from vision_moe.scratch import build_clip
from vision_moe.stages import StageRunner
from vision_moe.training_data import TrainingData
from vision_moe.upcycle import upcycle


def names(cls):
    return {field.name for field in dataclasses.fields(cls)}


def test_the_recipe_has_every_routing_field_of_the_model():
    built_otherwise = {"num_experts", "num_experts_per_tok", "moe_layers", "output_router_logits"}
    assert names(RoutingConfig) == names(MoEFields) - built_otherwise


def test_a_field_that_is_not_set_is_left_to_the_model():
    assert MoEConfig().model_fields == {}
    fields = {"capacity_factor": 1.5, "router_aux_loss_coef": 0.0, "batch_priority": True}
    assert MoEConfig(**fields, router_std=1.0, layers=2).model_fields == fields


def test_a_misspelt_field_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--output", "x", "--data.train", "y", "--moe.capacity", "2"])
    assert "moe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "vision", "text"),
    [
        (["--moe.layers", "odd"], "odd", "odd"),
        (["--moe.layers", "4"], 4, 4),
        (["--moe.layers", "[0, 2]", "--moe.text_layers", "every_3"], [0, 2], "every_3"),
    ],
)
def test_layers_keep_their_kind_through_flags_and_yaml(flags, vision, text, tmp_path):
    config = parse(TrainConfig, ["--output", "x", "--data.train", "y", *flags])
    assert config.moe.tower_layers == {"vision": vision, "text": text}
    assert to_dict(config)["moe"]["layers"] == vision


@pytest.fixture
def runner(small_scenes, recipes, tmp_path) -> StageRunner:
    recipe = [str(recipes / "scenes.yaml"), str(recipes / "smoke.yaml")]
    data = ["--data.train", str(small_scenes), "--output", str(tmp_path)]
    config = parse(TrainConfig, [*recipe, *data])
    dataset = open_captions(small_scenes, split="train", caption_field="long", seed=0)
    _, processor = build_clip(config.scratch, (text for i in range(8) for text in dataset.captions(i)), 0)
    assert isinstance(processor, CLIPProcessor)
    return StageRunner(config, TrainingData(config), processor)


def test_routers_start_from_clusters_where_the_recipe_says_so(runner):
    captions = (text for i in range(8) for text in runner.dataset.captions(i))
    dense, _ = build_clip(runner.config.scratch, captions, 0)
    moe = upcycle(dense, num_experts=4)
    before = moe.vision_model.encoder.layers[0].mlp.router.weight.detach().clone()
    assert init_routers(runner, MoEConfig(), moe).vision_model.encoder.layers[0].mlp.router.weight.equal(before)
    init_routers(runner, MoEConfig(router_init="centroids"), moe)
    found = moe.vision_model.encoder.layers[0].mlp.router.weight
    assert found.norm(dim=-1).tolist() == pytest.approx([1.0] * 4)
    # Again, from the same batches by hand: what each rank of a run does.
    other = upcycle(dense, num_experts=4)
    router_from_centroids(other, batches(runner, found.device, CaptionCollator(runner.processor)), seed=0)
    assert other.vision_model.encoder.layers[0].mlp.router.weight.equal(found)
