"""The dense layers' Linear: nn.Linear's parameters and values, on either road of the products."""

import pytest
import torch
from torch import nn

from vision_moe.kernels import gemm, gemm_choice
from vision_moe.kernels.linear import Linear
from vision_moe.model import CLIPMoEConfig, CLIPMoEModel
from vision_moe.testing import assert_close


@pytest.fixture(params=[True, False], ids=["with bias", "without bias"])
def layers(request, monkeypatch):
    """nn.Linear and ours with its parameters; every product is large enough, and oneDNN's where there is one."""
    monkeypatch.setattr(gemm, "MIN_WORK", 0)
    monkeypatch.setattr(gemm, "onednn_wins", lambda dtype, product: gemm_choice.onednn_works(dtype))
    torch.manual_seed(0)
    plain = nn.Linear(12, 20, bias=request.param)
    return plain, Linear.replacing(plain)


def test_values_and_gradients_are_nn_linears(layers):
    x_BSD = torch.randn(2, 7, 12, requires_grad=True)
    upstream = torch.randn(2, 7, 20)
    results = []
    for layer in layers:
        y = layer(x_BSD)
        results.append([y.detach(), *torch.autograd.grad(y, [x_BSD, *layer.parameters()], upstream)])
    for truth, mine in zip(*results, strict=True):
        assert_close("linear", mine, truth, 1e-6)


def test_parameters_are_the_same_objects_under_the_same_names(layers):
    plain, fast = layers
    assert isinstance(fast, nn.Linear)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    assert all(a is b for a, b in zip(fast.parameters(), plain.parameters(), strict=True))


def test_a_frozen_layer_costs_no_weight_gradient(layers, monkeypatch):
    _, fast = layers
    fast.requires_grad_(False)
    y = fast(torch.randn(3, 12, requires_grad=True))
    monkeypatch.setattr(gemm, "weight_gradient", lambda *arguments: pytest.fail("took a weight gradient"))
    y.sum().backward()
    assert fast.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_autocast_are_torchs_own(layers, dtype):
    plain, fast = layers
    x = torch.randn(3, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), plain(x))
    assert torch.equal(fast.to(dtype)(x.to(dtype)), plain.to(dtype)(x.to(dtype)))


def test_compiled_layer_is_one_graph_with_the_same_gradients(layers):
    plain, fast = layers
    x = torch.randn(3, 12)
    torch.compile(fast, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    actual = [parameter.grad.clone() for parameter in fast.parameters()]
    fast.zero_grad()
    plain(x).square().sum().backward()
    for mine, parameter in zip(actual, plain.parameters(), strict=True):
        assert_close("compiled", mine, parameter.grad, 1e-5)


def test_the_towers_dense_layers_are_ours_and_a_compiled_tower_gives_the_same(clip_sizes, clip_batch, monkeypatch):
    monkeypatch.setattr(gemm, "MIN_WORK", 0)
    torch.manual_seed(0)
    moe = CLIPMoEModel(CLIPMoEConfig(**clip_sizes)).eval()
    layer = moe.vision_model.encoder.layers[0]
    assert all(type(getattr(layer.self_attn, name)) is Linear for name in ("q_proj", "k_proj", "v_proj", "out_proj"))
    pixels = clip_batch["pixel_values"]
    with torch.no_grad():
        expected = moe.vision_model(pixels).last_hidden_state
        compiled = torch.compile(moe.vision_model.encoder, backend="aot_eager")
        embeddings = moe.vision_model.pre_layrnorm(moe.vision_model.embeddings(pixels))
        assert_close("tower", compiled(embeddings).last_hidden_state, expected, 1e-5)
