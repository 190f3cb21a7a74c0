"""Similarity of experts against values worked by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from vision_moe.expert_similarity import expert_outputs, linear_cka, mean_cosine, weight_similarity
from vision_moe.moe.experts import Experts


@pytest.fixture
def experts() -> Experts:
    torch.manual_seed(0)
    config = SimpleNamespace(
        num_experts=3, hidden_size=4, intermediate_size=6, hidden_act="gelu", _experts_implementation="eager"
    )
    return Experts(config)


def test_equal_weights_have_one_and_opposite_ones_less_one(experts: Experts) -> None:
    for parameter in experts.parameters():
        parameter.data[1] = parameter.data[0]
        parameter.data[2] = -2 * parameter.data[0]
    found = weight_similarity(experts)
    expected = torch.tensor([[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_every_part_of_the_weights_counts(experts: Experts) -> None:
    for parameter in experts.parameters():
        parameter.data.zero_()
    # Expert 0 is (3, 4) in two parts, expert 1 has the first alone.
    experts.up_proj.data[0, 0, 0], experts.down_proj_bias.data[0, 0] = 3.0, 4.0
    experts.up_proj.data[1, 0, 0] = 1.0
    assert weight_similarity(experts)[0, 1] == pytest.approx(3 / 5)


def test_outputs_are_each_experts_own_for_every_token(experts: Experts) -> None:
    x_VD = torch.randn(5, 4)
    outputs_EVD = expert_outputs(experts, x_VD)
    for expert in range(3):
        hidden = torch.nn.functional.gelu(x_VD @ experts.up_proj[expert].T + experts.up_proj_bias[expert])
        expected = hidden @ experts.down_proj[expert].T + experts.down_proj_bias[expert]
        torch.testing.assert_close(outputs_EVD[expert], expected.double(), atol=1e-5, rtol=1e-5)


def test_mean_cosine_is_that_worked_by_hand() -> None:
    # Token 0: the same direction; token 1: 60 degrees apart.
    y_EVD = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[2.0, 0.0], [0.5, math.sqrt(0.75)]]], dtype=torch.float64)
    assert mean_cosine(y_EVD)[0, 1] == pytest.approx((1 + 0.5) / 2)


def test_cka_ignores_rotation_scale_and_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    y_VD = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    assert linear_cka(torch.stack([y_VD, 5 * y_VD @ rotation + 7]))[0, 1] == pytest.approx(1.0)


def test_cka_is_that_worked_by_hand() -> None:
    # Centered: a = (1, -1, 0, 0) and b = (1, -1, 1, -1) / in one column each: (a.b)^2 / (a.a b.b) = 4 / (2 * 4).
    a, b = torch.tensor([1.0, -1.0, 0.0, 0.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    found = linear_cka(torch.stack([a, b])[..., None].double())
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64))


def test_cka_of_an_output_that_never_varies_is_zero() -> None:
    y_EVD = torch.stack([torch.ones(4, 2), torch.arange(8.0).view(4, 2)]).double()
    assert linear_cka(y_EVD)[0, 1] == 0.0
