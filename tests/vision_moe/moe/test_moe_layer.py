"""MoEMLP: padding, identical experts, gradients to the router, capacity, expert choice, the shared expert."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vision_moe.moe.layer import MoEMLP
from vision_moe.testing import assert_close


@pytest.fixture
def make_layer():
    """Makes a seeded mixture of 4 experts, top 2; the fields are the config's."""

    def make(**fields):
        config = {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "expert_dim": 48,
            "hidden_act": "quick_gelu",
            "norm_topk_prob": True,
            "router_noise_std": 0.0,
            "router_type": "token_choice",
            "scoring_func": "softmax",
            "capacity_factor": None,
            "eval_capacity_factor": None,
            "capacity_group_size": None,
            "batch_priority": False,
            "router_bias_update_rate": None,
            "shared_expert": False,
            "_experts_implementation": "eager",
        }
        torch.manual_seed(0)
        module = MoEMLP(SimpleNamespace(**{**config, **fields}))
        nn.init.normal_(module.experts.down_proj_bias)
        return module

    return make


@pytest.fixture
def layer(make_layer):
    return make_layer()


def test_padding_is_zero_and_changes_nothing_else(layer):
    mask_BS = torch.tensor([[True, True, False], [False, True, True]])
    x_BSD = torch.randn(2, 3, 32)
    other_BSD = torch.where(mask_BS[..., None], x_BSD, torch.full_like(x_BSD, 1e4))
    out, other = layer(x_BSD, mask_BS), layer(other_BSD, mask_BS)
    assert torch.equal(out.hidden_states_BSD, other.hidden_states_BSD)
    assert torch.equal(out.router_logits_BSE, other.router_logits_BSE)
    assert out.hidden_states_BSD[~mask_BS].abs().max() == 0
    assert out.router_logits_BSE[~mask_BS].abs().max() == 0
    unmasked = layer(x_BSD)
    torch.testing.assert_close(out.hidden_states_BSD[mask_BS], unmasked.hidden_states_BSD[mask_BS])


def test_padding_is_not_given_to_the_experts(layer):
    rows = []
    layer.experts.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    layer(torch.randn(2, 3, 32), torch.tensor([[True, True, False], [False, True, True]]))
    assert rows == [4]


def test_identical_experts_compute_one_mlp_for_any_router(layer):
    """Gates sum to 1, so the weighted sum of equal experts is the expert."""
    experts = layer.experts
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
        layer.router.weight.mul_(100)
    x_BSD = torch.randn(2, 5, 32)
    h_BSF = experts.act_fn(nn.functional.linear(x_BSD, experts.up_proj[0], experts.up_proj_bias[0]))
    expected = nn.functional.linear(h_BSF, experts.down_proj[0], experts.down_proj_bias[0])
    torch.testing.assert_close(layer(x_BSD).hidden_states_BSD, expected, rtol=1e-5, atol=1e-5)


def test_the_output_trains_the_router(layer):
    layer(torch.randn(2, 5, 32)).hidden_states_BSD.square().sum().backward()
    assert layer.router.weight.grad.abs().max() > 0


def test_a_dropless_layer_counts_its_choices_and_drops_none(layer):
    mask_BS = torch.tensor([[True, True, False], [False, True, True]])
    out = layer(torch.randn(2, 3, 32), mask_BS)
    assert out.tokens_per_expert_E.sum() == 4 * 2
    assert out.dropped_fraction.dtype == torch.float32
    assert out.dropped_fraction == 0


def test_padding_takes_no_places(make_layer):
    """Four equal valid tokens want one expert of four, which has ceil(1.0 * 4 * 1 / 4) = 1 place: the first gets it."""
    layer = make_layer(num_experts_per_tok=1, eval_capacity_factor=1.0).eval()
    mask_BS = torch.tensor([[False, True, True], [False, True, True]])
    out = layer(torch.ones(2, 3, 32), mask_BS)
    assert out.hidden_states_BSD.abs().sum(dim=-1).nonzero().tolist() == [[0, 1]]
    assert out.dropped_fraction == 0.75
    assert sorted(out.tokens_per_expert_E.tolist()) == [0, 0, 0, 4]


