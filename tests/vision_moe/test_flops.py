"""FLOPs against published arithmetic and against what torch counts while a model runs."""

import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vision_moe import flops
from vision_moe.flops import count, preset_config, text_flops, vision_flops
from vision_moe.model import CLIPMoEConfig, CLIPMoEModel


def gflops(name, layers=None, **fields):
    config = preset_config(name, layers, **fields)
    image = vision_flops(config.vision_config, config.projection_dim).blocks
    return image / 1e9, (image + text_flops(config.text_config, config.projection_dim).blocks) / 1e9


def test_dense_blocks_by_hand():
    # A block on S tokens of width D: 8 S D^2 for attention's four maps, 4 S^2 D for its products, 16 S D^2 for the MLP.
    vision = 12 * (24 * 197 * 768**2 + 4 * 197**2 * 768)
    text = 12 * (24 * 77 * 512**2 + 4 * 77**2 * 512)
    assert gflops("ViT-B-16") == pytest.approx((vision / 1e9, (vision + text) / 1e9), rel=1e-12)
    assert [round(value, 1) for value in gflops("ViT-B-16")] == [34.9, 40.9]
    assert [round(value, 1) for value in gflops("ViT-L-14")] == [161.7, 175.0]
    assert round(gflops("ViT-L-14-336")[0], 1) == 381.2


def test_clip_moe_l14_is_the_published_arithmetic():
    """All blocks, top 2 of 4: 265.2 and 613.6 GFLOPs per picture without routers."""
    for name, expected in (("ViT-L-14", 265.2), ("ViT-L-14-336", 613.6)):
        config = preset_config(name, "all").vision_config
        tower = vision_flops(config, 768)
        assert round((tower.blocks - tower.router) / 1e9, 1) == expected
        assert tower.router == 2 * 1024 * 4 * (1 + (config.image_size // 14) ** 2) * 24


@pytest.mark.parametrize(("layers", "expected", "share"), [("odd", 53.95, 30.8), ("all", 67.0, 38.3)])
def test_clip_up_b16_is_three_tenths_of_dense_l14(layers, expected, share):
    """CLIP-UP's abstract: B/16 at 30 % of the FLOPs of dense L/14, which two experts in half of the blocks give."""
    both = gflops("ViT-B-16", layers, num_experts=8)[1]
    config = preset_config("ViT-B-16", layers, num_experts=8)
    routers = vision_flops(config.vision_config, 512).router + text_flops(config.text_config, 512).router
    assert both - routers / 1e9 == pytest.approx(expected, abs=0.05)
    assert round(100 * both / gflops("ViT-L-14")[1], 1) == share


def test_capacity_below_one_scales_the_experts_only():
    dense, full = (preset_config("ViT-B-32", layers).vision_config for layers in (None, "all"))
    half = preset_config("ViT-B-32", "all", eval_capacity_factor=0.5).vision_config
    loose = preset_config("ViT-B-32", "all", eval_capacity_factor=2.0).vision_config
    mlp = [vision_flops(config, 512).mlp for config in (dense, half, full, loose)]
    # Half of two experts is one, as in the dense model; capacity beyond the choices costs nothing more.
    assert mlp == [mlp[0], mlp[0], 2 * mlp[0], 2 * mlp[0]]


@pytest.mark.parametrize(
    "fields",
    [
        {"moe_layers": []},
        {"moe_layers": [1]},
        {"num_experts_per_tok": 3, "expert_width_factor": 0.5, "shared_expert": True},
        {
            "router_type": "expert_choice",
            "capacity_factor": 2.0,
            "eval_capacity_factor": 2.0,
            "router_aux_loss_coef": 0.0,
        },
    ],
    ids=str,
)
def test_a_running_model_does_the_matrix_products_that_are_counted(clip_sizes, fields):
    sizes = {name: {**value, **fields} if isinstance(value, dict) else value for name, value in clip_sizes.items()}
    torch.manual_seed(0)
    model = CLIPMoEModel(CLIPMoEConfig(**sizes)).eval()
    model.set_attn_implementation("eager")
    # torch's counter does not look into an operator that is not its own.
    model.set_experts_implementation("eager")
    row = count("tiny", model.config)
    # 12 tokens of 4 experts: expert choice at factor 2 takes a whole 6 for each.
    ids = torch.full((1, 12), 5)
    ids[0, -1] = 98
    for run, expected in (
        (lambda: model.get_image_features(pixel_values=torch.zeros(1, 3, 32, 32)), row.image),
        (lambda: model.get_text_features(input_ids=ids), row.text),
    ):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        # 17 image tokens do not divide by 2: expert choice rounds the places of each expert up.
        rounding = 1.0 if fields.get("router_type") is None else 18 / 17
        assert expected.blocks > 0
        assert sum(expected) <= counter.get_total_flops() <= rounding * sum(expected)


def test_the_command_prints_a_table_and_writes_the_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["flops", "--presets", "[ViT-B-16]", "--output", str(tmp_path / "flops.json")])
    flops.main()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("|")[-2].strip() for line in printed[2:5]] == ["23.3", "30.8", "38.3"]
    assert printed[6].endswith("a multiply-add counts as 2 FLOPs.")
    written = json.loads((tmp_path / "flops.json").read_text())
    assert [row["moe"] for row in written["rows"]] == ["", "top 2 of 8 in odd blocks", "top 2 of 8 in all blocks"]
    assert written["rows"][0]["parameters"] == 149_620_737
    assert written["reference"]["image"]["blocks"] == 24 * (24 * 257 * 1024**2 + 4 * 257**2 * 1024)
