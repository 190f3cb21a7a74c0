"""Experts by Triton: two launches forward, four backward, none waits for the device. Unmeasured: no GPU ran it yet.

Forward: gather, W1, bias and activation; then W2, bias and gate, stored at the row's slot and summed over a token's
slots. Backward: the hidden gradient with the gates' gradient; the input's; and those of W1 and W2, each with its bias.
The formulas are those of `vision_moe.kernels.cpu`.

T tokens, D model dim, F hidden dim, E experts, K experts per token, N = T * K slots; H = F, 2 F if gated.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from vision_moe.kernels.activation import FUSED
from vision_moe.kernels.problem import Gradients, Needs, Problem
from vision_moe.kernels.triton_kernels import down_kernel, hidden_gradient_kernel, up_kernel, weight_gradient_kernel


class Config(NamedTuple):
    """Sizes of a launch.

    Attributes:
        m: rows of the output tile.
        n: its columns.
        k: depth of a step.
        warps: per program.
        stages: of the software pipeline.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int


# By bytes per element, for tiles with one and with two accumulators. These spill no register and fit the shared memory
# of every architecture in ARCHITECTURES, for which tests compile them.
_CONFIGS = {
    (2, 1): Config(128, 128, 64, 8, 3),
    (2, 2): Config(128, 64, 64, 8, 3),
    (4, 1): Config(128, 128, 32, 8, 3),
    (4, 2): Config(128, 64, 32, 8, 3),
}
# Compute capabilities that the tests compile for.
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
_INTERPRETED = Config(32, 32, 32, 4, 1)


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set when triton was imported: kernels then run in Python, on CPU tensors."""
    return not isinstance(up_kernel, triton.JITFunction)


def config(dtype: torch.dtype, accumulators: int = 1) -> Config:
    """Sizes of a launch.

    Args:
        dtype: of the operands.
        accumulators: tiles that one program sums at a time.
    """
    return _INTERPRETED if is_interpreted() else _CONFIGS[dtype.itemsize, accumulators]


class _Tiles:
    """Tiles of rows, one expert each; the number of tiles is an upper bound, so that nothing waits for the counts."""

    def __init__(self, problem: Problem, block: int) -> None:
        counts_E = problem.tokens_per_expert_E
        E, N = len(counts_E), len(problem.order_N)
        self.ends_E = counts_E.cumsum(0)
        self.count = -(-N // block) + E
        tiles_E = (counts_E + block - 1) // block
        last_E = tiles_E.cumsum(0)
        tile = torch.arange(self.count, device=counts_E.device)
        expert = torch.searchsorted(last_E, tile, right=True)
        inside = expert.clamp(max=E - 1)
        in_expert = tile - (last_E - tiles_E)[inside]
        self.start = (self.ends_E - counts_E)[inside] + in_expert * block
        self.expert = torch.where(expert < E, inside, -1).to(torch.int32)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the kernels take: tile_expert, tile_start, ends_E."""
        return self.expert, self.start, self.ends_E


def _options(dtype: torch.dtype) -> dict[str, Any]:
    # "tf32" where torch's own products may use it.
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return {"PRECISION": precision, "UPCAST": is_interpreted() and dtype == torch.bfloat16}


def _launch(sizes: Config) -> dict[str, int]:
    blocks = {"BLOCK_M": sizes.m, "BLOCK_N": sizes.n, "BLOCK_K": sizes.k}
    return {**blocks, "num_warps": sizes.warps, "num_stages": sizes.stages}


