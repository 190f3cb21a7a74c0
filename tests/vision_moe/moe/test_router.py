"""The router: its choice, its gates, its precision, its noise."""

import pytest
import torch

from vision_moe.moe.router import Router


def test_normalized_gates_equal_a_softmax_over_the_top_k_logits():
    """The paper writes Softmax(TopK(x W)), the official code divides the top-k of a softmax by their sum."""
    torch.manual_seed(0)
    out = Router(16, 6, 3)(torch.randn(50, 16))
    top = out.router_logits_TE.topk(3, dim=-1)
    assert torch.equal(out.topk_experts_TK, top.indices)
    torch.testing.assert_close(out.topk_gates_TK, top.values.softmax(dim=-1))


def test_hand_worked_gates():
    """Logits ln 1, ln 2, ln 5: gates 1/8, 2/8, 5/8; the top two are 5/8 and 2/8, or 5/7 and 2/7 normalized."""
    x_TD = torch.tensor([[1.0, 2.0, 5.0]]).log()
    raw, normalized = Router(3, 3, 2, normalize=False), Router(3, 3, 2)
    for router in (raw, normalized):
        torch.nn.init.eye_(router.weight)
    torch.testing.assert_close(raw(x_TD).topk_gates_TK, torch.tensor([[5 / 8, 2 / 8]]))
    torch.testing.assert_close(normalized(x_TD).topk_gates_TK, torch.tensor([[5 / 7, 2 / 7]]))
    assert raw(x_TD).topk_experts_TK.tolist() == [[2, 1]]


def test_router_computes_in_float32_under_bfloat16_autocast():
    torch.manual_seed(0)
    router, x_TD = Router(64, 4, 2), torch.randn(100, 64)
    plain = router(x_TD)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = router(x_TD)
    assert autocast.router_logits_TE.dtype == autocast.topk_gates_TK.dtype == torch.float32
    assert torch.equal(autocast.router_logits_TE, plain.router_logits_TE)
    assert torch.equal(autocast.topk_gates_TK, plain.topk_gates_TK)


def test_bfloat16_weights_still_give_float32_logits():
    router = Router(8, 4, 2).to(torch.bfloat16)
    x_TD = torch.randn(5, 8, dtype=torch.bfloat16)
    expected_TE = x_TD.float() @ router.weight.float().T
    assert torch.equal(router(x_TD).router_logits_TE, expected_TE)


def test_noise_is_drawn_in_training_only_and_leaves_the_clean_logits():
    torch.manual_seed(0)
    router, x_TD = Router(8, 4, 2, noise_std=1.0), torch.randn(20_000, 8)
    trained = router.train()(x_TD)
    evaluated = router.eval()(x_TD)
    assert evaluated.noisy_logits_TE is None
    assert torch.equal(trained.router_logits_TE, evaluated.router_logits_TE)
    noise_TE = trained.noisy_logits_TE - trained.router_logits_TE
    # V-MoE's scale: noise_std / E.
    assert noise_TE.std().item() == pytest.approx(1 / 4, rel=0.02)
    assert torch.equal(trained.topk_experts_TK, trained.noisy_logits_TE.topk(2).indices)


@pytest.mark.parametrize("top_k", [0, 5])
def test_impossible_top_k_is_refused(top_k):
    with pytest.raises(ValueError, match=rf"top_k={top_k} with num_experts=4"):
        Router(8, 4, top_k)


def test_hand_worked_sigmoid_gates():
    """Logits 0, ln 3, -ln 3: scores 1/2, 3/4, 1/4; the top two are 3/4 and 1/2, or 3/5 and 2/5 normalized."""
    x_TD = torch.tensor([[1.0, 3.0, 1 / 3]]).log()
    for normalize, expected in ((False, [3 / 4, 1 / 2]), (True, [3 / 5, 2 / 5])):
        router = Router(3, 3, 2, normalize=normalize, scoring_func="sigmoid")
        torch.nn.init.eye_(router.weight)
        out = router(x_TD)
        assert out.topk_experts_TK.tolist() == [[1, 0]]
        torch.testing.assert_close(out.topk_gates_TK, torch.tensor([expected]))
        torch.testing.assert_close(out.gates_TE, torch.tensor([[1 / 2, 3 / 4, 1 / 4]]))


def test_choice_bias_changes_the_choice_and_not_the_gates():
    """Gates 1/8, 2/8, 5/8 with a bias of 0.6 on the first: 0.725, 0.25, 0.625 choose experts 0 and 2."""
    router = Router(3, 3, 2, choice_bias=True)
    torch.nn.init.eye_(router.weight)
    x_TD = torch.tensor([[1.0, 2.0, 5.0]]).log()
    assert router(x_TD).topk_experts_TK.tolist() == [[2, 1]]
    router.choice_bias[0] = 0.6
    out = router(x_TD)
    assert out.topk_experts_TK.tolist() == [[0, 2]]
    torch.testing.assert_close(out.topk_gates_TK, torch.tensor([[1 / 6, 5 / 6]]))
    torch.testing.assert_close(out.gates_TE, torch.tensor([[1 / 8, 2 / 8, 5 / 8]]))


def test_choice_bias_is_saved_is_no_parameter_and_survives_a_cast_bit_for_bit():
    router = Router(8, 4, 2, choice_bias=True)
    router.choice_bias.copy_(torch.tensor([0.1234567, -1e-6, 0.0, 3.0]))
    before = router.choice_bias.clone()
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert set(router.state_dict()) == {"weight", "choice_bias"}
    router.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert torch.equal(router.choice_bias, before)
    assert set(Router(8, 4, 2).state_dict()) == {"weight"}


def test_unknown_scores_are_refused():
    with pytest.raises(ValueError, match="scoring_func must be 'softmax' or 'sigmoid', but got 'tanh'"):
        Router(8, 4, 2, scoring_func="tanh")
