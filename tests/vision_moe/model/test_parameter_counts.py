"""Parameter counts of the published CLIP-MoE, ViT-L/14 with 4 experts and top-2, on the meta device."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from vision_moe.model import CLIPMoEConfig, CLIPMoEModel
from vision_moe.model.counts import count_parameters
from vision_moe.moe.router import Router

# The official checkpoint holds two text position tables of 248 rows, one for positions 0 to 19 and one for the rest.
# Each row that is used is used in one table only, so ours is a single table of 248 rows.
SECOND_POSITION_TABLE = 248 * 768


def l14_sizes(image_size):
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": image_size,
    }
    text = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "max_position_embeddings": 248,
    }
    return {"vision_config": vision, "text_config": text, "projection_dim": 768}


@pytest.fixture(scope="module")
def moe_l14():
    with torch.device("meta"):
        return CLIPMoEModel(CLIPMoEConfig(**l14_sizes(224)))


def test_total_is_the_published_one_less_the_second_position_table(moe_l14):
    assert count_parameters(moe_l14).total + SECOND_POSITION_TABLE == 1_202_429_441


def test_total_at_336_pixels():
    with torch.device("meta"):
        model = CLIPMoEModel(CLIPMoEConfig(**l14_sizes(336)))
    assert count_parameters(model).total + SECOND_POSITION_TABLE == 1_202_757_121


def test_activated_is_the_published_685_7_million_plus_routers_and_long_positions(moe_l14):
    """The published 685.7 M is the dense CLIP with its 77 text positions plus one more MLP per block. A token also
    passes the routers, and the position table has 171 more rows: 686.0 M, 0.69 B either way.
    """
    dense_with_77_positions, second_mlps = 427_616_513, 258_118_656
    published = dense_with_77_positions + second_mlps
    assert round(published / 1e6, 1) == 685.7
    assert count_parameters(moe_l14).activated == published + 135_168 + (248 - 77) * 768
    # Per tower, with its projection and without its routers.
    vision = count_parameters(moe_l14.vision_model).activated + 1024 * 768 - 98_304
    assert vision == 303_966_208 + 201_449_472


def test_routers_hold_135_168_parameters(moe_l14):
    assert sum(m.weight.numel() for m in moe_l14.modules() if isinstance(m, Router)) == 135_168


def test_a_dense_model_activates_all_of_its_parameters():
    with torch.device("meta"):
        dense = CLIPModel(CLIPConfig(**l14_sizes(224)))
    counts = count_parameters(dense)
    # The published dense count has the 77-row table of OpenAI's checkpoint.
    assert counts.total - (248 - 77) * 768 == 427_616_513
    assert counts.activated == counts.total
