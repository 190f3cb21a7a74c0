"""The routing fields of a CLIP-MoE's config: what the model returns, files, checkpointing, refusals."""

import pytest
import torch

from vision_moe.model import CLIPMoEModel
from vision_moe.model.counts import count_parameters
from vision_moe.moe.router import Router

CAPPED = {"capacity_factor": 0.7, "eval_capacity_factor": 0.6, "batch_priority": True}
EXPERT_CHOICE = {
    "router_type": "expert_choice",
    "capacity_factor": 1.0,
    "eval_capacity_factor": 1.5,
    "router_aux_loss_coef": 0.0,
}
DENSE_PARTS = {
    "shared_expert": True,
    "expert_width_factor": 0.5,
    "scoring_func": "sigmoid",
    "router_bias_update_rate": 0.01,
    "router_bias_update": "z_score",
}


def test_each_tower_returns_its_counts_per_block(make_moe, clip_batch):
    """Two blocks a tower: 3 pictures of 17 tokens, 23 valid text tokens, 2 choices each."""
    out = make_moe()(**clip_batch, output_router_logits=True)
    for tower, num_tokens in ((out.vision_model_output, 3 * 17), (out.text_model_output, 23)):
        assert tower.tokens_per_expert.shape == (2, 4)
        assert tower.tokens_per_expert.sum(dim=1).tolist() == [2 * num_tokens] * 2
        assert tower.dropped_fraction.tolist() == [0.0, 0.0]
    plain = make_moe()(**clip_batch)
    assert plain.vision_model_output.tokens_per_expert is plain.vision_model_output.dropped_fraction is None


def test_dropped_fraction_follows_each_towers_capacity(make_moe, clip_batch):
    """A capacity factor of 0.6 has at most 4 * ceil(0.6 * T * 2 / 4) places for 2T choices."""
    out = make_moe(**CAPPED)(**clip_batch, output_router_logits=True)
    for tower, num_tokens, places in ((out.vision_model_output, 51, 4 * 16), (out.text_model_output, 23, 4 * 7)):
        assert (tower.dropped_fraction >= 1 - places / (2 * num_tokens) - 1e-6).all()
        assert (tower.dropped_fraction < 1).all()
        assert tower.tokens_per_expert.sum(dim=1).tolist() == [2 * num_tokens] * 2


def test_a_dense_tower_returns_no_counts(make_moe, clip_batch):
    tower = make_moe(moe_layers=[]).train()(**clip_batch).vision_model_output
    assert tower.tokens_per_expert is tower.dropped_fraction is None


@pytest.mark.parametrize("fields", [CAPPED, EXPERT_CHOICE, DENSE_PARTS], ids=["capped", "expert choice", "parts"])
def test_fields_and_bias_survive_a_round_trip_bit_for_bit(make_moe, clip_batch, tmp_path, fields):
    moe = make_moe(**fields)
    for router in (module for module in moe.modules() if isinstance(module, Router) and module.choice_bias is not None):
        router.choice_bias.copy_(torch.randn(4))
    moe.save_pretrained(tmp_path)
    again = CLIPMoEModel.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in moe.state_dict().items())
    assert torch.equal(again(**clip_batch).logits_per_image, moe(**clip_batch).logits_per_image)
    for name, value in fields.items():
        assert getattr(again.config.text_config, name) == value


def test_choice_bias_is_loaded_in_float32_into_a_bfloat16_model(make_moe, tmp_path):
    moe = make_moe(router_bias_update_rate=0.01)
    name = "vision_model.encoder.layers.1.mlp.router.choice_bias"
    moe.state_dict()[name].copy_(torch.tensor([0.1234567, 0.0, 1.0, -3e-5]))
    moe.save_pretrained(tmp_path)
    again = CLIPMoEModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.vision_model.encoder.layers[1].mlp.router.weight.dtype == torch.bfloat16
    assert again.state_dict()[name].dtype == torch.float32
    assert torch.equal(again.state_dict()[name], moe.state_dict()[name])


