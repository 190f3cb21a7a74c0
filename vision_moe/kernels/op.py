"""One operator for a layer's experts, so that autograd and torch.compile see one node, whatever computes it.

T tokens, D model dim, F hidden dim, E experts, K experts per token, N = T * K slots; H = F, 2 F if gated.
"""

import logging
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, library

from vision_moe.kernels import cpu, grouped
from vision_moe.kernels.problem import ExpertWeights, Needs, Problem

logger = logging.getLogger(__name__)


def _implementation(backend: str) -> ModuleType:
    if backend == "triton":
        # Here and not above: triton is absent where there is no GPU.
        from vision_moe.kernels import triton

        return triton
    return {"cpu": cpu, "grouped": grouped}[backend]


@lru_cache
def _log_pick(backend: str, device: str, dtype: torch.dtype) -> None:
    logger.info("experts on %s in %s: backend %s", device, dtype, backend)


@library.custom_op("vision_moe::routed_mlp", mutates_args=())
def routed_mlp(
    x_TD: Tensor,
    gates_TK: Tensor | None,
    w1_EHD: Tensor,
    b1_EH: Tensor | None,
    w2_EDF: Tensor,
    b2_ED: Tensor | None,
    order_N: Tensor,
    tokens_per_expert_E: Tensor,
    activation: str,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The layer's output float[T, D], and what its backward pass needs, float[N, H]; see `Problem` for the rest."""
    _log_pick(backend, str(x_TD.device), x_TD.dtype)
    weights = ExpertWeights(w1_EHD, b1_EH, w2_EDF, b2_ED)
    problem = Problem(x_TD, gates_TK, weights, order_N, tokens_per_expert_E, activation)
    # The operands have their dtype already.
    with torch.autocast(x_TD.device.type, enabled=False):
        return _implementation(backend).forward(problem, save=save)


@routed_mlp.register_fake
def _(
    x_TD: Tensor,
    gates_TK: Tensor | None,
    w1_EHD: Tensor,
    b1_EH: Tensor | None,
    w2_EDF: Tensor,
    b2_ED: Tensor | None,
    order_N: Tensor,
    tokens_per_expert_E: Tensor,
    activation: str,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    y_TD = torch.empty_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    return y_TD, x_TD.new_empty(len(order_N) if save else 0, w1_EHD.shape[1])


@library.custom_op("vision_moe::routed_mlp_backward", mutates_args=())
def routed_mlp_backward(
    x_TD: Tensor,
    gates_TK: Tensor | None,
    w1_EHD: Tensor,
    b1_EH: Tensor | None,
    w2_EDF: Tensor,
    b2_ED: Tensor | None,
    order_N: Tensor,
    tokens_per_expert_E: Tensor,
    activation: str,
    backend: str,
    h_NH: Tensor,
    grad_TD: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the six float inputs of `routed_mlp`; those that `needs` does not ask for are empty."""
    weights = ExpertWeights(w1_EHD, b1_EH, w2_EDF, b2_ED)
    problem = Problem(x_TD, gates_TK, weights, order_N, tokens_per_expert_E, activation)
    with torch.autocast(grad_TD.device.type, enabled=False):
        gradients = _implementation(backend).backward(problem, h_NH, grad_TD, Needs(*needs))
    return tuple(grad_TD.new_empty(0) if gradient is None else gradient for gradient in gradients)


@routed_mlp_backward.register_fake
def _(
    x_TD: Tensor,
    gates_TK: Tensor | None,
    w1_EHD: Tensor,
    b1_EH: Tensor | None,
    w2_EDF: Tensor,
    b2_ED: Tensor | None,
    order_N: Tensor,
    tokens_per_expert_E: Tensor,
    activation: str,
    backend: str,
    h_NH: Tensor,
    grad_TD: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx_TD = grad_TD.new_empty(grad_TD.shape, dtype=w1_EHD.dtype)
    like = (dx_TD, gates_TK, w1_EHD, b1_EH, w2_EDF, b2_ED)
    return tuple(  # type: ignore[return-value]
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if needed and tensor is not None
        else grad_TD.new_empty(0)
        for needed, tensor in zip(needs, like, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_TD, gates_TK, *weights, order_N, tokens_per_expert_E, activation, backend, save = inputs
    h_NH = output[1]
    ctx.mark_non_differentiable(h_NH)
    ctx.set_materialize_grads(False)
    if not save:
        return
    # x only enters the gradients of W1 and b1; a frozen stack has no use for it.
    saved_x_TD = x_TD if any(ctx.needs_input_grad[2:4]) else x_TD.new_empty(0, x_TD.shape[1])
    ctx.save_for_backward(saved_x_TD, gates_TK, *weights, order_N, tokens_per_expert_E, h_NH)
    ctx.names = activation, backend


def _backward(ctx: Any, grad_TD: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:6])
    nothing = (None,) * 5
    if grad_TD is None:
        return (None,) * 6 + nothing
    *operands, h_NH = ctx.saved_tensors
    gradients = routed_mlp_backward(*operands, *ctx.names, h_NH, grad_TD.contiguous(), needs)
    return (*(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)), *nothing)


routed_mlp.register_autograd(_backward, setup_context=_setup_context)
