"""set_trainable: exactly the named part, nothing else."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from vision_moe.freeze import set_trainable
from vision_moe.upcycle import upcycle

L14 = {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "projection_dim": 768,
}


def trainable_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_mcl_trains_the_258_118_656_ffn_parameters_of_clip_l14():
    with torch.device("meta"):
        dense = CLIPModel(CLIPConfig(**L14))
    assert set_trainable(dense, "ffn")["trainable"] == 201_449_472 + 56_669_184 == 258_118_656


def test_ffn_of_a_mixture_is_its_experts_and_dense_mlps(make_dense_clip):
    moe = upcycle(make_dense_clip(0), layers="odd", shared_expert=True)
    counts = set_trainable(moe, "ffn")
    names = trainable_names(moe)
    assert names == {n for n in moe.state_dict() if ".mlp." in n and "router" not in n}
    assert any(".layers.0.mlp.fc1." in name for name in names)
    assert any(".layers.1.mlp.experts." in name for name in names)
    assert counts["trainable"] == sum(p.numel() for p in moe.parameters() if p.requires_grad)
    assert sum(counts.values()) == sum(p.numel() for p in moe.parameters())


def test_router_and_projections(make_dense_clip):
    moe = upcycle(make_dense_clip(0))
    set_trainable(moe, "router")
    assert trainable_names(moe) == {n for n in moe.state_dict() if n.endswith("mlp.router.weight")}
    assert set_trainable(moe, "projections") == {"trainable": 2 * 32 * 16, "frozen": moe.num_parameters() - 1024}
    assert trainable_names(moe) == {"visual_projection.weight", "text_projection.weight"}
    assert set_trainable(moe, "all")["frozen"] == 0


def test_a_missing_or_unknown_part_is_refused(make_dense_clip):
    with pytest.raises(ValueError, match="CLIPModel has no parameters in part 'router'"):
        set_trainable(make_dense_clip(0), "router")
    with pytest.raises(ValueError, match="unknown part 'mlp'; choose one of: all, text, ffn, router, projections"):
        set_trainable(make_dense_clip(0), "mlp")


def test_text_is_everything_but_the_image_tower(make_dense_clip):
    model = make_dense_clip(0)
    counts = set_trainable(model, "text")
    assert not any(parameter.requires_grad for parameter in model.vision_model.parameters())
    frozen = sum(parameter.numel() for parameter in model.vision_model.parameters())
    assert counts == {"trainable": sum(p.numel() for p in model.parameters()) - frozen, "frozen": frozen}
    assert model.logit_scale.requires_grad


@pytest.mark.parametrize("part", ["router", "ffn"])
def test_blocks_below_the_first_that_trains_have_no_graph(make_dense_clip, clip_batch, part):
    """Neither do they keep anything for a backward pass, nor does one reach them."""
    moe = upcycle(make_dense_clip(0), layers=1).train()
    set_trainable(moe, part)
    if part == "ffn":
        for tower in (moe.vision_model, moe.text_model):
            tower.encoder.layers[0].requires_grad_(False)
    has_graph = []
    for tower in (moe.vision_model, moe.text_model):
        for block in tower.encoder.layers:
            block.register_forward_hook(lambda module, inputs, output: has_graph.append(output[0].requires_grad))
    moe(**clip_batch)
    assert sorted(has_graph) == [False, False, True, True]