def _down(problem: Problem, a_NX: Tensor, w_EXY: Tensor, bias: Tensor | None, gates: Tensor | None) -> Tensor:
    """Rows times their expert's matrix, summed over each token's slots: float32[T, Y]."""
    X, Y = w_EXY.shape[1:]
    num_slots = len(problem.order_N)
    # Zero, because slots that are not computed are not written.
    out_SY = torch.zeros(num_slots, Y, dtype=torch.float32, device=a_NX.device)
    sizes = config(a_NX.dtype)
    tiles = _Tiles(problem, sizes.m)
    down_kernel[triton.cdiv(Y, sizes.n), tiles.count](
        a_NX, w_EXY, bias, gates, out_SY, problem.order_N, *tiles.arguments,
        X, Y, w_EXY.stride(1), w_EXY.stride(2),
        HAS_BIAS=bias is not None, HAS_GATE=gates is not None, **_options(a_NX.dtype), **_launch(sizes),
    )  # fmt: skip
    return out_SY.view(num_slots // problem.top_k, problem.top_k, Y).sum(dim=1)


def forward(problem: Problem, *, save: bool) -> tuple[Tensor, Tensor]:
    """The layer's output and its pre-activation; as `vision_moe.kernels.cpu.forward`."""
    x_TD, weights = problem.x_TD, problem.weights
    (_, H, D), F_ = weights.w1_EHD.shape, weights.w2_EDF.shape[2]
    N = len(problem.order_N)
    h_NH, a_NF = x_TD.new_empty(N if save else 0, H), x_TD.new_empty(N, F_)
    if N == 0:
        return torch.zeros_like(x_TD, dtype=problem.accumulate), h_NH
    sizes = config(x_TD.dtype, 2 if weights.is_gated else 1)
    tiles = _Tiles(problem, sizes.m)
    up_kernel[triton.cdiv(F_, sizes.n), tiles.count](
        x_TD, weights.w1_EHD, weights.b1_EH, h_NH, a_NF, problem.order_N, *tiles.arguments,
        D, F_, problem.top_k, x_TD.stride(0), x_TD.stride(1),
        HAS_BIAS=weights.b1_EH is not None, GATED=weights.is_gated, SAVE=save, FUNCTION=FUSED[problem.activation],
        **_options(x_TD.dtype), **_launch(sizes),
    )  # fmt: skip
    y_TD = _down(problem, a_NF, weights.w2_EDF.mT, weights.b2_ED, problem.gates_TK)
    return y_TD, h_NH


def backward(problem: Problem, h_NH: Tensor, grad_TD: Tensor, needs: Needs) -> Gradients:
    """The gradients that are asked for; formulas and arguments as `vision_moe.kernels.cpu.backward`."""
    weights = problem.weights
    if len(problem.order_N) == 0:
        like = (problem.x_TD, problem.gates_TK, *weights)
        return Gradients(*(None if t is None else torch.zeros_like(t) for t in like))
    grad_TD = grad_TD.to(h_NH.dtype)
    dh_NH, a_NF, dgates_TK = _hidden_gradient(problem, h_NH, grad_TD)
    dx_TD = dw1 = db1 = dw2 = db2 = None
    if needs.x:
        dx_TD = _down(problem, dh_NH, weights.w1_EHD, None, None).to(grad_TD.dtype)
    if needs.w1 or needs.b1:
        dw1, db1 = _weight_gradient(problem, dh_NH, problem.x_TD, None, weights.b1_EH, transposed=False)
    if needs.w2 or needs.b2:
        dw2, db2 = _weight_gradient(problem, a_NF, grad_TD, problem.gates_TK, weights.b2_ED, transposed=True)
    return Gradients(dx_TD, dgates_TK, dw1, db1, dw2, db2)


def _hidden_gradient(problem: Problem, h_NH: Tensor, grad_TD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradient at the pre-activation, the hidden state, and the gates' gradient."""
    weights, gates_TK = problem.weights, problem.gates_TK
    D, F_ = weights.w2_EDF.shape[1:]
    N = len(problem.order_N)
    dh_NH, a_NF = torch.empty_like(h_NH), h_NH.new_empty(N, F_)
    # Its epilogue holds several tiles at once.
    sizes = config(h_NH.dtype, 2)
    tiles, num_blocks = _Tiles(problem, sizes.m), triton.cdiv(F_, sizes.n)
    dgate_NB = torch.zeros(N if gates_TK is not None else 0, num_blocks, device=h_NH.device)
    hidden_gradient_kernel[num_blocks, tiles.count](
        grad_TD, weights.w2_EDF, gates_TK, h_NH, dh_NH, a_NF, dgate_NB, problem.order_N,
        *tiles.arguments,
        D, F_, problem.top_k, num_blocks,
        HAS_GATE=gates_TK is not None, GATED=weights.is_gated,
        FUNCTION=FUSED[problem.activation], **_options(h_NH.dtype), **_launch(sizes),
    )  # fmt: skip
    if gates_TK is None:
        return dh_NH, a_NF, None
    dgate_N = dgate_NB.sum(dim=1)
    if weights.b2_ED is not None:
        dot_TE = grad_TD.float() @ weights.b2_ED.float().t()
        expert_N = torch.searchsorted(tiles.ends_E, torch.arange(N, device=h_NH.device), right=True)
        in_range_N = expert_N.clamp(max=dot_TE.shape[1] - 1)
        dot_N = dot_TE[problem.order_N // problem.top_k, in_range_N]
        dgate_N += dot_N.where(expert_N < dot_TE.shape[1], 0)
    return dh_NH, a_NF, torch.empty_like(dgate_N).index_copy_(0, problem.order_N, dgate_N).view_as(gates_TK)


def _weight_gradient(
    problem: Problem, p_NP: Tensor, q_TQ: Tensor, gates_TK: Tensor | None, bias: Tensor | None, *, transposed: bool
) -> tuple[Tensor, Tensor | None]:
    """p^T (gate q) per expert, float[E, P, Q], or [E, Q, P] where transposed, and the bias's gradient."""
    E, P, Q = len(problem.tokens_per_expert_E), p_NP.shape[1], q_TQ.shape[1]
    out = p_NP.new_empty((E, Q, P) if transposed else (E, P, Q))
    out_EPQ = out.mT if transposed else out
    bias_gradient = None if bias is None else torch.empty_like(bias)
    sizes = config(p_NP.dtype)
    weight_gradient_kernel[triton.cdiv(P, sizes.m), triton.cdiv(Q, sizes.n), E](
        p_NP, q_TQ, gates_TK, out_EPQ, bias_gradient, problem.order_N, problem.tokens_per_expert_E.cumsum(0),
        P, Q, problem.top_k, q_TQ.stride(0), q_TQ.stride(1), out_EPQ.stride(1), out_EPQ.stride(2),
        HAS_GATE=gates_TK is not None, SUM="" if bias is None else "q" if transposed else "p",
        **_options(p_NP.dtype), BLOCK_P=sizes.m, BLOCK_Q=sizes.n, BLOCK_R=sizes.k,
        num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip
    return out, bias_gradient
