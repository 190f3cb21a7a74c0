"""The specification of every kernel: a loop over experts, differentiated by autograd, for any dtype and device.

T tokens, D model dim, F hidden dim, E experts, K experts per token, N = T * K slots, n rows of one expert;
H = F, or 2 F where the MLP is gated. Half precision is computed in float32 and rounded once, at the end.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers.activations import ACT2FN

from vision_moe.kernels.problem import ExpertWeights, expert_order


def grouped_mlp(x_ND: Tensor, weights: ExpertWeights, tokens_per_expert_E: Tensor, activation: str) -> Tensor:
    """Each expert's MLP over its own rows: W2 act(W1 x + b1) + b2, or W2 (act(g) * u) + b2 with [g; u] = W1 x + b1.

    Args:
        x_ND: float[N, D], sorted by expert; rows past the last expert's are not computed.
        weights: of the E experts.
        tokens_per_expert_E: int[E], rows of each expert.
        activation: name in transformers' ACT2FN.

    Returns:
        float[N, D] in the dtype of `x_ND`; 0 where no expert computes.
    """
    accumulate = torch.promote_types(x_ND.dtype, torch.float32)
    *slices, rest_nD = x_ND.to(accumulate).split([*(counts := tokens_per_expert_E.tolist()), len(x_ND) - sum(counts)])
    # unbind, because indexing per expert would build a zero-filled gradient of the whole stack per expert.
    w1_E, w2_E = weights.w1_EHD.to(accumulate).unbind(), weights.w2_EDF.to(accumulate).unbind()
    b1_E, b2_E = (
        [None] * len(w1_E) if b is None else b.to(accumulate).unbind() for b in (weights.b1_EH, weights.b2_ED)
    )
    act = ACT2FN[activation]
    rows = []
    for x_nD, w1_HD, b1_H, w2_DF, b2_D in zip(slices, w1_E, b1_E, w2_E, b2_E, strict=True):
        h_nH = linear(x_nD, w1_HD, b1_H)
        if weights.is_gated:
            gate_nF, up_nF = h_nH.chunk(2, dim=-1)
            a_nF = act(gate_nF) * up_nF
        else:
            a_nF = act(h_nH)
        rows.append(linear(a_nF, w2_DF, b2_D))
    return torch.cat([*rows, torch.zeros_like(rest_nD)]).to(x_ND.dtype)


def routed_mlp(
    x_TD: Tensor, topk_experts_TK: Tensor, topk_gates_TK: Tensor, weights: ExpertWeights, activation: str
) -> Tensor:
    """The gate-weighted sum of the MLPs of each token's experts.

    Args:
        x_TD: float[T, D].
        topk_experts_TK: int64[T, K]; a slot of expert E, one past the last, is not computed.
        topk_gates_TK: float[T, K].
        weights: of the E experts.
        activation: name in transformers' ACT2FN.

    Returns:
        float[T, D] in the dtype of `x_TD`, at least float32.
    """
    accumulate = torch.promote_types(x_TD.dtype, torch.float32)
    order_N, tokens_per_expert_E = expert_order(topk_experts_TK, len(weights.w1_EHD))
    token_N = order_N // max(1, topk_experts_TK.shape[-1])
    y_ND = grouped_mlp(x_TD.to(accumulate).index_select(0, token_N), weights, tokens_per_expert_E, activation)
    weighted_ND = y_ND * topk_gates_TK.to(accumulate).flatten().index_select(0, order_N)[:, None]
    return torch.zeros_like(x_TD, dtype=accumulate).index_add(0, token_N, weighted_ND)
