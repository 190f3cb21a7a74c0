"""What every kernel is given: the experts' weights, and the slots of the routing sorted by expert.

T tokens, D model dim, F hidden dim, E experts, K experts per token, N = T * K slots; H = F, 2 F if gated.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ExpertWeights(NamedTuple):
    """Stacked weights of E MLPs, in the layout of transformers' experts interface.

    Attributes:
        w1_EHD: float[E, H, D]; of a gated MLP the gate's F rows come first, then the F rows that it multiplies.
        b1_EH: float[E, H], or None.
        w2_EDF: float[E, D, F].
        b2_ED: float[E, D], or None.
    """

    w1_EHD: Tensor
    b1_EH: Tensor | None
    w2_EDF: Tensor
    b2_ED: Tensor | None

    @property
    def is_gated(self) -> bool:
        """Whether the MLP is gated: H = 2 F."""
        return self.w1_EHD.shape[1] == 2 * self.w2_EDF.shape[2]

    def to(self, dtype: torch.dtype) -> "ExpertWeights":
        """The same weights in another dtype, differentiable."""
        return ExpertWeights(*(None if weight is None else weight.to(dtype) for weight in self))


class Problem(NamedTuple):
    """The inputs of one layer, checked by `vision_moe.kernels`; all floats but the gates are of one dtype.

    Attributes:
        x_TD: float[T, D].
        gates_TK: float32[T, K] (float64 beside float64), or None: K = 1 and every gate is 1.
        weights: of the E experts.
        order_N: int64[N], slots t * K + k in the order of their experts; those that are not computed come last.
        tokens_per_expert_E: int64[E], slots of each expert.
        activation: one of `vision_moe.kernels.activation.FUSED`.
    """

    x_TD: Tensor
    gates_TK: Tensor | None
    weights: ExpertWeights
    order_N: Tensor
    tokens_per_expert_E: Tensor
    activation: str

    @property
    def top_k(self) -> int:
        """K."""
        return 1 if self.gates_TK is None else self.gates_TK.shape[1]

    @property
    def accumulate(self) -> torch.dtype:
        """The dtype that sums are taken in, and that of the output."""
        return torch.promote_types(self.x_TD.dtype, torch.float32)


class Needs(NamedTuple):
    """Which gradients are asked for, in the order of the custom operator's arguments."""

    x: bool
    gates: bool
    w1: bool
    b1: bool
    w2: bool
    b2: bool

    @property
    def hidden(self) -> bool:
        """Whether the gradient at the pre-activation is needed."""
        return self.x or self.w1 or self.b1


class Gradients(NamedTuple):
    """Gradients of `Problem`'s tensors; None where they are not asked for."""

    x_TD: Tensor | None
    gates_TK: Tensor | None
    w1_EHD: Tensor | None
    b1_EH: Tensor | None
    w2_EDF: Tensor | None
    b2_ED: Tensor | None


def expert_order(topk_experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sorts the slots by expert, without waiting for the device.

    Args:
        topk_experts_TK: int64[T, K]; a slot of expert E is not computed.
        num_experts: E.

    Returns:
        order int64[N], slots t * K + k, those of expert E last, and slots per expert int64[E].
    """
    experts_N = topk_experts_TK.flatten()
    # A comparison, because bincount waits for the device.
    counts_E = (experts_N[:, None] == torch.arange(num_experts, device=experts_N.device)).sum(dim=0)
    return experts_N.argsort(stable=True), counts_E
