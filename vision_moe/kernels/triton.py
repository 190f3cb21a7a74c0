"""Experts by Triton: two products forward, four backward, none waits for the device. Measured on an H100 only.

Forward: gather, W1, bias and activation; then W2, bias and gate, stored at the row's slot and summed over a token's
slots. Backward: the hidden gradient with the gates' gradient; the input's; and those of W1 and W2, each with its bias.
The formulas are those of `vision_moe.kernels.cpu`.

T tokens, D model dim, F hidden dim, E experts, K experts per token, N = T * K slots; H = F, 2 F if gated.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_moe.kernels.activation import FUSED
from vision_moe.kernels.problem import Gradients, Needs, Problem
from vision_moe.kernels.triton_configs import Config, Configs, configs_of
from vision_moe.kernels.triton_kernels import (
    down_kernel,
    hidden_gradient_kernel,
    up_kernel,
    weight_gradient_kernel,
)
from vision_moe.kernels.triton_tiles import Tiles


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set when triton was imported: kernels then run in Python, on CPU tensors."""
    return not isinstance(up_kernel, triton.JITFunction)


def _configs(x: Tensor) -> Configs:
    if is_interpreted():
        return configs_of(x.dtype, None)
    major, minor = torch.cuda.get_device_capability(x.device)
    return configs_of(x.dtype, 10 * major + minor)


def _options(dtype: torch.dtype) -> dict[str, Any]:
    # "tf32" where torch's own products may use it.
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return {"PRECISION": precision, "UPCAST": is_interpreted() and dtype == torch.bfloat16}


def _index(gathered: Tensor) -> tl.dtype:
    """Offsets of 32 bits, which take half the registers, where they reach all of a tensor."""
    return tl.int32 if gathered.numel() < 2**31 else tl.int64


def _launch(sizes: Config, depth: int) -> dict[str, int | bool]:
    blocks = {"BLOCK_M": sizes.m, "BLOCK_N": sizes.n, "BLOCK_K": sizes.k, "EVEN": depth % sizes.k == 0}
    return {**blocks, "num_warps": sizes.warps, "num_stages": sizes.stages}


