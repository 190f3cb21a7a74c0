"""Random layers for the kernels, their gradients, and torch.empty that is full of NaN."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from vision_moe.kernels import ExpertWeights, routed_mlp


class Layer(NamedTuple):
    """The inputs of one layer and a random gradient at its output."""

    x_TD: Tensor
    experts_TK: Tensor
    gates_TK: Tensor
    weights: ExpertWeights
    upstream_TD: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """What gets a gradient."""
        return [tensor for tensor in (self.x_TD, self.gates_TK, *self.weights) if tensor is not None]


@pytest.fixture(autouse=True)
def _torch_empty_is_full_of_nan() -> Iterator[None]:
    """A kernel that reads what it never wrote then shows."""
    torch.use_deterministic_algorithms(True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def make_layer() -> Callable[..., Layer]:
    """Makes a seeded layer of T tokens, E experts, K of them per token, widths D and F."""

    def make(T: int, E: int, K: int, D: int, F: int, *, gated: bool = False, bias: bool = True, **where: Any) -> Layer:
        generator = torch.Generator().manual_seed(T + 10 * E + 100 * K)

        def randn(*shape: int, std: float = 1.0) -> Tensor:
            tensor = torch.randn(*shape, generator=generator, dtype=torch.float64) * std
            return tensor.to(**{"dtype": torch.float32, **where}).requires_grad_()

        H = 2 * F if gated else F
        scores_TE = torch.randn(T, E, generator=generator).softmax(dim=-1)
        gates_TK, experts_TK = scores_TE.topk(K, dim=-1)
        weights = ExpertWeights(
            randn(E, H, D, std=D**-0.5),
            randn(E, H, std=0.3) if bias else None,
            randn(E, D, F, std=F**-0.5),
            randn(E, D, std=0.3) if bias else None,
        )
        device = where.get("device", "cpu")
        gates_TK = gates_TK.to(device, torch.promote_types(where.get("dtype", torch.float32), torch.float32))
        upstream_TD = randn(T, D).detach()
        return Layer(randn(T, D), experts_TK.to(device), gates_TK.requires_grad_(), weights, upstream_TD)

    return make


@pytest.fixture(scope="session")
def run_layer() -> Callable[..., list[Tensor]]:
    """The output of a layer on a backend, and every gradient."""

    def run(layer: Layer, backend: str, activation: str = "quick_gelu") -> list[Tensor]:
        y_TD = routed_mlp(layer.x_TD, layer.experts_TK, layer.gates_TK, layer.weights, activation, backend)
        return [y_TD.detach(), *torch.autograd.grad(y_TD, layer.leaves, layer.upstream_TD)]

    return run
