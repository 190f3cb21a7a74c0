"""torch sees the experts as one operator: schema, fake kernel and autograd are checked by torch's own tests."""

import pytest
import torch
from torch import library

from vision_moe.kernels import op, routed_mlp
from vision_moe.kernels.problem import expert_order
from vision_moe.testing import assert_close


@pytest.mark.parametrize("backend", ["cpu", "grouped"])
def test_operator_passes_torchs_own_checks(make_layer, backend):
    layer = make_layer(9, 3, 2, 16, 8)
    order_N, counts_E = expert_order(layer.experts_TK, 3)
    arguments = (layer.x_TD, layer.gates_TK, *layer.weights, order_N, counts_E, "gelu", backend, True)
    library.opcheck(op.routed_mlp, arguments)


def test_compiled_experts_are_one_graph_with_the_same_gradients(make_layer, run_layer):
    layer = make_layer(9, 3, 2, 16, 8)

    def function(x_TD, gates_TK):
        return routed_mlp(x_TD, layer.experts_TK, gates_TK, layer.weights) * 2

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    y_TD = compiled(layer.x_TD, layer.gates_TK)
    actual = [y_TD.detach(), *torch.autograd.grad(y_TD, layer.leaves, layer.upstream_TD)]
    for mine, truth in zip(actual, run_layer(layer, "reference"), strict=True):
        assert_close("compiled", mine, 2 * truth, 1e-5)
    with torch.no_grad():
        assert_close("inference", compiled(layer.x_TD, layer.gates_TK), y_TD.detach(), 1e-6)


def test_compiled_frozen_experts_give_the_routers_gradient(make_layer, run_layer):
    layer = make_layer(9, 3, 2, 16, 8)
    for weight in layer.weights:
        weight.requires_grad_(False)
    compiled = torch.compile(routed_mlp, backend="aot_eager", fullgraph=True)
    y_TD = compiled(layer.x_TD.detach(), layer.experts_TK, layer.gates_TK, layer.weights)
    (dgates_TK,) = torch.autograd.grad(y_TD, layer.gates_TK, layer.upstream_TD)
    for weight in layer.weights:
        weight.requires_grad_()
    assert_close("gates", dgates_TK, run_layer(layer, "reference")[2], 1e-5)
