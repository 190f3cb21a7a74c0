"""Experts on CPU: rows gathered expert by expert, each expert's products on one contiguous slice.

Saved for the backward pass: x and the pre-activation h. The hidden state act(h) is computed again, and the output is
not needed: with u = g W2, the gradient at act(h) but for the gate, the gate's gradient is <u, act(h)> + <g, b2>, exact
for a gate of 0 too (SonicMoE, Guo et al. 2025). All products with gates are taken at width D, never at F.

QuickGELU is silu with a scale on either side; x, biases and gates carry the scales, all narrower than the hidden state.

T tokens, D model dim, F hidden dim, E experts, K experts per token, N = T * K slots, n rows of one expert;
H = F, or 2 F where the MLP is gated.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vision_moe.kernels import gemm
from vision_moe.kernels.activation import FUSED, QUICK_GELU_SCALE, mlp_activation, mlp_activation_gradient
from vision_moe.kernels.problem import Gradients, Needs, Problem

# Rows at a time: the hidden state of so many rows stays in the cache, and its memory is used again.
_TILE = 512


class _Function(NamedTuple):
    """The MLP's activation as function(scale * h) / scale."""

    name: str
    scale: float
    gated: bool


def _function(problem: Problem) -> _Function:
    name, gated = FUSED[problem.activation], problem.weights.is_gated
    if name == "quick_gelu" and not gated:
        return _Function("silu", QUICK_GELU_SCALE, gated)
    return _Function(name, 1.0, gated)


def _slices(tokens_per_expert: list[int], tile: int | None) -> Iterator[tuple[int, slice]]:
    """The rows of each expert, at most `tile` at a time; an expert without rows has none."""
    start = 0
    for expert, count in enumerate(tokens_per_expert):
        stop = start + count
        while start < stop:
            end = min(stop, start + (tile or count))
            yield expert, slice(start, end)
            start = end


def _scaled(tensor: Tensor | None, scale: float) -> Tensor | None:
    return tensor if tensor is None or scale == 1 else tensor * scale


def _gates(problem: Problem, slots_n: Tensor) -> Tensor:
    """Column float[n, 1] of the gates of these slots."""
    if problem.gates_TK is None:
        return torch.ones(len(slots_n), 1, dtype=problem.accumulate)
    return problem.gates_TK.flatten().index_select(0, slots_n)[:, None]


def forward(problem: Problem, *, save: bool) -> tuple[Tensor, Tensor]:
    """The layer's output.

    Args:
        problem: the inputs.
        save: keep the pre-activation for `backward`.

    Returns:
        float[T, D] in `problem.accumulate`, and the scaled pre-activation float[N, H], or [0, H] where it is not saved.
    """
    x_TD, weights, function = problem.x_TD, problem.weights, _function(problem)
    N = len(problem.order_N)
    y_TD = torch.zeros_like(x_TD, dtype=problem.accumulate)
    h_NH = x_TD.new_empty(N if save else 0, weights.w1_EHD.shape[1])
    for expert, rows in _slices(problem.tokens_per_expert_E.tolist(), _TILE):
        slots_n = problem.order_N[rows]
        token_n = slots_n // problem.top_k
        w1_HD, w2_DF = weights.w1_EHD[expert], weights.w2_EDF[expert]
        b1_H = None if weights.b1_EH is None else _scaled(weights.b1_EH[expert], function.scale)
        b2_D = None if weights.b2_ED is None else _scaled(weights.b2_ED[expert], function.scale)
        x_nD = x_TD.index_select(0, token_n)
        if function.scale != 1:
            x_nD.mul_(function.scale)
        if save or function.gated:
            h_nH = h_NH[rows] if save else x_nD.new_empty(len(x_nD), len(w1_HD))
            gemm.linear_into(x_nD, w1_HD, b1_H, h_nH)
            a_nF = mlp_activation(h_nH, function.name, gated=function.gated)
        else:
            a_nF = gemm.activated_linear(x_nD, w1_HD, b1_H, function.name)
        y_nD = gemm.linear(a_nF, w2_DF, b2_D)
        y_TD.index_add_(0, token_n, y_nD * (_gates(problem, slots_n) / function.scale))
    return y_TD, h_NH


