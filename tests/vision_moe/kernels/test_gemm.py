"""The choice between torch's and oneDNN's products: measured, correct on either road, off by torch's flag."""

import pytest
import torch
from torch import nn

from vision_moe.kernels import gemm, gemm_choice
from vision_moe.kernels.linear import linear
from vision_moe.run_folder import same_products


def test_both_roads_compute_a_linear_layer_and_its_gradients(monkeypatch):
    monkeypatch.setattr(gemm, "MIN_WORK", 0)
    torch.manual_seed(0)
    x_nI, w_OI, b_O, grad_nO = torch.randn(7, 5), torch.randn(3, 5), torch.randn(3), torch.randn(7, 3)
    for wins in (False, gemm_choice.onednn_works(torch.float32)):
        monkeypatch.setattr(gemm, "onednn_wins", lambda dtype, product, wins=wins: wins)
        torch.testing.assert_close(gemm.linear(x_nI, w_OI, b_O), x_nI @ w_OI.T + b_O)
        torch.testing.assert_close(gemm.activated_linear(x_nI, w_OI, b_O, "relu"), (x_nI @ w_OI.T + b_O).relu())
        torch.testing.assert_close(gemm.input_gradient(grad_nO, w_OI), grad_nO @ w_OI)
        dw_OI, y_nO = torch.full((3, 5), torch.nan), torch.full((7, 3), torch.nan)
        gemm.weight_gradient(grad_nO, x_nI, dw_OI)
        torch.testing.assert_close(dw_OI, grad_nO.T @ x_nI)
        for bias in (b_O, None):
            gemm.linear_into(x_nI, w_OI, bias, y_nO)
            torch.testing.assert_close(y_nO, nn.functional.linear(x_nI, w_OI, bias))


def test_measurement_is_taken_once_and_leaves_the_random_state_alone():
    gemm_choice._onednn_wins.cache_clear()
    before = torch.get_rng_state()
    first = [gemm_choice.onednn_wins(torch.float32, product) for product in gemm_choice.Product]
    assert torch.equal(torch.get_rng_state(), before)
    assert [gemm_choice.onednn_wins(torch.float32, product) for product in gemm_choice.Product] == first
    assert gemm_choice._onednn_wins.cache_info().misses == len(gemm_choice.Product)


def test_torchs_flag_switches_onednn_off(monkeypatch):
    calls = []
    monkeypatch.setattr(gemm, "onednn_wins", lambda dtype, product: True)
    monkeypatch.setattr(gemm, "onednn_linear", lambda *arguments: calls.append(1) or torch.zeros(256, 256))
    x, w = torch.randn(256, 512), torch.randn(256, 512)
    gemm.linear(x, w)
    assert len(calls) == 1
    with torch.backends.mkldnn.flags(enabled=False):
        torch.testing.assert_close(gemm.linear(x, w), x @ w.T)
    gemm.linear(x[:4], w[:4])
    assert len(calls) == 1


@pytest.mark.parametrize(
    "broken", [lambda *arguments: torch.zeros(1), lambda x, w, *rest: torch.zeros(x.shape[0], w.shape[0])]
)
def test_an_operator_that_computes_something_else_is_not_used(monkeypatch, broken):
    gemm_choice.onednn_works.cache_clear()
    monkeypatch.setattr(gemm_choice, "onednn_linear", broken)
    assert not gemm_choice.onednn_works(torch.float32)
    gemm_choice.onednn_works.cache_clear()


def test_a_torch_without_the_private_operator_is_no_error(monkeypatch):
    def missing(*arguments):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    gemm_choice.onednn_works.cache_clear()
    monkeypatch.setattr(gemm_choice, "onednn_linear", missing)
    assert not gemm_choice.onednn_works(torch.float32)
    gemm_choice.onednn_works.cache_clear()


def count_calls(monkeypatch, wins):
    """From now on every measurement says `wins`; the list grows with oneDNN's products."""
    calls, original = [], gemm_choice.onednn_linear
    monkeypatch.setattr(gemm, "onednn_linear", lambda *arguments: calls.append(1) or original(*arguments))
    monkeypatch.setattr(gemm_choice, "_onednn_wins", lambda dtype, product, threads: wins)
    return calls


@pytest.mark.skipif(not gemm_choice.onednn_works(torch.float32), reason="this torch has no oneDNN linear")
@pytest.mark.parametrize("wins", [True, False])
def test_a_run_that_goes_on_keeps_its_products_whatever_is_measured_then(monkeypatch, tmp_path, wins):
    monkeypatch.setattr(gemm, "MIN_WORK", 0)
    x, w, b = torch.randn(7, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True), torch.randn(3)
    taken = []
    for measured in (wins, not wins):
        with monkeypatch.context() as patch:
            calls = count_calls(patch, measured)
            with same_products(tmp_path):
                # Forward, and a backward pass that needs both gradients.
                linear(x, w, b).sum().backward()
            taken.append(len(calls))
            calls.clear()
            linear(x, w, b)
            # Outside the block the measurement counts.
            assert bool(calls) is measured
    assert taken == ([3, 3] if wins else [0, 0])


def test_a_choice_that_this_torch_cannot_follow_is_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(gemm_choice, "onednn_works", lambda dtype: False)
    with gemm_choice.using({"float32 forward": True, "float32 input gradient": False}):
        assert not gemm_choice.onednn_wins(torch.float32, gemm_choice.Product.FORWARD)
    assert "oneDNN for float32 forward," in caplog.text