def test_new_parts_are_initialized_as_the_experts_are(clip_sizes):
    sizes = {**clip_sizes, "vision_config": {**clip_sizes["vision_config"], **DENSE_PARTS}}
    sizes["vision_config"].update(hidden_size=64, intermediate_size=512)
    mlp = CLIPMoEModel(CLIPMoEModel.config_class(**sizes)).vision_model.encoder.layers[0].mlp
    assert mlp.shared_expert.up_proj.shape == mlp.experts.up_proj[0].shape == (256, 64)
    assert mlp.shared_expert.up_proj.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert mlp.shared_expert.down_proj.std().item() == pytest.approx(64**-0.5 * 4**-0.5, rel=0.05)
    assert mlp.shared_expert.down_proj_bias.abs().max() == mlp.router.choice_bias.abs().max() == 0


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("fields", [CAPPED, EXPERT_CHOICE], ids=["capped", "expert choice"])
def test_gradient_checkpointing_changes_neither_counts_nor_gradients(make_moe, clip_batch, use_reentrant, fields):
    results = []
    for checkpointing in (False, True):
        moe = make_moe(**fields, shared_expert=True).train()
        if checkpointing:
            moe.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            moe.vision_model.embeddings.register_forward_hook(lambda m, a, output: output.requires_grad_())
        out = moe(**clip_batch, return_loss=True)
        out.loss.backward()
        towers = (out.vision_model_output, out.text_model_output)
        counts = [tensor for tower in towers for tensor in (tower.tokens_per_expert, tower.dropped_fraction)]
        assert not any(tensor.requires_grad for tensor in counts)
        results.append([out.loss, *counts, *(parameter.grad for parameter in moe.parameters())])
    for mine, truth in zip(*results, strict=True):
        torch.testing.assert_close(mine, truth)


def test_activated_parameters_count_the_shared_expert_and_the_mean_of_expert_choice(make_moe):
    """An expert of width 24 has 2 * 24 * 32 + 24 + 32 = 1592 parameters; 4 blocks of 4 experts and a shared one."""
    dense = count_parameters(make_moe(moe_layers=[])).total - 4 * (2 * 48 * 32 + 48 + 32)
    router = 4 * 32
    chosen = count_parameters(make_moe(**EXPERT_CHOICE, shared_expert=True, expert_width_factor=0.5))
    assert chosen.total == dense + 4 * (5 * 1592 + router)
    assert chosen.activated == dense + 4 * (1592 + 1.5 * 1592 + router)
    token = count_parameters(make_moe(shared_expert=True, expert_width_factor=0.5))
    assert token.activated == dense + 4 * (1592 + 2 * 1592 + router)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_type": "hash"}, "router_type must be one of token_choice, expert_choice, but got 'hash'"),
        ({"scoring_func": "tanh"}, "scoring_func must be one of softmax, sigmoid, but got 'tanh'"),
        ({"router_bias_update": "linear"}, "router_bias_update must be one of sign, z_score"),
        ({"capacity_factor": 0.0}, "capacity_factor must be positive, but got 0.0"),
        ({"capacity_factor": 1.0, "capacity_group_size": 0}, "capacity_group_size must be positive, but got 0"),
        ({"router_bias_update_rate": -0.1}, "router_bias_update_rate must not be negative, but got -0.1"),
        ({"expert_width_factor": 0.3}, r"must be a whole number, but got 0\.3 \* 48"),
        ({"batch_priority": True}, "set capacity_factor as well"),
        ({"scoring_func": "sigmoid", "router_z_loss_coef": 0.1}, "router_z_loss_coef are defined for"),
        ({**EXPERT_CHOICE, "eval_capacity_factor": None}, r"on average, but got 1\.0 and None"),
        ({**EXPERT_CHOICE, "router_aux_loss_coef": 0.01}, "switch off router_aux_loss_coef"),
        ({**EXPERT_CHOICE, "router_bias_update_rate": 0.1}, "switch off router_bias_update_rate"),
    ],
)
def test_impossible_routing_is_refused(make_moe, fields, message):
    with pytest.raises(Exception, match=message):
        make_moe(**fields)
