"""Parameter counts of a mixture: how many there are, and how many work on one token."""

from fractions import Fraction
from typing import NamedTuple

from torch import nn

from vision_moe.moe.layer import MoEMLP


class ParameterCounts(NamedTuple):
    """Numbers of parameters.

    Attributes:
        total: all of them.
        activated: those that one token passes: a MoE block counts its router, its shared expert and K of its E
            experts; with expert choice eval_capacity_factor of them, which is the mean over tokens.
    """

    total: int
    activated: int


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Counts a model's parameters; works on the meta device."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = Fraction(0)
    for module in model.modules():
        if isinstance(module, MoEMLP):
            experts = sum(parameter.numel() for parameter in module.experts.parameters())
            active = Fraction(module.eval_capacity_factor or 0) if module.expert_choice else module.router.top_k
            idle += experts * max(Fraction(0), 1 - Fraction(active, module.router.num_experts))
    return ParameterCounts(total, int(total - idle))
