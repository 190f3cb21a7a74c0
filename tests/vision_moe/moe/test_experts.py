"""The experts: every implementation against a loop over tokens, in value and gradient."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vision_moe.moe.experts import Experts

IMPLEMENTATIONS = ["vision_moe", "eager", "grouped_mm", "batched_mm"]
OURS = ["vision_moe", "eager"]
SHAPES = [(64, 4, 2, 32, 48), (63, 7, 3, 16, 64), (1, 4, 2, 16, 16), (16, 4, 4, 16, 16), (9, 1, 1, 16, 16)]


def make_experts(E, D, F, implementation="eager"):
    config = SimpleNamespace(
        num_experts=E,
        hidden_size=D,
        intermediate_size=F,
        hidden_act="quick_gelu",
        _experts_implementation=implementation,
    )
    experts = Experts(config)
    for bias in (experts.up_proj_bias, experts.down_proj_bias):
        nn.init.normal_(bias, std=0.1)
    return experts


def make_routing(T, E, K, D):
    gates_TK, experts_TK = torch.randn(T, E).softmax(dim=-1).topk(K, dim=-1)
    return torch.randn(T, D).requires_grad_(), experts_TK, gates_TK.detach().requires_grad_()


def loop_over_tokens(experts, x_TD, experts_TK, gates_TK):
    rows = []
    for x_D, chosen_K, gates_K in zip(x_TD, experts_TK.tolist(), gates_TK, strict=True):
        row = torch.zeros_like(x_D)
        for expert, gate in zip(chosen_K, gates_K, strict=True):
            if expert == len(experts.up_proj):
                continue
            h_F = experts.up_proj[expert] @ x_D + experts.up_proj_bias[expert]
            h_F = h_F * torch.sigmoid(1.702 * h_F)
            row = row + gate * (experts.down_proj[expert] @ h_F + experts.down_proj_bias[expert])
        rows.append(row)
    return torch.stack(rows)


def run(function, experts, x_TD, gates_TK, upstream_TD):
    y_TD = function()
    inputs = [x_TD, gates_TK, *experts.parameters()]
    return [y_TD, *torch.autograd.grad(y_TD, inputs, upstream_TD)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("T", "E", "K", "D", "F"), SHAPES, ids=str)
def test_implementations_equal_a_loop_over_tokens_with_all_gradients(implementation, T, E, K, D, F):
    torch.manual_seed(0)
    experts = make_experts(E, D, F, implementation)
    x_TD, experts_TK, gates_TK = make_routing(T, E, K, D)
    upstream_TD = torch.randn(T, D)
    actual = run(lambda: experts(x_TD, experts_TK, gates_TK), experts, x_TD, gates_TK, upstream_TD)
    expected = run(lambda: loop_over_tokens(experts, x_TD, experts_TK, gates_TK), experts, x_TD, gates_TK, upstream_TD)
    for mine, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_slots_of_the_expert_past_the_last_are_skipped_with_no_gradient_to_their_gates(implementation):
    """The loop skips them; token 0 keeps no slot, and one slot of a dropped token names a gate that is not 0."""
    torch.manual_seed(0)
    experts = make_experts(4, 16, 24, implementation)
    experts._is_expert_parallel = True
    x_TD, experts_TK, gates_TK = make_routing(9, 4, 3, 16)
    experts_TK[0] = experts_TK[2, 1] = experts_TK[5, 0] = 4
    upstream_TD = torch.randn(9, 16)
    actual = run(lambda: experts(x_TD, experts_TK, gates_TK), experts, x_TD, gates_TK, upstream_TD)
    expected = run(lambda: loop_over_tokens(experts, x_TD, experts_TK, gates_TK), experts, x_TD, gates_TK, upstream_TD)
    for mine, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-5)
    assert actual[0][0].abs().max() == 0


def test_skipped_slots_are_not_computed():
    experts = make_experts(4, 8, 16)
    rows = []
    experts.act_fn.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    experts(torch.randn(3, 8), torch.tensor([[0, 4], [4, 4], [2, 0]]), torch.ones(3, 2))
    assert rows == [2, 0, 1, 0]


@pytest.mark.parametrize("implementation", OURS)
def test_autograd_agrees_with_finite_differences(implementation):
    torch.manual_seed(0)
    experts = make_experts(3, 4, 5, implementation).double()
    x_TD, experts_TK, gates_TK = make_routing(6, 3, 2, 4)
    inputs = [x_TD.detach().double().requires_grad_(), gates_TK.detach().double().requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda x, gates, *_: experts(x, experts_TK, gates), (*inputs, *experts.parameters())
    )


@pytest.mark.parametrize("implementation", OURS)
def test_an_expert_without_tokens_gets_a_zero_gradient_and_not_none(implementation):
    """DDP and ZeRO wait for every parameter."""
    torch.manual_seed(0)
    experts = make_experts(4, 8, 16, implementation)
    experts(torch.randn(5, 8), torch.full((5, 1), 2), torch.ones(5, 1)).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad[2].abs().sum() > 0
        assert parameter.grad[[0, 1, 3]].abs().sum() == 0


@pytest.mark.parametrize("implementation", OURS)
def test_zero_tokens_give_zero_rows_and_gradients(implementation):
    experts = make_experts(4, 8, 16, implementation)
    y_TD = experts(torch.randn(0, 8), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    y_TD.sum().backward()
    assert y_TD.shape == (0, 8)
    assert all(parameter.grad is not None for parameter in experts.parameters())


@pytest.mark.parametrize("implementation", OURS)
def test_result_is_bitwise_repeatable(implementation):
    torch.manual_seed(0)
    experts = make_experts(4, 32, 48, implementation)
    x_TD, experts_TK, gates_TK = make_routing(500, 4, 3, 32)
    first, second = (
        run(lambda: experts(x_TD, experts_TK, gates_TK), experts, x_TD, gates_TK, torch.ones(500, 32)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_autocast_stays_close_to_float32(implementation):
    torch.manual_seed(0)
    experts = make_experts(4, 64, 128, implementation)
    x_TD, experts_TK, gates_TK = make_routing(200, 4, 2, 64)
    upstream_TD = torch.randn(200, 64)
    expected = run(lambda: experts(x_TD, experts_TK, gates_TK), experts, x_TD, gates_TK, upstream_TD)

    def autocast():
        with torch.autocast("cpu", torch.bfloat16):
            return experts(x_TD, experts_TK, gates_TK)

    actual = run(autocast, experts, x_TD, gates_TK, upstream_TD)
    for mine, truth in zip(actual, expected, strict=True):
        assert mine.dtype == truth.dtype
        assert (mine - truth).norm() < 0.01 * truth.norm()


def test_eager_implementation_honors_autocast():
    """grouped_mm would compute in float32; this must do the matrix products in bfloat16."""
    experts = make_experts(4, 64, 128)
    x_TD, experts_TK, gates_TK = make_routing(20, 4, 2, 64)
    seen = set()
    experts.act_fn.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        experts(x_TD, experts_TK, gates_TK)
    assert seen == {torch.bfloat16}
