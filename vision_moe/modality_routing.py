"""How a LIMoE routes each modality: numbers for metrics.jsonl, and the report's table of experts by modality.

L MoE blocks, E experts. All entropies are in nats.
"""

import math
from typing import Any

import torch
from torch import Tensor

from vision_moe.model.outputs import LIMoEModalityOutput

_MODALITIES = {"image": "vision", "text": "text"}


def modality_metrics(outputs: Any, config: Any) -> dict[str, Tensor]:
    """What one training step tells of each modality's routing; nothing for other models than a LIMoE.

    Args:
        outputs: what the model returned in training.
        config: the model's.

    Returns:
        scalars `{image,text}/{name}`, means over the MoE blocks, and `{image,text}/layer{i}/{name}`. The names:
        routing_entropy, of the mean gate (what the global entropy loss raises; 0 = collapsed); gate_entropy, mean over
        tokens (what the local entropy loss lowers); experts_used, exp of the entropy of the tokens' choices, between 1
        and E; dropped_fraction, share of the choices that no expert computed.
    """
    metrics: dict[str, Tensor] = {}
    for modality, tower in _MODALITIES.items():
        output = getattr(outputs, f"{tower}_model_output", None)
        if not isinstance(output, LIMoEModalityOutput) or output.mean_gates is None:
            continue
        values_L = {
            "routing_entropy": torch.special.entr(output.mean_gates).sum(dim=-1),
            "gate_entropy": output.gate_entropy,
            "experts_used": experts_used(output.tokens_per_expert),
            "dropped_fraction": output.dropped_fraction,
        }
        for name, value_L in values_L.items():
            metrics[f"{modality}/{name}"] = value_L.mean()
            for layer, value in zip(sorted(config.moe_block_indices), value_L, strict=True):
                metrics[f"{modality}/layer{layer}/{name}"] = value
    return metrics


def experts_used(tokens_LE: Tensor) -> Tensor:
    """Effective number of experts, exp(H(shares of the choices)): 1 if all go to one, E if spread evenly.

    Args:
        tokens_LE: int64[L, E], choices per expert.

    Returns:
        float32[L].
    """
    shares_LE = tokens_LE / tokens_LE.sum(dim=-1, keepdim=True)
    return torch.special.entr(shares_LE).sum(dim=-1).exp()


def modality_table(label: str, result: dict[str, Any]) -> list[str]:
    """Share of each modality's tokens per expert and MoE block, as lines of Markdown.

    Args:
        label: the model's name.
        result: of `vision_moe.analysis.utilization` on a LIMoE, with the last logged step under "training"; {} where a
            training was too short to log one.
    """
    towers, training = result["towers"], result["training"]
    num_experts, top_k = towers["text"]["num_experts"], towers["text"]["top_k"]
    columns = [*(str(expert) for expert in range(num_experts)), "experts used", "routing entropy", "gate entropy"]
    lines = [
        f"Experts by modality, {label}, on {result['num_samples']:,} pairs: the share of "
        f"{towers['vision']['num_tokens']:,} image tokens and of {towers['text']['num_tokens']:,} text tokens that "
        f"choose each expert, in % (even: {100 * top_k / num_experts:.1f}). Routing entropy is that of the mean gate "
        f"(at most ln {num_experts} = {math.log(num_experts):.2f}), gate entropy the mean over tokens; dropped is the "
        "share of choices without a place at the last log of the training, in %.",
        "",
        f"| block | tokens | {' | '.join(columns)} | dropped |",
        "| --- | --- |" + " --- |" * (len(columns) + 1),
    ]
    for index, layer in enumerate(towers["text"]["layers"]):
        for modality, tower in _MODALITIES.items():
            dropped = training.get(f"{modality}/layer{layer}/dropped_fraction")
            cell = "not logged" if dropped is None else f"{100 * dropped:.1f}"
            lines.append(f"| {layer} | {modality} | {_cells(towers[tower], index)} | {cell} |")
    return lines


def _cells(tower: dict[str, Any], index: int) -> str:
    shares = [f"{100 * share:.1f}" for share in tower["share_top_k"][index]]
    used = experts_used(torch.tensor(tower["tokens_top_k"][index])[None]).item()
    entropy = torch.special.entr(torch.tensor(tower["mean_gates"][index])).sum().item()
    return " | ".join([*shares, f"{used:.2f}", f"{entropy:.2f}", f"{tower['gate_entropy'][index]:.2f}"])
