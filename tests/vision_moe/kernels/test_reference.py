"""The specification: a value worked by hand, finite differences, and the meaning of a slot that is not computed."""

import math

import pytest
import torch

from vision_moe.kernels import ExpertWeights, grouped_mlp, reference, routed_mlp


def test_one_token_of_two_experts_by_hand():
    """Width 1: expert 0 gives 3 relu(2 * 5 + 1) + 4 = 37, expert 1 gives relu(-5) + 1 = 1."""
    weights = ExpertWeights(
        *(torch.tensor(w) for w in ([[[2.0]], [[-1.0]]], [[1.0], [0.0]])),
        *(torch.tensor(w) for w in ([[[3.0]], [[1.0]]], [[4.0], [1.0]])),
    )
    y = reference.routed_mlp(
        torch.tensor([[5.0]]), torch.tensor([[1, 0]]), torch.tensor([[0.25, 0.5]]), weights, "relu"
    )
    assert y.tolist() == [[0.25 * 1 + 0.5 * 37]]


def test_gate_rows_come_before_the_rows_they_multiply():
    weights = ExpertWeights(torch.tensor([[[1.0], [10.0]]]), None, torch.tensor([[[1.0]]]), None)
    y = grouped_mlp(torch.tensor([[2.0]]), *weights, torch.tensor([1]), "silu", "reference")
    assert y.item() == pytest.approx(2 / (1 + math.exp(-2)) * 20)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "mish"])
def test_gradients_agree_with_finite_differences(make_layer, activation, gated):
    layer = make_layer(5, 3, 2, 3, 4, gated=gated, dtype=torch.float64)
    layer.experts_TK[0, 0] = 3

    def function(x, gates, *weights):
        return reference.routed_mlp(x, layer.experts_TK, gates, ExpertWeights(*weights), activation)

    assert torch.autograd.gradcheck(function, layer.leaves)


def test_rows_past_the_last_expert_are_zero():
    weights = ExpertWeights(torch.ones(2, 3, 4), None, torch.ones(2, 4, 3), None)
    y_ND = grouped_mlp(torch.ones(5, 4), *weights, torch.tensor([1, 2]), "relu", "reference")
    assert y_ND[:, 0].tolist() == [12.0, 12.0, 12.0, 0.0, 0.0]


def test_half_precision_is_rounded_once(make_layer):
    layer = make_layer(7, 3, 2, 16, 24, dtype=torch.bfloat16)
    exact = [tensor.double() for tensor in (layer.x_TD, layer.gates_TK)]
    weights = ExpertWeights(*(weight.double() for weight in layer.weights))
    expected = reference.routed_mlp(exact[0], layer.experts_TK, exact[1], weights, "gelu")
    actual = routed_mlp(layer.x_TD, layer.experts_TK, layer.gates_TK, layer.weights, "gelu", "reference")
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=1e-5)