def _down(
    problem: Problem,
    tiles: Tiles,
    sizes: Config,
    a_NX: Tensor,
    w_EXY: Tensor,
    bias: Tensor | None = None,
    gates: Tensor | None = None,
) -> Tensor:
    """Rows times their expert's matrix, summed over each token's slots: float32[T, Y]."""
    X, Y = w_EXY.shape[1:]
    num_slots = len(problem.order_N)
    out_SY = torch.empty(num_slots, Y, dtype=torch.float32, device=a_NX.device)
    down_kernel[triton.cdiv(Y, sizes.n), tiles.count](
        a_NX, w_EXY, bias, gates, out_SY, problem.order_N, *tiles.arguments,
        X, Y, w_EXY.stride(1), w_EXY.stride(2),
        HAS_BIAS=bias is not None, HAS_GATE=gates is not None, **_options(a_NX.dtype), **_launch(sizes, X),
    )  # fmt: skip
    return out_SY.view(num_slots // problem.top_k, problem.top_k, Y).sum(dim=1)


def forward(problem: Problem, *, save: bool, configs: Configs | None = None) -> tuple[Tensor, Tensor]:
    """The layer's output and its pre-activation; as `vision_moe.kernels.cpu.forward`, with the launches' sizes."""
    x_TD, weights = problem.x_TD, problem.weights
    (_, H, D), F_ = weights.w1_EHD.shape, weights.w2_EDF.shape[2]
    N = len(problem.order_N)
    h_NH, a_NF = x_TD.new_empty(N if save else 0, H), x_TD.new_empty(N, F_)
    if N == 0:
        return torch.zeros_like(x_TD, dtype=problem.accumulate), h_NH
    configs = configs or _configs(x_TD)
    sizes = configs.up_gated if weights.is_gated else configs.up
    tiles = Tiles(problem, sizes.m)
    up_kernel[triton.cdiv(F_, sizes.n), tiles.count](
        x_TD, weights.w1_EHD, weights.b1_EH, h_NH, a_NF, problem.order_N, *tiles.arguments,
        D, F_, x_TD.stride(0), x_TD.stride(1),
        TOP_K=problem.top_k, HAS_BIAS=weights.b1_EH is not None, GATED=weights.is_gated, SAVE=save,
        FUNCTION=FUSED[problem.activation],
        INDEX=_index(x_TD), **_options(x_TD.dtype), **_launch(sizes, D),
    )  # fmt: skip
    y_TD = _down(problem, tiles, configs.down, a_NF, weights.w2_EDF.mT, weights.b2_ED, problem.gates_TK)
    return y_TD, h_NH


def backward(
    problem: Problem, h_NH: Tensor, grad_TD: Tensor, needs: Needs, configs: Configs | None = None
) -> Gradients:
    """The gradients that are asked for; formulas and arguments as `vision_moe.kernels.cpu.backward`."""
    weights = problem.weights
    if len(problem.order_N) == 0:
        like = (problem.x_TD, problem.gates_TK, *weights)
        return Gradients(*(None if t is None else torch.zeros_like(t) for t in like))
    configs = configs or _configs(h_NH)
    grad_TD = grad_TD.to(h_NH.dtype)
    sizes = configs.hidden_gated if weights.is_gated else configs.hidden
    tiles = Tiles(problem, sizes.m)
    dh_NH, a_NF, dgates_TK = _hidden_gradient(problem, tiles, sizes, h_NH, grad_TD)
    dx_TD = dw1 = db1 = dw2 = db2 = None
    if needs.x:
        dx_TD = _down(problem, tiles, configs.down, dh_NH, weights.w1_EHD).to(grad_TD.dtype)
    if needs.w1 or needs.b1:
        dw1, db1 = _weight_gradient(problem, configs.weight, dh_NH, problem.x_TD, weights.b1_EH, transposed=False)
    if needs.w2 or needs.b2:
        dw2, db2 = _weight_gradient(problem, configs.weight, a_NF, grad_TD, weights.b2_ED, transposed=True)
    return Gradients(dx_TD, dgates_TK, dw1, db1, dw2, db2)


def _hidden_gradient(
    problem: Problem, tiles: Tiles, sizes: Config, h_NH: Tensor, grad_TD: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradient at the pre-activation, the gate-weighted hidden state, and the gates' gradient."""
    weights, gates_TK = problem.weights, problem.gates_TK
    D, F_ = weights.w2_EDF.shape[1:]
    N = len(problem.order_N)
    dh_NH, a_NF = torch.empty_like(h_NH), h_NH.new_empty(N, F_)
    num_blocks = triton.cdiv(F_, sizes.n)
    dgate_NB = torch.zeros(N if gates_TK is not None else 0, num_blocks, device=h_NH.device)
    hidden_gradient_kernel[num_blocks, tiles.count](
        grad_TD, weights.w2_EDF, gates_TK, h_NH, dh_NH, a_NF, dgate_NB, problem.order_N,
        *tiles.arguments,
        D, F_, num_blocks,
        TOP_K=problem.top_k, HAS_GATE=gates_TK is not None, GATED=weights.is_gated,
        FUNCTION=FUSED[problem.activation], INDEX=_index(grad_TD), **_options(h_NH.dtype), **_launch(sizes, D),
    )  # fmt: skip
    if gates_TK is None:
        return dh_NH, a_NF, None
    dgate_N = dgate_NB.sum(dim=1)
    if weights.b2_ED is not None:
        dot_TE = grad_TD.float() @ weights.b2_ED.float().t()
        ends_E = problem.tokens_per_expert_E.cumsum(0)
        expert_N = torch.searchsorted(ends_E, torch.arange(N, device=h_NH.device), right=True)
        in_range_N = expert_N.clamp(max=dot_TE.shape[1] - 1)
        dot_N = dot_TE[problem.order_N // problem.top_k, in_range_N]
        dgate_N += dot_N.where(expert_N < dot_TE.shape[1], 0)
    return dh_NH, a_NF, torch.empty_like(dgate_N).index_copy_(0, problem.order_N, dgate_N).view_as(gates_TK)


def _weight_gradient(
    problem: Problem, sizes: Config, p_NP: Tensor, q_TQ: Tensor, bias: Tensor | None, *, transposed: bool
) -> tuple[Tensor, Tensor | None]:
    """p^T q per expert, float[E, P, Q], and the sum of p; transposed: float[E, Q, P], and the weighted sum of q."""
    E, P, Q = len(problem.tokens_per_expert_E), p_NP.shape[1], q_TQ.shape[1]
    out = p_NP.new_empty((E, Q, P) if transposed else (E, P, Q))
    out_EPQ = out.mT if transposed else out
    bias_gradient = None if bias is None else torch.empty_like(bias)
    weight_gradient_kernel[triton.cdiv(P, sizes.m), triton.cdiv(Q, sizes.n), E](
        p_NP, q_TQ, problem.gates_TK, out_EPQ, bias_gradient, problem.order_N, problem.tokens_per_expert_E.cumsum(0),
        P, Q, q_TQ.stride(0), q_TQ.stride(1), out_EPQ.stride(1), out_EPQ.stride(2),
        TOP_K=problem.top_k, HAS_GATE=problem.gates_TK is not None,
        SUM="" if bias is None else "q" if transposed else "p",
        INDEX=_index(q_TQ), **_options(p_NP.dtype), BLOCK_P=sizes.m, BLOCK_Q=sizes.n, BLOCK_R=sizes.k,
        num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip
    return out, bias_gradient
