"""The backends that run on a CPU, against the reference: output and every gradient."""

import pytest
import torch

from vision_moe.kernels import ExpertWeights, gemm, gemm_choice, grouped_mlp, op, reference, routed_mlp
from vision_moe.testing import assert_close

SHAPES = [(64, 4, 2, 32, 48), (63, 7, 3, 16, 64), (1, 4, 2, 16, 16), (16, 4, 4, 16, 32), (9, 1, 1, 16, 16)]
BACKENDS = ["cpu", "grouped"]
NAMES = ("output", "x", "gates", "w1", "b1", "w2", "b2")


@pytest.fixture(params=["torch", "onednn"])
def provider(request, monkeypatch):
    """Both roads of the matrix products, whatever the measurement would pick, and at any size."""
    if request.param == "onednn" and not gemm_choice.onednn_works(torch.float32):
        pytest.skip("this torch has no oneDNN linear for float32")
    monkeypatch.setattr(gemm, "MIN_WORK", 0)
    monkeypatch.setattr(
        gemm, "onednn_wins", lambda dtype, product: request.param == "onednn" and gemm_choice.onednn_works(dtype)
    )
    return request.param


def compare(actual, expected, ratio):
    for name, mine, truth in zip(NAMES, actual, expected, strict=False):
        assert mine.dtype == truth.dtype, name
        assert_close(name, mine, truth, ratio)


@pytest.mark.parametrize(("T", "E", "K", "D", "F"), SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_reference_with_all_gradients(make_layer, run_layer, provider, backend, T, E, K, D, F):
    layer = make_layer(T, E, K, D, F)
    compare(run_layer(layer, backend), run_layer(layer, "reference"), 1e-5)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_pytorch_tanh", "silu", "relu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_activation_gated_or_not(make_layer, run_layer, provider, backend, activation, bias, gated):
    layer = make_layer(10, 3, 2, 16, 8, gated=gated, bias=bias)
    compare(run_layer(layer, backend, activation), run_layer(layer, "reference", activation), 1e-5)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "silu", "relu"])
def test_inference_equals_training(make_layer, provider, activation):
    layer = make_layer(40, 4, 2, 32, 48)
    arguments = (layer.x_TD, layer.experts_TK, layer.gates_TK, layer.weights, activation, "cpu")
    expected = routed_mlp(*arguments).detach()
    with torch.no_grad():
        assert_close("output", routed_mlp(*arguments), expected, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "ratio"), [(torch.bfloat16, 8e-3), (torch.float16, 2e-3)])
def test_half_precision_is_close_to_the_reference(make_layer, run_layer, provider, backend, dtype, ratio):
    layer = make_layer(50, 4, 2, 32, 64, dtype=dtype)
    compare(run_layer(layer, backend), run_layer(layer, "reference"), ratio)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_of_the_expert_past_the_last_are_not_computed(make_layer, run_layer, backend):
    layer = make_layer(9, 4, 3, 16, 24)
    layer.experts_TK[0] = layer.experts_TK[2, 1] = layer.experts_TK[5, 0] = 4
    actual = run_layer(layer, backend)
    compare(actual, run_layer(layer, "reference"), 1e-5)
    assert actual[0][0].abs().max() == actual[2][layer.experts_TK == 4].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_without_tokens_gets_a_zero_gradient_and_not_none(make_layer, run_layer, backend):
    """DDP and ZeRO wait for every parameter."""
    layer = make_layer(5, 4, 1, 16, 16)
    layer.experts_TK.fill_(2)
    for gradient in run_layer(layer, backend)[3:]:
        assert gradient[2].abs().sum() > 0
        assert gradient[[0, 1, 3]].abs().sum() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_tokens_and_all_slots_dropped(make_layer, run_layer, backend):
    empty, dropped = make_layer(0, 4, 2, 16, 16), make_layer(6, 4, 2, 16, 16)
    dropped.experts_TK.fill_(4)
    for layer in (empty, dropped):
        y_TD, *gradients = run_layer(layer, backend)
        assert y_TD.shape == layer.x_TD.shape
        assert all(gradient.abs().sum() == 0 for gradient in (y_TD, *gradients))


