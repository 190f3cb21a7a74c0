"""The result of `vision_moe.analysis` as Markdown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def render(model: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """One report over all data sets.

    Args:
        model: its name.
        found: by the data set's name, what `vision_moe.analysis.analyze` returns.
    """
    lines = [f"# Experts of {model}", "", *_shares(found)]
    for name, of in found.items():
        if "similarity" in of:
            lines += ["", *_similarity(name, of["similarity"])]
        if "experts_alone" in of:
            lines += ["", *_alone(name, of["experts_alone"])]
    return "\n".join(lines) + "\n"


def _shares(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    num_experts = max(t["num_experts"] for of in found.values() for t in of["utilization"]["towers"].values())
    lines = [
        "Share of the tokens that each expert takes (any choice), in %, mean over the blocks with the least and most",
        "in brackets; entropy of the scores, 100 % where the router finds all experts alike; dropped choices.",
        "",
        *_head(["data", "tokens of", *(f"expert {e}" for e in range(num_experts)), "entropy", "dropped"]),
    ]
    for name, of in found.items():
        for modality, tower in of["utilization"]["towers"].items():
            share_LE = 100 * np.asarray(tower["share_top_k"])
            cells = [f"{column.mean():.0f} [{column.min():.0f}, {column.max():.0f}]" for column in share_LE.T]
            cells += [""] * (num_experts - len(cells))
            entropy = 100 * np.mean(tower["gate_entropy"]) / math.log(max(2, tower["num_experts"]))
            dropped = 100 * np.mean(tower["dropped_fraction"])
            lines.append(_row([name, modality, *cells, f"{entropy:.0f}", f"{dropped:.1f}"]))
    return lines


def _similarity(name: str, towers: Mapping[str, Any]) -> list[str]:
    lines = [
        f"How alike two experts of a block are, mean over pairs: cosine of their weights, and on tokens of {name}",
        "cosine and linear CKA of their outputs. Copies have 1.",
        "",
        *_head(["tokens of", "block", "weights, cosine", "outputs, cosine", "outputs, CKA"]),
    ]
    for modality, tower in towers.items():
        for row, block in enumerate(tower["layers"]):
            values = [_off_diagonal(tower[key][row]) for key in ("weights", "output_cosine", "output_cka")]
            lines.append(_row([modality, str(block), *(f"{value:.3f}" for value in values)]))
    return lines


def _off_diagonal(matrix: Sequence[Sequence[float]]) -> float:
    values_EE = np.asarray(matrix)
    return float(values_EE[~np.eye(len(values_EE), dtype=bool)].mean()) if len(values_EE) > 1 else 1.0


def _alone(name: str, models: Mapping[str, Any]) -> list[str]:
    first = models["mixture"]
    lines = [
        f"Retrieval on {name}, {first['num_images']} pictures and {first['num_captions']} captions, in %:",
        "the mixture, and each expert in the place of every mixture.",
        "",
        *_head(["model", "I2T R@1", "T2I R@1", "mean R@1 (95 % interval)"]),
    ]
    for label, result in models.items():
        low, high = result["mean_R@1_interval"]
        cells = [f"{100 * result[way]['R@1']:.1f}" for way in ("image_to_text", "text_to_image")]
        lines.append(_row([label, *cells, f"{100 * result['mean_R@1']:.1f} ({100 * low:.1f} to {100 * high:.1f})"]))
    return lines


def _head(cells: Sequence[str]) -> list[str]:
    return [_row(cells), "|" + " --- |" * len(cells)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
