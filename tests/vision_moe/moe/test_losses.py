"""Router losses, each against a value worked by hand."""

import math

import pytest
import torch

from vision_moe.moe.losses import (
    AuxLossWeights,
    aux_loss,
    global_entropy_loss,
    importance_loss,
    load_balance_loss,
    load_loss,
    local_entropy_loss,
    router_z_loss,
)

# Two tokens, two experts. Logits ln 3, 0 and 0, 0: gates 3/4, 1/4 and 1/2, 1/2; mean gate 5/8, 3/8.
LOGITS_TE = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
GATES_TE = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
# The same with a padding row in the middle that no loss may see.
PADDED_TE = torch.stack([LOGITS_TE[0], torch.tensor([50.0, -50.0]), LOGITS_TE[1]])
MASK_T = torch.tensor([True, False, True])


def test_load_balance_hand_worked_top_1():
    """f = (1/2, 1/2), P = (5/8, 3/8): 2 * (5/16 + 3/16) = 1. f = (1, 0): 2 * 5/8 = 5/4."""
    assert load_balance_loss(GATES_TE, torch.tensor([[0], [1]])).item() == pytest.approx(1.0)
    assert load_balance_loss(GATES_TE, torch.tensor([[0], [0]])).item() == pytest.approx(1.25)


def test_load_balance_hand_worked_top_2_of_3():
    """Choices 0,1 and 0,2: f = (1, 1/2, 1/2); P = (1/2, 1/4, 1/4): 3 * (1/2 + 1/8 + 1/8) = 9/4."""
    gates_TE = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.2, 0.3]])
    assert load_balance_loss(gates_TE, torch.tensor([[0, 1], [0, 2]])).item() == pytest.approx(2.25)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_load_balance_is_the_number_of_choices_when_balanced(top_k):
    E = 6
    experts_TK = torch.stack([(torch.arange(E) + slot) % E for slot in range(top_k)], dim=-1)
    assert load_balance_loss(torch.full((E, E), 1 / E), experts_TK).item() == pytest.approx(top_k)


def test_load_balance_is_the_number_of_experts_when_collapsed():
    gates_TE = torch.nn.functional.one_hot(torch.zeros(7, dtype=torch.int64), 5).float()
    assert load_balance_loss(gates_TE, torch.zeros(7, 1, dtype=torch.int64)).item() == pytest.approx(5.0)


def test_load_balance_gradient_flows_through_the_gates_only():
    """d/dp_te of E * sum_e f_e * mean_t p_te is E * f_e / T: here 2 * (1, 0) / 2."""
    gates_TE = GATES_TE.clone().requires_grad_()
    load_balance_loss(gates_TE, torch.tensor([[0], [0]])).backward()
    torch.testing.assert_close(gates_TE.grad, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))


def test_z_loss_hand_worked():
    """log(3 + 1) and log(1 + 1): (ln(4)^2 + ln(2)^2) / 2 = 5/2 ln(2)^2."""
    assert router_z_loss(LOGITS_TE).item() == pytest.approx(2.5 * math.log(2) ** 2)


def test_importance_hand_worked():
    """Importance (5/4, 3/4): mean 1, population variance 1/16."""
    assert importance_loss(GATES_TE).item() == pytest.approx(1 / 16)


def test_load_hand_worked():
    """sigma = 1/2, top-1. Token 1: logits 1, 0, noisy 1, 1/2: threshold 1, so Phi(0), Phi(-2). Token 2: logits 0, 0,
    noisy 0, 1: threshold 1, so Phi(-2) twice.
    """
    phi = 0.5 * (1 + math.erf(-2 / math.sqrt(2)))
    load_0, load_1 = (0.5 + phi) / 2, (phi + phi) / 2
    mean, half_gap = (load_0 + load_1) / 2, (load_0 - load_1) / 2
    actual = load_loss(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.5], [0.0, 1.0]]), 1, 0.5)
    assert actual.item() == pytest.approx((half_gap / mean) ** 2)


def test_load_needs_noise():
    with pytest.raises(ValueError, match=r"noise_std=0\.0"):
        load_loss(LOGITS_TE, LOGITS_TE, 1, 0.0)


def test_local_entropy_hand_worked():
    """H(3/4, 1/4) = 2 ln 2 - 3/4 ln 3 and H(1/2, 1/2) = ln 2: mean 3/2 ln 2 - 3/8 ln 3."""
    assert local_entropy_loss(LOGITS_TE).item() == pytest.approx(1.5 * math.log(2) - 0.375 * math.log(3))


def test_local_entropy_and_gradient_are_finite_where_a_gate_underflows():
    logits_TE = torch.tensor([[500.0, -500.0]], requires_grad=True)
    loss = local_entropy_loss(logits_TE)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits_TE.grad, torch.zeros(1, 2))


