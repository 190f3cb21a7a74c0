"""Upcycling and merging: what the new model computes and holds."""

import logging

import pytest
import torch

from vision_moe.mixture_config import resolve_layers
from vision_moe.model import CLIPMoEConfig, CLIPMoEModel
from vision_moe.moe.experts import Experts
from vision_moe.upcycle import expert_as_dense, merge_donors, upcycle

FC_OF_EXPERTS = {
    "up_proj": "fc1.weight",
    "up_proj_bias": "fc1.bias",
    "down_proj": "fc2.weight",
    "down_proj_bias": "fc2.bias",
}


@pytest.fixture
def donors(make_dense_clip):
    """Three models that differ from the base of seed 0 in their MLPs only."""
    models = [make_dense_clip(0) for _ in range(3)]
    torch.manual_seed(1)
    for model in models:
        for name, parameter in model.named_parameters():
            if ".mlp." in name:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return models


@pytest.mark.parametrize("layers", ["all", "odd", 1, [0]], ids=str)
@pytest.mark.parametrize("towers", [("vision", "text"), ("vision",), ("text",)], ids="+".join)
def test_upcycled_model_computes_what_its_parent_does(make_dense_clip, clip_batch, layers, towers):
    """For any router: the experts are equal and the gates sum to 1."""
    dense = make_dense_clip(0)
    moe = upcycle(dense, layers=layers, towers=towers, router_std=3.0)
    expected, actual = dense(**clip_batch), moe(**clip_batch)
    for name in ("image_embeds", "text_embeds", "logits_per_image"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"shared_expert": True},
        {"shared_expert": True, "scoring_func": "sigmoid", "num_experts_per_tok": 1},
        {"expert_width_factor": 0.5},
        {"expert_width_factor": 0.25, "num_experts": 12, "num_experts_per_tok": 8, "scoring_func": "sigmoid"},
        {"expert_width_factor": 1 / 3, "num_experts": 6, "num_experts_per_tok": 3, "router_bias_update_rate": 0.1},
        {"eval_capacity_factor": 4.0, "batch_priority": True},
        {
            "router_type": "expert_choice",
            "capacity_factor": 2.0,
            "eval_capacity_factor": 4.0,
            "router_aux_loss_coef": 0.0,
            "expert_width_factor": 0.5,
        },
    ],
    ids=str,
)
def test_upcycled_model_computes_what_its_parent_does_with_every_kind_of_routing(make_dense_clip, clip_batch, fields):
    """Where no token is dropped: the capacity factors are the number of experts over that of choices, or above."""
    dense = make_dense_clip(0)
    moe = upcycle(dense, router_std=1.0, **fields)
    with torch.no_grad():
        expected, actual = dense(**clip_batch), moe(**clip_batch)
    for name in ("image_embeds", "text_embeds", "logits_per_image"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [("every_1", 3, [0, 1, 2]), ("every_2", 4, [1, 3]), ("every_3", 7, [2, 5]), ("odd", 5, [1, 3]), ("every_9", 4, [])],
)
def test_every_nth_block_is_counted_as_v_moe_does(layers, depth, expected):
    assert resolve_layers(layers, depth) == expected


def test_each_tower_can_have_its_own_layers(make_dense_clip):
    moe = upcycle(make_dense_clip(0), layers={"vision": "odd", "text": "all"})
    assert (moe.config.vision_config.moe_layers, moe.config.text_config.moe_layers) == ([1], [0, 1])
    with pytest.raises(ValueError, match="but lacks text"):
        upcycle(make_dense_clip(0), layers={"vision": "odd"})


def test_merged_donors_take_routing_fields_and_refuse_narrow_experts(make_dense_clip, donors):
    moe = merge_donors(make_dense_clip(0), donors, capacity_factor=1.5, router_z_loss_coef=1e-3)
    for tower in (moe.config.vision_config, moe.config.text_config):
        assert (tower.capacity_factor, tower.router_z_loss_coef) == (1.5, 1e-3)
    assert moe.vision_model.encoder.layers[0].mlp.capacity_factor == 1.5
    with pytest.raises(ValueError, match=r"one whole expert, but got expert_width_factor=0\.5"):
        merge_donors(make_dense_clip(0), donors, expert_width_factor=0.5)


