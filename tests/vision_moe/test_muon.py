"""Guarantees of vision_moe.muon: which half takes which parameter, schedulers reach both, and exact resume."""

import copy

import pytest
import torch
from torch import nn

from vision_moe.muon import MuonAdamW


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 8)
        self.linear = nn.Linear(8, 6)
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.table.weight
        self.experts = nn.Parameter(torch.randn(2, 8, 6) * 0.1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        return self.linear(x).square().mean() + torch.einsum("bd,edh->beh", x, self.experts).square().mean()


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.arange(5)).backward()
        optimizer.step()


def test_muon_takes_linear_weights_and_adamw_the_rest_without_decay_on_vectors() -> None:
    model = _Small()
    optimizer = MuonAdamW(model, lr=0.01, weight_decay=0.1)
    by_half = [{id(p) for g in half.param_groups for p in g["params"]} for half in (optimizer.muon, optimizer.adamw)]
    assert by_half[0] == {id(model.linear.weight)}
    assert by_half[1] == {id(p) for p in (model.table.weight, model.linear.bias, model.experts)}
    decay = {id(p): g["weight_decay"] for g in optimizer.adamw.param_groups for p in g["params"]}
    assert (decay[id(model.linear.bias)], decay[id(model.table.weight)]) == (0.0, 0.1)


def test_first_step_of_a_matrix_is_near_orthogonal_at_adamw_size() -> None:
    # Newton-Schulz brings singular values into about [0.7, 1.2]; the scale is 0.2 sqrt(max(A, B)).
    torch.manual_seed(0)
    model = _Small()
    before = model.linear.weight.detach().clone()
    _steps(model, MuonAdamW(model, lr=0.01), 1)
    step = (before - model.linear.weight.detach()) / (0.01 * 0.2 * 8**0.5)
    singular = torch.linalg.svdvals(step)
    assert 0.5 < singular[:5].min() <= singular[0] < 1.3


def test_scheduler_sets_the_learning_rate_of_both_halves() -> None:
    optimizer = MuonAdamW(_Small(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert scheduler.get_last_lr() == [0.005] * 3
    assert optimizer.muon.param_groups[0]["lr"] == optimizer.adamw.param_groups[0]["lr"] == 0.005


def test_resumed_run_equals_an_unbroken_one() -> None:
    torch.manual_seed(0)
    model = _Small()
    optimizer = MuonAdamW(model, lr=0.01, weight_decay=0.1)
    _steps(model, optimizer, 3)
    resumed = copy.deepcopy(model)
    second = MuonAdamW(resumed, lr=0.5)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _steps(model, optimizer, 3)
    _steps(resumed, second, 3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
    scheduler = torch.optim.lr_scheduler.LambdaLR(second, lambda step: 0.5)
    assert second.muon.param_groups[0]["lr"] == scheduler.get_last_lr()[0]


def test_model_without_trained_linear_weight_is_refused() -> None:
    model = _Small()
    model.linear.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="set optimizer: adamw"):
        MuonAdamW(model, lr=0.01)
