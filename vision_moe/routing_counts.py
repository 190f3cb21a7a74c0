"""Running counts of which experts take the tokens (CLIP-MoE, Zhang et al. 2024, appendix A.3).

Shapes: V valid tokens, E experts, K experts chosen per token.
"""

from typing import Any

import torch
from torch import Tensor

from vision_moe.moe.dispatch import count_tokens
from vision_moe.moe.router import RouterOutput
from vision_moe.routing_trace import MODALITIES, Visit


class BlockCounts:
    """Counts of one MoE block.

    Args:
        num_experts: E.
        expert_choice: whether experts choose tokens, and so what a choice is.
    """

    def __init__(self, num_experts: int, *, expert_choice: bool = False) -> None:
        self.num_experts = num_experts
        self.expert_choice = expert_choice
        self.num_tokens = 0
        self._first_E = torch.zeros(num_experts, dtype=torch.int64)
        self._any_E = torch.zeros(num_experts, dtype=torch.int64)
        self._scores_E = torch.zeros(num_experts, dtype=torch.float64)
        self._entropy = 0.0
        self._num_choices = 0
        self._num_dropped = 0

    def add(self, routed: RouterOutput, experts_VK: Tensor) -> None:
        """Counts the tokens of one pass; see `vision_moe.routing_trace.Visit`."""
        scores_VE = routed.gates_TE.double()
        chosen_VK, first_V = routed.topk_experts_TK, routed.topk_experts_TK[:, 0]
        dropped_VK = experts_VK == self.num_experts
        if self.expert_choice:
            # A token's first expert is the one of highest score among those that took it.
            chosen_VK, dropped_VK = experts_VK, dropped_VK.all(dim=-1, keepdim=True)
            first_V = scores_VE.masked_fill(experts_VK == self.num_experts, -1.0).argmax(dim=-1)[~dropped_VK[:, 0]]
        # As the router losses see them: sigmoids are divided by their sum, a softmax sums to 1 already.
        shares_VE = scores_VE / scores_VE.sum(dim=-1, keepdim=True)
        self._first_E += count_tokens(first_V, self.num_experts).cpu()
        self._any_E += count_tokens(chosen_VK, self.num_experts).cpu()
        self._scores_E += scores_VE.sum(dim=0).cpu()
        self._entropy += float(torch.special.entr(shares_VE).sum())
        self._num_choices += dropped_VK.numel()
        self._num_dropped += int(dropped_VK.sum())
        self.num_tokens += len(scores_VE)

    def summary(self) -> dict[str, Any]:
        """Counts and shares as plain values; see `vision_moe.analysis.utilization` for the keys."""
        tokens = max(self.num_tokens, 1)
        return {
            "tokens_top_k": self._any_E.tolist(),
            "tokens_top_1": self._first_E.tolist(),
            "share_top_k": (self._any_E / tokens).tolist(),
            "share_top_1": (self._first_E / tokens).tolist(),
            "mean_gates": (self._scores_E / tokens).tolist(),
            "gate_entropy": self._entropy / tokens,
            "dropped_fraction": self._num_dropped / max(self._num_choices, 1),
        }


class RoutingCounts:
    """Counts of every MoE block, by modality; a visitor of `vision_moe.routing_trace.trace`."""

    def __init__(self) -> None:
        self._blocks: dict[str, dict[int, BlockCounts]] = {}
        self._top_k: dict[str, int] = {}

    def __call__(self, visit: Visit) -> None:
        blocks = self._blocks.setdefault(visit.modality, {})
        mlp = visit.mlp
        if visit.block not in blocks:
            blocks[visit.block] = BlockCounts(mlp.router.num_experts, expert_choice=mlp.expert_choice)
            self._top_k[visit.modality] = mlp.router.top_k
        blocks[visit.block].add(visit.routed, visit.experts_VK)

    def towers(self) -> dict[str, Any]:
        """The counts of each modality that has MoE blocks."""
        return {name: self._tower(name) for name in MODALITIES if name in self._blocks}

    def _tower(self, name: str) -> dict[str, Any]:
        blocks = dict(sorted(self._blocks[name].items()))
        summaries = [counts.summary() for counts in blocks.values()]
        first = next(iter(blocks.values()))
        choices: float = self._top_k[name]
        if first.expert_choice:
            choices = sum(map(sum, (of["share_top_k"] for of in summaries))) / len(summaries)
        return {
            "layers": list(blocks),
            "num_experts": first.num_experts,
            "top_k": choices,
            "num_tokens": first.num_tokens,
            **{key: [of[key] for of in summaries] for key in summaries[0]},
        }