@pytest.mark.parametrize(
    ("layers", "moe_layers"), [("all", [0, 1]), ("odd", [1]), (1, [1]), (9, [0, 1]), ([1, 0], [0, 1])], ids=str
)
def test_layers_choose_the_blocks(make_dense_clip, layers, moe_layers):
    moe = upcycle(make_dense_clip(0), layers=layers, towers=("text",))
    assert moe.config.text_config.moe_layers == moe_layers
    assert moe.config.vision_config.moe_layers == []
    mixtures = [i for i, layer in enumerate(moe.text_model.encoder.layers) if hasattr(layer.mlp, "experts")]
    assert mixtures == moe_layers


def test_merged_experts_are_the_donors_mlps_and_all_else_is_the_base_bit_for_bit(make_dense_clip, donors):
    base = make_dense_clip(0)
    moe = merge_donors(base, donors)
    sources = [model.state_dict() for model in (base, *donors)]
    seen = 0
    for path, module in moe.named_modules():
        if isinstance(module, Experts):
            for name, parameter in module.named_parameters():
                for expert, state in enumerate(sources):
                    dense_name = path.replace(".experts", f".{FC_OF_EXPERTS[name]}")
                    assert torch.equal(parameter[expert], state[dense_name])
                    seen += 1
    assert seen == 4 * 4 * 4
    rest = {name: tensor for name, tensor in moe.state_dict().items() if ".mlp." not in name}
    assert rest.keys() == {name for name in sources[0] if ".mlp." not in name}
    assert all(torch.equal(tensor, sources[0][name]) for name, tensor in rest.items())


def test_each_expert_can_be_taken_out_as_the_dense_model_it_came_from(make_dense_clip, donors, clip_batch):
    base = make_dense_clip(0)
    moe = merge_donors(base, donors)
    for expert, source in enumerate((base, *donors)):
        dense = expert_as_dense(moe, expert)
        assert type(dense) is type(source)
        assert dense.state_dict().keys() == source.state_dict().keys()
        assert torch.equal(dense(**clip_batch).logits_per_image, source(**clip_batch).logits_per_image)


def test_a_dense_copy_carries_no_field_of_the_mixture(make_dense_clip):
    base = make_dense_clip(0)
    config = expert_as_dense(upcycle(base), 0).config.vision_config
    ours, theirs = config.to_dict(), base.config.vision_config.to_dict()
    assert {**ours, "dtype": None} == {**theirs, "dtype": None}


def test_the_new_model_shares_no_memory_with_its_parent(make_dense_clip):
    dense = make_dense_clip(0)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    moe = upcycle(dense)
    copy = expert_as_dense(moe, 0)
    for parameter in moe.parameters():
        parameter.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in copy.state_dict().items())


def test_router_weights_follow_seed_and_std(make_dense_clip):
    dense = make_dense_clip(0)

    def routers(**kwargs):
        state = upcycle(dense, **kwargs).state_dict()
        return torch.stack([tensor for name, tensor in state.items() if "router" in name])

    torch.manual_seed(7)
    first = routers(seed=3)
    torch.manual_seed(8)
    assert torch.equal(first, routers(seed=3))
    assert not torch.equal(first, routers(seed=4))
    assert first.std().item() == pytest.approx(0.02, rel=0.15)
    assert routers(router_std=0.5).std().item() == pytest.approx(0.5, rel=0.15)


def test_dtype_and_mode_are_the_parents(make_dense_clip):
    moe = upcycle(make_dense_clip(0).to(torch.bfloat16).train())
    assert {parameter.dtype for parameter in moe.parameters()} == {torch.bfloat16}
    assert moe.training
    # A non-persistent buffer: rebuilt, and not cast or left over from the meta device.
    assert torch.equal(moe.text_model.embeddings.position_ids, torch.arange(12)[None])


