"""Steps of loss-free balancing: both forms by hand, and that they balance."""

import pytest
import torch

from vision_moe.moe.balance import bias_step
from vision_moe.moe.dispatch import count_tokens
from vision_moe.moe.router import Router


def test_hand_worked_steps():
    """Counts 6, 2, 1, 3 with mean 3: lacks -3, 1, 2, 0, whose mean square is 14 / 4."""
    counts_E = torch.tensor([6, 2, 1, 3])
    torch.testing.assert_close(bias_step(counts_E, 0.1, "sign"), torch.tensor([-0.1, 0.1, 0.1, 0.0]))
    std = 3.5**0.5
    torch.testing.assert_close(bias_step(counts_E, 0.1, "z_score"), torch.tensor([-0.3, 0.1, 0.2, 0.0]) / std)


@pytest.mark.parametrize("form", ["sign", "z_score"])
def test_rows_are_routers_of_their_own_and_equal_counts_stay(form):
    counts_LE = torch.tensor([[6, 2, 1, 3], [5, 5, 5, 5]])
    step_LE = bias_step(counts_LE, 0.1, form)
    assert torch.equal(step_LE[0], bias_step(counts_LE[0], 0.1, form))
    assert step_LE[1].tolist() == [0.0] * 4
    assert step_LE.dtype == torch.float32


@pytest.mark.parametrize("form", ["sign", "z_score"])
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_a_lopsided_router_is_balanced(form, scoring_func):
    torch.manual_seed(0)
    router = Router(8, 4, 1, scoring_func=scoring_func, choice_bias=True)
    with torch.no_grad():
        router.weight.mul_(25)
    # All tokens lean towards expert 0.
    x_TD = torch.randn(400, 8) + router.weight[0].detach()

    def load():
        return count_tokens(router(x_TD).topk_experts_TK, 4)

    assert load().max() > 200
    for _ in range(600):
        router.choice_bias += bias_step(load(), 1e-3, form)
    # 100 each when balanced.
    assert load().max() < 110


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match="must be 'sign' or 'z_score', but got 'linear'"):
        bias_step(torch.ones(2), 0.1, "linear")