def test_a_gate_of_zero_keeps_its_gradient(make_layer, run_layer):
    """The gradient of a gate comes from the state before the gate; division by the gate would lose it."""
    layer = make_layer(6, 3, 2, 16, 16)
    with torch.no_grad():
        layer.gates_TK[:3] = 0
    actual = run_layer(layer, "cpu")
    compare(actual, run_layer(layer, "reference"), 1e-5)
    assert actual[2][:3].abs().min() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", range(6))
def test_each_gradient_alone_equals_the_reference(make_layer, backend, trained):
    layer = make_layer(12, 3, 2, 16, 24)
    layer.experts_TK[1, 1] = 3
    results = []
    for name in (backend, "reference"):
        tensors = [tensor.detach().requires_grad_(i == trained) for i, tensor in enumerate(layer.leaves)]
        x, gates, *weights = tensors
        y = routed_mlp(x, layer.experts_TK, gates, ExpertWeights(*weights), "quick_gelu", name)
        results.append(torch.autograd.grad(y, tensors[trained], layer.upstream_TD)[0])
    assert_close(NAMES[trained + 1], *results, 1e-5)


def count_calls(monkeypatch, name, function):
    calls, original = [], getattr(gemm, name)
    monkeypatch.setattr(gemm, name, lambda *arguments: calls.append(1) or original(*arguments))
    function()
    return len(calls)


def test_frozen_experts_cost_no_weight_gradient(make_layer, monkeypatch):
    layer = make_layer(12, 3, 2, 16, 24)
    weights = ExpertWeights(*(weight.detach() for weight in layer.weights))
    y = routed_mlp(layer.x_TD, layer.experts_TK, layer.gates_TK, weights, backend="cpu")
    assert count_calls(monkeypatch, "weight_gradient", lambda: y.backward(layer.upstream_TD)) == 0
    y = routed_mlp(layer.x_TD.detach(), layer.experts_TK, layer.gates_TK, weights, backend="cpu")
    # Only g W2, which the gates need, and one for each of the three experts.
    assert count_calls(monkeypatch, "input_gradient", lambda: y.backward(layer.upstream_TD)) == 3