def test_upcycled_model_survives_a_round_trip_through_its_folder(make_dense_clip, clip_batch, tmp_path):
    moe = upcycle(make_dense_clip(0), num_experts=3, num_experts_per_tok=1, layers="odd")
    moe.save_pretrained(tmp_path)
    again = type(moe).from_pretrained(tmp_path)
    assert again.config.to_diff_dict() == {**moe.config.to_diff_dict(), "architectures": ["CLIPMoEModel"]}
    assert again.config.vision_config.moe_layers == [1]
    assert torch.equal(again(**clip_batch).logits_per_image, moe(**clip_batch).logits_per_image)


def test_weights_of_a_donor_that_the_mixture_drops_are_reported(make_dense_clip, caplog):
    base, donor = make_dense_clip(0), make_dense_clip(0)
    with caplog.at_level(logging.WARNING):
        merge_donors(base, [donor])
        assert not caplog.records
        donor.visual_projection.weight.data.add_(1.0)
        merge_donors(base, [donor])
    assert "donor 1 differs from the base in 1 tensors" in caplog.text
    assert "visual_projection.weight" in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layers": "even"}, "layers must be 'all', 'odd', 'every_n', an int or a list of ints, but got 'even'"),
        ({"layers": 0}, "must be at least 1, but got 0"),
        ({"layers": [2]}, r"layers must be distinct and in \[0, 2\) for a tower of 2 blocks, but got \[2\]"),
        ({"towers": ("image",)}, "towers must be one or both of vision, text"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, r"num_experts_per_tok must be in \[1, 2\], but got 3"),
        ({"num_experts": 0}, "num_experts must be at least 1"),
        ({"norm_topk_prob": False}, "upcycling needs gates that sum to 1"),
        ({"expert_width_factor": 0.75}, r"must be 1 / a whole number, but got 0\.75"),
        ({"expert_width_factor": 0.5, "shared_expert": True}, "with a shared expert or narrow experts, not with both"),
        (
            {"expert_width_factor": 0.5, "num_experts_per_tok": 3},
            "must be multiples of 2, a whole MLP, but got 4 and 3",
        ),
        ({"expert_width": 0.5}, "unknown fields expert_width; choose among balance_top_k"),
    ],
)
def test_impossible_requests_are_refused(make_dense_clip, kwargs, message):
    with pytest.raises(ValueError, match=message):
        upcycle(make_dense_clip(0), **kwargs)


def test_a_mixture_or_a_donor_of_another_shape_is_refused(make_dense_clip):
    base = make_dense_clip(0)
    with pytest.raises(ValueError, match="but got CLIPMoEModel"):
        upcycle(upcycle(base))
    wide = make_dense_clip(0)
    wide.visual_projection = torch.nn.Linear(32, 17, bias=False)
    with pytest.raises(ValueError, match=r"first at visual_projection\.weight"):
        merge_donors(base, [wide])
    with pytest.raises(ValueError, match="at least one donor"):
        merge_donors(base, [])
    with pytest.raises(ValueError, match=r"expert must be in \[0, 4\), but got 4"):
        expert_as_dense(upcycle(base), 4)
    with pytest.raises(ValueError, match="an expert is a whole MLP only without a shared expert"):
        expert_as_dense(upcycle(base, shared_expert=True), 0)


def test_a_clip_moe_without_experts_is_a_dense_start(clip_sizes, clip_batch):
    torch.manual_seed(0)
    vision = {**clip_sizes["vision_config"], "moe_layers": [], "pre_layernorm": False}
    config = CLIPMoEConfig(
        **{**clip_sizes, "vision_config": vision, "text_config": {**clip_sizes["text_config"], "moe_layers": []}}
    )
    dense = CLIPMoEModel(config).eval()
    moe = upcycle(dense)
    assert moe.config.vision_config.moe_block_indices
    assert not moe.config.vision_config.pre_layernorm
    with torch.no_grad():
        torch.testing.assert_close(moe(**clip_batch).logits_per_image, dense(**clip_batch).logits_per_image)
