"""Experts by torch.nn.functional.grouped_mm: fused on sm90 and sm100 in bfloat16, else a loop over cuBLAS.

No step waits for the device. grouped_mm leaves rows past the last expert's unwritten, refuses gradients with expanded
strides and adds no bias; this file sees to the three.

T tokens, D model dim, F hidden dim, E experts, K experts per token, N = T * K slots; H = F, 2 F if gated.
"""

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from vision_moe.kernels.activation import FUSED, mlp_activation, mlp_activation_gradient
from vision_moe.kernels.problem import ExpertWeights, Gradients, Needs, Problem

# grouped_mm wants every stride to be a multiple of so many bytes.
_ALIGNMENT = 16


def is_aligned(weights: ExpertWeights) -> bool:
    """Whether grouped_mm takes matrices of these sizes."""
    itemsize = weights.w1_EHD.element_size()
    return all(dim * itemsize % _ALIGNMENT == 0 for dim in (*weights.w1_EHD.shape[1:], weights.w2_EDF.shape[2]))


class _Rows:
    """The slots in the order of their experts: which token and expert, and which are computed at all."""

    def __init__(self, problem: Problem) -> None:
        self.token_N = problem.order_N // problem.top_k
        self.ends_E = problem.tokens_per_expert_E.cumsum(0).to(torch.int32)
        N = len(problem.order_N)
        position_N = torch.arange(N, dtype=torch.int32, device=problem.order_N.device)
        expert_N = torch.searchsorted(self.ends_E, position_N, right=True)
        self.computed_N1 = (expert_N < len(self.ends_E))[:, None]
        self.expert_N = expert_N.clamp_(max=len(self.ends_E) - 1)
        self.slot_N = problem.order_N
        self.tokens, self.top_k = len(problem.x_TD), problem.top_k
        self.gate_N1 = torch.ones((), dtype=problem.accumulate, device=position_N.device).expand(N, 1)
        if problem.gates_TK is not None:
            self.gate_N1 = problem.gates_TK.flatten().index_select(0, self.slot_N)[:, None]

    def sum_per_token(self, rows_ND: Tensor, num_tokens: int) -> Tensor:
        """Sum over each token's K slots, in the order of its slots and so the same in every run."""
        slots_ND = torch.empty_like(rows_ND).index_copy_(0, self.slot_N, rows_ND.where(self.computed_N1, 0))
        return slots_ND.view(num_tokens, self.top_k, rows_ND.shape[1]).sum(dim=1)

    def sum_per_expert(self, rows_NX: Tensor) -> Tensor:
        """Sum over each expert's rows, float[E, X]; a product, because index_add is in no fixed order on GPUs."""
        experts_E = torch.arange(len(self.ends_E), device=rows_NX.device)
        member_EN = (self.expert_N == experts_E[:, None]).to(rows_NX.dtype)
        return member_EN @ rows_NX.where(self.computed_N1, 0)


def forward(problem: Problem, *, save: bool) -> tuple[Tensor, Tensor]:
    """The layer's output and its pre-activation; as `vision_moe.kernels.cpu.forward`."""
    weights, rows = problem.weights, _Rows(problem)
    h_NH = grouped_mm(problem.x_TD.index_select(0, rows.token_N), weights.w1_EHD.mT, offs=rows.ends_E)
    if weights.b1_EH is not None:
        h_NH += weights.b1_EH[rows.expert_N]
    a_NF = mlp_activation(h_NH, FUSED[problem.activation], gated=weights.is_gated)
    y_ND = grouped_mm(a_NF, weights.w2_EDF.mT, offs=rows.ends_E)
    if weights.b2_ED is not None:
        y_ND += weights.b2_ED[rows.expert_N]
    y_TD = rows.sum_per_token(y_ND * rows.gate_N1, rows.tokens)
    return y_TD, h_NH if save else h_NH.new_empty(0, h_NH.shape[1])


def backward(problem: Problem, h_NH: Tensor, grad_TD: Tensor, needs: Needs) -> Gradients:
    """The gradients that are asked for; formulas and arguments as `vision_moe.kernels.cpu.backward`."""
    weights, rows, dtype = problem.weights, _Rows(problem), h_NH.dtype
    function, gated = FUSED[problem.activation], weights.is_gated
    g_ND = grad_TD.to(dtype).index_select(0, rows.token_N)
    weighted_ND = (g_ND * rows.gate_N1).to(dtype)
    dx = dgates = dw1 = db1 = dw2 = db2 = None
    if needs.b2 and weights.b2_ED is not None:
        db2 = rows.sum_per_expert(weighted_ND)
    a_NF = mlp_activation(h_NH, function, gated=gated)
    if needs.w2:
        dw2 = grouped_mm(weighted_ND.t(), a_NF, offs=rows.ends_E)
    u_NF = grouped_mm(g_ND, weights.w2_EDF, offs=rows.ends_E) if needs.hidden or needs.gates else None
    if needs.gates and u_NF is not None:
        dgates = _gates_gradient(problem, rows, g_ND, a_NF * u_NF)
    if needs.hidden and u_NF is not None:
        dh_NH = (mlp_activation_gradient(u_NF, h_NH, function, gated=gated) * rows.gate_N1).to(dtype)
        if needs.b1 and weights.b1_EH is not None:
            db1 = rows.sum_per_expert(dh_NH)
        if needs.w1:
            dw1 = grouped_mm(dh_NH.t(), problem.x_TD.index_select(0, rows.token_N), offs=rows.ends_E)
        if needs.x:
            dx_ND = grouped_mm(dh_NH, weights.w1_EHD, offs=rows.ends_E).to(problem.accumulate)
            dx = rows.sum_per_token(dx_ND, len(grad_TD)).to(dtype)
    return Gradients(dx, dgates, dw1, db1, dw2, db2)


def _gates_gradient(problem: Problem, rows: _Rows, g_ND: Tensor, product_NF: Tensor) -> Tensor | None:
    """float[T, K], 0 at slots that are not computed."""
    if problem.gates_TK is None:
        return None
    dgate_N = product_NF.sum(dim=-1, dtype=problem.gates_TK.dtype)
    if problem.weights.b2_ED is not None:
        dgate_N += (g_ND * problem.weights.b2_ED[rows.expert_N]).sum(dim=-1, dtype=dgate_N.dtype)
    computed_N = rows.computed_N1[:, 0]
    return torch.empty_like(dgate_N).index_copy_(0, rows.slot_N, dgate_N.where(computed_N, 0)).view_as(problem.gates_TK)
