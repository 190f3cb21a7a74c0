"""The Triton kernels against the reference: compiled on a GPU, or on a CPU by the interpreter (TRITON_INTERPRET=1).

Marked gpu; `test_triton_without_a_gpu.py` runs this file in the interpreter.
"""

import os

import pytest
import torch

from vision_moe.kernels import ExpertWeights, grouped_mlp, routed_mlp
from vision_moe.testing import assert_close

pytestmark = pytest.mark.gpu
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
NAMES = ("output", "x", "gates", "w1", "b1", "w2", "b2")


def compare(actual, expected, ratio, names=NAMES):
    for name, mine, truth in zip(names, actual, expected, strict=False):
        assert mine.dtype == truth.dtype, name
        assert_close(name, mine, truth, ratio)


# The interpreter cuts bfloat16 where a GPU rounds.
@pytest.mark.parametrize(
    ("dtype", "ratio"),
    [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2 if DEVICE == "cpu" else 1e-2)],
)
@pytest.mark.parametrize(
    ("T", "E", "K", "D", "F"), [(40, 4, 2, 32, 48), (21, 5, 3, 33, 65), (1, 4, 4, 16, 16), (9, 1, 1, 16, 40)], ids=str
)
def test_equals_the_reference_with_all_gradients(make_layer, run_layer, T, E, K, D, F, dtype, ratio):
    layer = make_layer(T, E, K, D, F, dtype=dtype, device=DEVICE)
    compare(run_layer(layer, "triton"), run_layer(layer, "reference"), ratio)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_pytorch_tanh", "silu", "relu"])
def test_every_activation_gated_or_not(make_layer, run_layer, activation, gated):
    layer = make_layer(10, 3, 2, 16, 40, gated=gated, bias=gated, device=DEVICE)
    names = NAMES if gated else ("output", "x", "gates", "w1", "w2")
    compare(run_layer(layer, "triton", activation), run_layer(layer, "reference", activation), 1e-5, names)


def test_dropped_slots_and_empty_experts(make_layer, run_layer):
    layer = make_layer(50, 6, 2, 16, 24, device=DEVICE)
    layer.experts_TK[layer.experts_TK == 2] = 6
    layer.experts_TK[layer.experts_TK == 5] = 6
    layer.experts_TK[0] = 6
    actual = run_layer(layer, "triton")
    compare(actual, run_layer(layer, "reference"), 1e-5)
    assert actual[0][0].abs().max() == actual[2][layer.experts_TK == 6].abs().max() == 0
    assert all(gradient[[2, 5]].abs().max() == 0 for gradient in actual[3:])


def test_all_tokens_to_one_expert(make_layer, run_layer):
    layer = make_layer(70, 3, 1, 16, 24, device=DEVICE)
    layer.experts_TK.fill_(1)
    compare(run_layer(layer, "triton"), run_layer(layer, "reference"), 1e-5)


def test_zero_tokens(make_layer, run_layer):
    for tensor in run_layer(make_layer(0, 4, 2, 16, 16, device=DEVICE), "triton"):
        assert tensor.abs().sum() == 0


def test_inference_equals_training_and_every_run_gives_the_same_bits(make_layer, run_layer):
    layer = make_layer(40, 4, 2, 32, 48, device=DEVICE)
    first, second = run_layer(layer, "triton"), run_layer(layer, "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        y_TD = routed_mlp(layer.x_TD, layer.experts_TK, layer.gates_TK, layer.weights, backend="triton")
    assert torch.equal(y_TD, first[0])


@pytest.mark.parametrize("trained", [0, 1, 3, 4])
def test_each_gradient_alone_equals_the_reference(make_layer, trained):
    layer = make_layer(12, 3, 2, 16, 24, device=DEVICE)
    results = []
    for name in ("triton", "reference"):
        tensors = [tensor.detach().requires_grad_(i == trained) for i, tensor in enumerate(layer.leaves)]
        x, gates, *weights = tensors
        y = routed_mlp(x, layer.experts_TK, gates, ExpertWeights(*weights), "quick_gelu", name)
        results.append(torch.autograd.grad(y, tensors[trained], layer.upstream_TD)[0])
    assert_close(NAMES[trained + 1], *results, 1e-5)


def test_grouped_mlp_takes_sorted_rows(make_layer):
    layer = make_layer(20, 4, 1, 16, 24, device=DEVICE)
    counts_E = torch.tensor([5, 0, 12, 1], device=DEVICE)
    results = []
    for name in ("triton", "reference"):
        y_ND = grouped_mlp(layer.x_TD, *layer.weights, counts_E, "gelu", name)
        results.append([y_ND, *torch.autograd.grad(y_ND, [layer.x_TD, *layer.weights], layer.upstream_TD)])
    for mine, truth in zip(*results, strict=True):
        assert_close("grouped_mlp", mine, truth, 1e-5)
