"""How the routers of a training step spread the tokens, per MoE block, as numbers for metrics.jsonl.

L MoE blocks of a tower, E experts.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vision_moe.distributed import mean_over_ranks, sum_over_ranks
from vision_moe.model.outputs import LIMoEModalityOutput


class RoutingMetrics:
    """Gathers the counts of a CLIP-MoE's outputs until they are logged.

    Per block i of the tower "vision" or "text" there are, over all tokens and ranks since the last log:

    * `moe/vision/layer{i}/max_violation`: MaxVio of Wang et al. 2024 (arXiv:2408.15664), the share by which the busiest
      expert's tokens exceed the mean over experts; 0 when balanced, E / K - 1 when all tokens choose the same K.
    * `moe/vision/layer{i}/dropped_fraction`: mean share of dropped choices, see `vision_moe.moe.layer.MoEOutput`.
    """

    def __init__(self) -> None:
        self._tokens_LE: dict[str, list[Tensor]] = {}
        self._dropped_L: dict[str, list[Tensor]] = {}

    def add(self, outputs: Any) -> None:
        """Takes in the outputs of one forward; a dense model's hold nothing to count.

        Nor do a LIMoE's, whose modalities are no towers: `vision_moe.modality_routing` tells of them.
        """
        for tower in ("vision", "text"):
            output: Any = getattr(outputs, f"{tower}_model_output", None)
            tokens_LE = getattr(output, "tokens_per_expert", None)
            if tokens_LE is not None and not isinstance(output, LIMoEModalityOutput):
                self._tokens_LE.setdefault(tower, []).append(tokens_LE.detach())
                self._dropped_L.setdefault(tower, []).append(output.dropped_fraction.detach())

    def pop(self, config: Any) -> dict[str, float]:
        """The metrics since the last call, by name; every rank must call it.

        Args:
            config: of the model, for the numbers of its MoE blocks.
        """
        metrics = dict(self._named(config))
        self._tokens_LE, self._dropped_L = {}, {}
        return metrics

    def _named(self, config: Any) -> Iterator[tuple[str, float]]:
        for tower, tokens in self._tokens_LE.items():
            tokens_LE = sum_over_ranks(torch.stack(tokens).sum(dim=0)).double()
            mean_L = tokens_LE.mean(dim=1)
            violation_L = tokens_LE.amax(dim=1) / mean_L.clamp(min=1) - 1
            dropped_L = mean_over_ranks(torch.stack(self._dropped_L[tower]).mean(dim=0))
            layers = getattr(config, f"{tower}_config").moe_block_indices
            for layer, violation, dropped in zip(layers, violation_L.tolist(), dropped_L.tolist(), strict=True):
                yield f"moe/{tower}/layer{layer}/max_violation", violation
                yield f"moe/{tower}/layer{layer}/dropped_fraction", dropped