def test_global_entropy_hand_worked():
    """Mean gate (5/8, 3/8): ln 2 - H = ln 2 + 5/8 ln 5/8 + 3/8 ln 3/8."""
    expected = math.log(2) + 5 / 8 * math.log(5 / 8) + 3 / 8 * math.log(3 / 8)
    assert global_entropy_loss(GATES_TE).item() == pytest.approx(expected, abs=1e-6)


def test_global_entropy_and_its_gradient_vanish_once_enough_experts_are_used():
    """Even use of 3 of 4 experts has entropy ln 3: enough for S = 2, not for S = 4."""
    logits_TE = torch.tensor([[0.0, 0.0, 0.0, -9.0]], requires_grad=True)
    loss = global_entropy_loss(logits_TE.softmax(dim=-1), min_experts=2)
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, logits_TE)[0].abs().max() == 0.0
    unmet = global_entropy_loss(logits_TE.softmax(dim=-1))
    assert unmet.item() == pytest.approx(math.log(4 / 3), abs=2e-3)
    assert torch.autograd.grad(unmet, logits_TE)[0].abs().max() > 0.0


def test_global_entropy_refuses_an_impossible_minimum():
    with pytest.raises(ValueError, match=r"min_experts must be in \[1, 2\], but got 3"):
        global_entropy_loss(GATES_TE, min_experts=3)


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits_TE, mask_T: load_balance_loss(
            logits_TE.softmax(dim=-1), logits_TE.argmax(dim=-1, keepdim=True), mask_T
        ),
        router_z_loss,
        lambda logits_TE, mask_T: importance_loss(logits_TE.softmax(dim=-1), mask_T),
        lambda logits_TE, mask_T: load_loss(logits_TE, logits_TE.flip(-1), 1, 0.5, mask_T),
        local_entropy_loss,
        lambda logits_TE, mask_T: global_entropy_loss(logits_TE.softmax(dim=-1), mask_T),
    ],
    ids=["load_balance", "z", "importance", "load", "local_entropy", "global_entropy"],
)
def test_padding_is_not_counted_and_needs_at_least_one_token(loss):
    assert loss(PADDED_TE, MASK_T).item() == pytest.approx(loss(LOGITS_TE, None).item(), abs=1e-7)
    assert loss(PADDED_TE, None).item() != pytest.approx(loss(LOGITS_TE, None).item(), abs=1e-3)
    with pytest.raises(ValueError, match="no valid token"):
        loss(PADDED_TE, torch.zeros(3, dtype=torch.bool))


def test_aux_loss_is_the_weighted_sum_of_its_parts():
    torch.manual_seed(0)
    logits_TE = torch.randn(20, 4)
    noisy_TE = logits_TE + 0.25 * torch.randn(20, 4)
    gates_TE = logits_TE.softmax(dim=-1)
    weights = AuxLossWeights(
        load_balance=0.5,
        balance_top_k=True,
        z=0.3,
        importance=0.2,
        load=0.1,
        local_entropy=0.7,
        global_entropy=0.9,
        global_entropy_min_experts=4,
    )
    expected = (
        0.5 * load_balance_loss(gates_TE, noisy_TE.topk(2).indices)
        + 0.3 * router_z_loss(logits_TE)
        + 0.2 * importance_loss(gates_TE)
        + 0.1 * load_loss(logits_TE, noisy_TE, 2, 0.25)
        + 0.7 * local_entropy_loss(logits_TE)
        + 0.9 * global_entropy_loss(gates_TE)
    )
    actual = aux_loss(logits_TE, noisy_TE, None, top_k=2, noise_std=0.25, weights=weights)
    torch.testing.assert_close(actual, expected)


def test_aux_loss_balances_first_choices_by_default():
    logits_TE = torch.randn(20, 4)
    actual = aux_loss(logits_TE, None, None, top_k=2, noise_std=0.0, weights=AuxLossWeights(load_balance=1.0))
    expected = load_balance_loss(logits_TE.softmax(dim=-1), logits_TE.argmax(dim=-1, keepdim=True))
    torch.testing.assert_close(actual, expected)


def test_aux_losses_of_sigmoid_scores_take_the_scores_over_their_sum():
    logits_TE = torch.randn(20, 4)
    weights = AuxLossWeights(load_balance=0.5, importance=0.2, local_entropy=0.7)
    gates_TE = logits_TE.sigmoid() / logits_TE.sigmoid().sum(dim=-1, keepdim=True)
    expected = (
        0.5 * load_balance_loss(gates_TE, logits_TE.argmax(dim=-1, keepdim=True))
        + 0.2 * importance_loss(gates_TE)
        + 0.7 * torch.special.entr(gates_TE).sum(dim=-1).mean()
    )
    actual = aux_loss(logits_TE, None, None, top_k=2, noise_std=0.0, weights=weights, scoring_func="sigmoid")
    torch.testing.assert_close(actual, expected)