def test_parts_share_capacity_and_are_counted_apart(make_layer):
    """Four equal tokens in parts of 1 and 3 want one expert, with ceil(2 * 4 / 4) = 2 places: the last two get none."""
    layer = make_layer(num_experts_per_tok=1, eval_capacity_factor=2.0).eval()
    whole, out = layer(torch.ones(1, 4, 32)), layer(torch.ones(1, 4, 32), parts=(1, 3))
    assert torch.equal(out.hidden_states_BSD, whole.hidden_states_BSD)
    assert [sorted(tokens) for tokens in out.tokens_per_expert_E.tolist()] == [[0, 0, 0, 1], [0, 0, 0, 3]]
    torch.testing.assert_close(out.dropped_fraction, torch.tensor([0.0, 2 / 3]))
    padded = layer(torch.ones(1, 4, 32), torch.tensor([[True, False, True, True]]), parts=(1, 3))
    assert [sorted(tokens) for tokens in padded.tokens_per_expert_E.tolist()] == [[0, 0, 0, 1], [0, 0, 0, 2]]
    torch.testing.assert_close(padded.dropped_fraction, torch.tensor([0.0, 1 / 2]))


def test_batch_priority_keeps_the_tokens_of_highest_gate_in_the_whole_batch(make_layer):
    """The larger of parallel inputs has the larger top gate; normalized gates of one choice are all 1."""
    layer = make_layer(num_experts_per_tok=1, eval_capacity_factor=2.0, batch_priority=True).eval()
    x_BSD = torch.randn(32).expand(2, 2, 32) * torch.tensor([[1.0, 5.0], [2.0, 4.0]])[..., None]
    out = layer(x_BSD)
    assert out.hidden_states_BSD.abs().sum(dim=-1).nonzero().tolist() == [[0, 1], [1, 1]]
    assert out.dropped_fraction == 0.5


def test_training_and_evaluation_have_their_own_capacity(make_layer):
    layer = make_layer(capacity_factor=0.5, eval_capacity_factor=None)
    assert layer.train()(torch.ones(1, 8, 32)).dropped_fraction > 0
    assert layer.eval()(torch.ones(1, 8, 32)).dropped_fraction == 0


@pytest.mark.parametrize("implementation", ["vision_moe", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("router_type", ["token_choice", "expert_choice"])
def test_implementations_agree_where_slots_are_dropped(make_layer, implementation, router_type):
    fields = {"router_type": router_type, "capacity_factor": 0.8}
    x_BSD = torch.randn(2, 5, 32)
    results = []
    for name in ("eager", implementation):
        layer = make_layer(_experts_implementation=name, **fields)
        out = layer(x_BSD)
        out.hidden_states_BSD.square().sum().backward()
        results.append((out.hidden_states_BSD, out.dropped_fraction, layer.router.weight.grad))
    assert results[0][1] > 0
    for name, mine, truth in zip(("output", "dropped", "router"), *results, strict=True):
        # The router's gradient is a small difference of large terms.
        assert_close(name, mine, truth, 1e-4)


def test_expert_choice_within_a_picture_does_not_depend_on_the_batch(make_layer):
    layer = make_layer(router_type="expert_choice", eval_capacity_factor=1.0, capacity_group_size=1).eval()
    x_BSD = torch.randn(3, 8, 32)
    together, alone = layer(x_BSD), layer(x_BSD[1:2])
    torch.testing.assert_close(together.hidden_states_BSD[1:2], alone.hidden_states_BSD)
    # 8 tokens, 4 experts: 2 tokens per expert and picture.
    assert together.tokens_per_expert_E.tolist() == [6, 6, 6, 6]
    untouched = (together.hidden_states_BSD.abs().sum(dim=-1) == 0).float().mean()
    assert together.dropped_fraction == untouched


def test_the_shared_expert_adds_its_output_for_every_valid_token(make_layer):
    plain, layer = make_layer(), make_layer(shared_expert=True, expert_dim=24)
    assert layer.shared_expert.up_proj.shape == (24, 32)
    assert layer.experts.up_proj.shape == (4, 24, 32)
    layer.experts = plain.experts
    layer.router = plain.router
    x_BSD, mask_BS = torch.randn(2, 3, 32), torch.tensor([[True, True, False], [True, True, True]])
    added = layer(x_BSD, mask_BS).hidden_states_BSD - plain(x_BSD, mask_BS).hidden_states_BSD
    torch.testing.assert_close(added, layer.shared_expert(x_BSD) * mask_BS[..., None])