def backward(problem: Problem, h_NH: Tensor, grad_TD: Tensor, needs: Needs) -> Gradients:
    """The gradients that are asked for; frozen weights cost nothing.

    Args:
        problem: the inputs; x may be empty where neither x nor w1 needs a gradient.
        h_NH: what `forward` saved.
        grad_TD: float[T, D], gradient at the output.
        needs: which gradients are asked for.
    """
    dtype = problem.weights.w1_EHD.dtype
    gradients = _empty_gradients(problem, grad_TD, needs)
    counts = problem.tokens_per_expert_E.tolist()
    # One product per expert: sums over tiles would pass over every weight gradient once per tile.
    tile = None if needs.w1 or needs.w2 or needs.b1 or needs.b2 else _TILE
    grad_TD = grad_TD.to(dtype)
    for expert, part in _slices(counts, tile):
        slots_n = problem.order_N[part]
        rows = _Rows(expert, slots_n, slots_n // problem.top_k, _gates(problem, slots_n))
        dh_nH = _through_w2(problem, h_NH[part], grad_TD.index_select(0, rows.token_n), gradients, rows)
        if dh_nH is not None:
            _through_w1(problem, dh_nH, gradients, rows)
    for expert, count in enumerate(counts):
        if not count:
            for gradient in gradients[2:]:
                if gradient is not None:
                    gradient[expert].zero_()
    dx_TD, dgates_N, *rest = gradients
    return Gradients(
        None if dx_TD is None else dx_TD.to(dtype),
        None if dgates_N is None or problem.gates_TK is None else dgates_N.view_as(problem.gates_TK),
        *rest,
    )


def _empty_gradients(problem: Problem, grad_TD: Tensor, needs: Needs) -> Gradients:
    """Where the gradients go: zeros where rows are added or slots may be missing, the gates flat."""
    _, gates_TK, weights, *_ = problem
    return Gradients(
        torch.zeros_like(grad_TD, dtype=problem.accumulate) if needs.x else None,
        torch.zeros_like(gates_TK).flatten() if needs.gates and gates_TK is not None else None,
        *(
            torch.empty_like(weight) if needed and weight is not None else None
            for weight, needed in zip(weights, needs[2:], strict=True)
        ),
    )


class _Rows(NamedTuple):
    """One expert's rows: their slots, their tokens, and their gates as a column."""

    expert: int
    slots_n: Tensor
    token_n: Tensor
    gate_n1: Tensor


def _through_w2(problem: Problem, h_nH: Tensor, g_nD: Tensor, out: Gradients, rows: _Rows) -> Tensor | None:
    """Gradients of W2, b2 and the gates; returns that at the pre-activation but for the gate, if anything needs it."""
    weights, function, expert = problem.weights, _function(problem), rows.expert
    hidden = out.x_TD is not None or out.w1_EHD is not None or out.b1_EH is not None
    if out.b2_ED is not None:
        out.b2_ED[expert] = (g_nD * rows.gate_n1).sum(dim=0)
    u_nF = gemm.input_gradient(g_nD, weights.w2_EDF[expert]) if hidden or out.gates_TK is not None else None
    dh_nH = None
    if u_nF is not None and hidden:
        dh_nH = mlp_activation_gradient(u_nF, h_nH, function.name, gated=function.gated)
    if out.w2_EDF is None and out.gates_TK is None:
        return dh_nH
    a_nF = mlp_activation(h_nH, function.name, gated=function.gated)
    if out.w2_EDF is not None:
        weighted_nD = (g_nD * (rows.gate_n1 / function.scale)).to(g_nD.dtype)
        gemm.weight_gradient(weighted_nD, a_nF, out.w2_EDF[expert])
    if out.gates_TK is not None and u_nF is not None:
        dgate_n = a_nF.mul_(u_nF).sum(dim=-1, dtype=out.gates_TK.dtype).div_(function.scale)
        if weights.b2_ED is not None:
            dgate_n += (g_nD @ weights.b2_ED[expert]).to(dgate_n.dtype)
        out.gates_TK[rows.slots_n] = dgate_n
    return dh_nH


def _through_w1(problem: Problem, dh_nH: Tensor, out: Gradients, rows: _Rows) -> None:
    """Gradients of W1, b1 and x."""
    expert, dtype = rows.expert, dh_nH.dtype
    if out.b1_EH is not None:
        out.b1_EH[expert] = (rows.gate_n1.to(dtype).t() @ dh_nH)[0]
    if out.w1_EHD is not None:
        x_nD = (problem.x_TD.index_select(0, rows.token_n) * rows.gate_n1).to(dtype)
        gemm.weight_gradient(dh_nH, x_nD, out.w1_EHD[expert])
    if out.x_TD is not None:
        dx_nD = gemm.input_gradient(dh_nH, problem.weights.w1_EHD[expert])
        out.x_TD.index_add_(0, rows.token_n, dx_nD * rows.gate_n1)
