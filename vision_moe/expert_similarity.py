"""How alike the experts of a block are: their weights, and what they make of the same tokens.

Experts that start as copies and stay alike are one expert paid for E times. Cosine similarity of weights sees only
what did not move; outputs tell what the experts do. Shapes: V tokens, D model dim, E experts.
"""

from typing import Any

import torch
from torch import Tensor

from vision_moe.moe.experts import Experts
from vision_moe.moe.layer import MoEMLP
from vision_moe.routing_trace import MODALITIES, Visit


def weight_similarity(experts: Experts) -> Tensor:
    """Cosine between the experts' weights, each expert's taken as one vector: float64[E, E]."""
    weights = (experts.up_proj, experts.up_proj_bias, experts.down_proj, experts.down_proj_bias)
    flat_EW = torch.cat([weight.detach().flatten(1) for weight in weights], dim=1).double()
    unit_EW = torch.nn.functional.normalize(flat_EW, dim=-1)
    return (unit_EW @ unit_EW.T).cpu()


@torch.inference_mode()
def expert_outputs(experts: Experts, x_VD: Tensor) -> Tensor:
    """What each expert makes of every token, without any gate: float64[E, V, D]."""
    ones_V1 = torch.ones(len(x_VD), 1, device=x_VD.device)
    outputs = [
        experts(x_VD, torch.full_like(ones_V1, expert, dtype=torch.int64), ones_V1)
        for expert in range(experts.num_experts)
    ]
    return torch.stack(outputs).double()


def mean_cosine(y_EVD: Tensor) -> Tensor:
    """Mean over the tokens of the cosine between two experts' outputs: float64[E, E]."""
    unit_EVD = torch.nn.functional.normalize(y_EVD, dim=-1)
    return torch.einsum("evd,fvd->ef", unit_EVD, unit_EVD) / y_EVD.shape[1]


def linear_cka(y_EVD: Tensor) -> Tensor:
    """Linear centered kernel alignment of two experts' outputs (Kornblith et al. 2019, eq. 3): float64[E, E].

    1 where one is a rotation and scaling of the other about its mean. An expert whose output does not vary has 0.
    """
    centered_EVD = y_EVD - y_EVD.mean(dim=1, keepdim=True)
    E = len(centered_EVD)
    cross_EE = torch.stack(
        [(centered_EVD[e].T @ centered_EVD[f]).square().sum() for e in range(E) for f in range(E)]
    ).view(E, E)
    norm_E = cross_EE.diagonal().sqrt()
    return cross_EE / (norm_E[:, None] * norm_E).clamp_min(torch.finfo(cross_EE.dtype).tiny)


class ExpertSimilarity:
    """Keeps tokens of every MoE block; a visitor of `vision_moe.routing_trace.trace`.

    Args:
        num_tokens: how many to keep of each block and modality, drawn evenly from the passes.
        num_passes: batches that will come.
        seed: of the drawing.
    """

    def __init__(self, num_tokens: int, num_passes: int, *, seed: int = 0) -> None:
        self._per_pass = -(-num_tokens // num_passes)
        self._generator = torch.Generator().manual_seed(seed)
        self._tokens: dict[tuple[str, int], tuple[MoEMLP, list[Tensor]]] = {}

    def __call__(self, visit: Visit) -> None:
        drawn = torch.randperm(len(visit.x_VD), generator=self._generator)[: self._per_pass]
        _, kept = self._tokens.setdefault((visit.modality, visit.block), (visit.mlp, []))
        kept.append(visit.x_VD[drawn.to(visit.x_VD.device)])

    def towers(self) -> dict[str, Any]:
        """{"vision" | "text": {"layers", "num_tokens", "weights", "output_cosine", "output_cka"}}, the last three
        [L, E, E] for L blocks."""
        found: dict[str, Any] = {}
        for modality in MODALITIES:
            blocks = {
                block: self._tokens[key] for key in sorted(self._tokens) if key[0] == modality for block in key[1:]
            }
            if blocks:
                found[modality] = self._tower(blocks)
        return found

    def _tower(self, blocks: dict[int, tuple[MoEMLP, list[Tensor]]]) -> dict[str, Any]:
        rows: dict[str, list[Any]] = {"weights": [], "output_cosine": [], "output_cka": []}
        for mlp, kept in blocks.values():
            y_EVD = expert_outputs(mlp.experts, torch.cat(kept))
            rows["weights"].append(weight_similarity(mlp.experts).tolist())
            rows["output_cosine"].append(mean_cosine(y_EVD).tolist())
            rows["output_cka"].append(linear_cka(y_EVD).tolist())
        return {"layers": list(blocks), "num_tokens": y_EVD.shape[1], **rows}
