"""MoEMLP: padding, identical experts, gradients to the router."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vision_moe.moe.layer import MoEMLP


@pytest.fixture
def layer():
    config = SimpleNamespace(
        num_experts=4,
        num_experts_per_tok=2,
        hidden_size=32,
        intermediate_size=48,
        hidden_act="quick_gelu",
        norm_topk_prob=True,
        router_noise_std=0.0,
        _experts_implementation="eager",
    )
    torch.manual_seed(0)
    module = MoEMLP(config)
    nn.init.normal_(module.experts.down_proj_bias)
    return module


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