@pytest.mark.parametrize(("frozen", "expected"), [(False, 9.0), (True, 8.0)])
def test_only_x_and_the_pre_activation_are_saved(make_layer, frozen, expected):
    """In units of x, for K = 2 and F = 4 D; the weights are not copies, and indices are no floats."""
    layer = make_layer(64, 4, 2, 16, 64)
    weights = ExpertWeights(*(weight.detach().requires_grad_(not frozen) for weight in layer.weights))
    own = {tensor.data_ptr() for tensor in (layer.gates_TK, *weights)}
    sizes = []

    def pack(tensor):
        if tensor.is_floating_point() and tensor.data_ptr() not in own:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        routed_mlp(layer.x_TD, layer.experts_TK, layer.gates_TK, weights, backend="cpu")
    assert sum(sizes) / layer.x_TD.numel() == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_result_is_bitwise_repeatable(make_layer, run_layer, backend):
    layer = make_layer(300, 4, 3, 32, 48)
    first, second = run_layer(layer, backend), run_layer(layer, backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_tiles_do_not_change_the_result(make_layer, run_layer, monkeypatch):
    layer = make_layer(50, 3, 2, 16, 24)
    expected = run_layer(layer, "reference")
    monkeypatch.setattr("vision_moe.kernels.cpu._TILE", 7)
    compare(run_layer(layer, "cpu"), expected, 1e-5)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_autocast_computes_in_bfloat16_and_returns_the_dtypes_of_the_inputs(make_layer, run_layer, backend):
    layer = make_layer(60, 4, 2, 32, 64)
    expected = run_layer(layer, "reference")
    with torch.autocast("cpu", torch.bfloat16):
        y_TD = routed_mlp(layer.x_TD, layer.experts_TK, layer.gates_TK, layer.weights, backend=backend)
    # The backward pass runs outside, as it does in a training step.
    actual = [y_TD.detach(), *torch.autograd.grad(y_TD, layer.leaves, layer.upstream_TD)]
    compare(actual, expected, 1e-2)
    assert (actual[0] - expected[0]).norm() > 1e-4 * expected[0].norm()


def test_gradcheck_of_the_cpu_kernel(make_layer):
    layer = make_layer(5, 3, 2, 3, 4, dtype=torch.float64)
    layer.experts_TK[0, 0] = 3

    def function(x, gates, *weights):
        return routed_mlp(x, layer.experts_TK, gates, ExpertWeights(*weights), "quick_gelu", "cpu")

    assert torch.autograd.gradcheck(function, layer.leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_mlp_takes_sorted_rows(make_layer, backend):
    layer = make_layer(20, 4, 1, 16, 24)
    counts_E = torch.tensor([5, 0, 12, 1])
    results = []
    for name in (backend, "reference"):
        y_ND = grouped_mlp(layer.x_TD, *layer.weights, counts_E, "gelu", name)
        leaves = [layer.x_TD, *layer.weights]
        results.append([y_ND.detach(), *torch.autograd.grad(y_ND, leaves, layer.upstream_TD)])
    for mine, truth in zip(*results, strict=True):
        assert_close("grouped_mlp", mine, truth, 1e-5)
    assert results[0][0][18:].abs().max() == 0


def test_expanded_gradients_are_taken(make_layer):
    """`sum().backward()` gives a gradient without strides."""
    layer = make_layer(8, 3, 2, 16, 16)
    for backend in BACKENDS:
        y_TD = routed_mlp(layer.x_TD, layer.experts_TK, layer.gates_TK, layer.weights, backend=backend)
        (dx_TD,) = torch.autograd.grad(y_TD.sum(), layer.x_TD)
        assert dx_TD.abs().sum() > 0


def test_odd_layouts_of_the_inputs_are_taken(make_layer, run_layer):
    layer = make_layer(8, 3, 2, 16, 24)
    transposed = ExpertWeights(layer.weights.w1_EHD.detach().mT.contiguous().mT.requires_grad_(), *layer.weights[1:])
    x_TD = layer.x_TD.detach().t().contiguous().t().requires_grad_()
    strided = layer._replace(x_TD=x_TD, weights=transposed)
    compare(run_layer(strided, "cpu"), run_layer(layer, "reference"), 1e-5)


def test_reference_runs_where_no_kernel_knows_the_activation(make_layer):
    layer = make_layer(8, 3, 2, 16, 24)
    arguments = (layer.x_TD, layer.experts_TK, layer.gates_TK, layer.weights, "mish")
    assert torch.equal(routed_mlp(*arguments), reference.routed_mlp(*arguments))
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run this: it knows the activations.*possible are: ref"):
        routed_mlp(*arguments, "cpu")


def test_the_pick_is_logged_once(make_layer, run_layer, caplog):
    op._log_pick.cache_clear()
    with caplog.at_level("INFO", logger="vision_moe.kernels.op"):
        for _ in range(2):
            run_layer(make_layer(5, 3, 2, 8, 12), "auto")
    assert caplog.messages == ["experts on cpu in torch.float32: backend cpu"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "unknown backend 'cuda'; choose one of"),
        ({"backend": "triton"}, "backend 'triton' cannot run this: the input is on cpu; possible are: reference, cpu"),
        ({"topk_experts_TK": torch.full((8, 2), 7)}, r"experts must be in \[0, 3\]"),
        ({"topk_gates_TK": torch.ones(8, 3)}, r"must both be \[T=8, K\]"),
        ({"x_TD": torch.ones(8, 12)}, r"the experts take x \[T, D\]"),
        ({"x_TD": torch.ones(8, 16, dtype=torch.float64)}, "x is torch.float64 and the experts are torch.float32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_input_gets_a_clear_error(make_layer, change, message):
    layer = make_layer(8, 3, 2, 16, 24)
    arguments = {
        "x_TD": layer.x_TD,
        "topk_experts_TK": layer.experts_TK,
        "topk_gates_TK": layer.gates_TK,
        "weights": layer.weights,
    }
    with pytest.raises(ValueError, match=message):
        routed_mlp(**{**arguments, **change})
