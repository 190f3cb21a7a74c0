"""Expert utilization of a mixture over image-caption pairs (CLIP-MoE, Zhang et al. 2024, appendix A.3).

    python -m vision_moe.analysis --model DIR --data SHARDS --split test --output DIR

writes `utilization.json` and `utilization.png` (layers x experts, one heat map per tower).

Shapes: B batch, S sequence, T valid tokens, E experts, K experts chosen per token, L MoE layers of a tower.
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

import vision_moe.model  # noqa: F401  # registers the model types
from vision_moe.config import parse
from vision_moe.data.captions import open_captions
from vision_moe.data.collate import CaptionCollator
from vision_moe.files import write_json
from vision_moe.model.families import max_text_tokens, text_padding, tower_family
from vision_moe.plots import plot_utilization
from vision_moe.tracking import setup_logging

logger = logging.getLogger(__name__)


class RoutingCounts:
    """Running counts of one tower's routing over batches.

    Args:
        layers: indices of the tower's MoE blocks, counted from 0 among all its blocks.
        num_experts: E.
        top_k: K.
    """

    def __init__(self, layers: list[int], num_experts: int, top_k: int) -> None:
        self.layers = layers
        self.num_experts = num_experts
        self.top_k = top_k
        self._num_tokens = 0
        self._top_1_LE = torch.zeros(len(layers), num_experts, dtype=torch.int64)
        self._top_k_LE = torch.zeros(len(layers), num_experts, dtype=torch.int64)
        self._gates_LE = torch.zeros(len(layers), num_experts, dtype=torch.float64)
        self._entropy_L = torch.zeros(len(layers), dtype=torch.float64)

    def add(self, router_logits: tuple[Tensor, ...], mask_BS: Tensor | None = None) -> None:
        """Counts one batch.

        Args:
            router_logits: float[B, S, E] per MoE layer.
            mask_BS: true or 1 at valid tokens; None counts all.

        Raises:
            ValueError: if the number of layers is not the one declared.
        """
        if len(router_logits) != len(self.layers):
            raise ValueError(f"got router logits of {len(router_logits)} layers, but the MoE layers are {self.layers}")
        for layer, logits_BSE in enumerate(router_logits):
            logits_TE = (logits_BSE.flatten(0, 1) if mask_BS is None else logits_BSE[mask_BS.bool()]).double()
            gates_TE = logits_TE.softmax(dim=-1)
            experts_TK = logits_TE.topk(self.top_k, dim=-1).indices
            self._top_1_LE[layer] += torch.bincount(experts_TK[:, 0], minlength=self.num_experts).cpu()
            self._top_k_LE[layer] += torch.bincount(experts_TK.flatten(), minlength=self.num_experts).cpu()
            self._gates_LE[layer] += gates_TE.sum(dim=0).cpu()
            self._entropy_L[layer] += torch.special.entr(gates_TE).sum().cpu()
        self._num_tokens += logits_TE.shape[0]

    def summary(self) -> dict[str, Any]:
        """Counts and shares as plain JSON values; see `utilization` for the keys."""
        tokens = max(self._num_tokens, 1)
        return {
            "layers": self.layers,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "num_tokens": self._num_tokens,
            "tokens_top_k": self._top_k_LE.tolist(),
            "tokens_top_1": self._top_1_LE.tolist(),
            "share_top_k": (self._top_k_LE / tokens).tolist(),
            "share_top_1": (self._top_1_LE / tokens).tolist(),
            "mean_gates": (self._gates_LE / tokens).tolist(),
            "gate_entropy": (self._entropy_L / tokens).tolist(),
        }


@torch.inference_mode()
def utilization(
    model: Any,
    processor: Any,
    dataset: Dataset[Any],
    *,
    batch_size: int = 64,
    limit: int | None = None,
    num_workers: int = 0,
) -> dict[str, Any]:
    """Counts which experts the tokens of a data set go to, layer by layer and tower by tower.

    Args:
        model: a CLIPMoEModel or one of another family, on any device; left in the mode (train or eval) it came in.
        processor: its processor.
        dataset: pairs as `vision_moe.data.captions` gives them; the caption of epoch 0 is read.
        batch_size: pairs a forward pass.
        limit: measure the first so many pairs only; None = all.
        num_workers: data loading processes.

    Returns:
        {"num_samples", "towers": {"vision" | "text": tower}}. A dense tower is absent; a tower holds
        "layers" (block indices), "num_experts", "top_k", "num_tokens" (class token included, padding not);
        per layer and expert "tokens_top_k" (first to k-th choice counted alike, the paper's measure),
        "tokens_top_1" (first choice), their shares of the tokens "share_top_k" (a row sums to k) and
        "share_top_1", "mean_gates"; and per layer "gate_entropy" (mean over tokens, nats; log E = undecided).

    Raises:
        ValueError: if neither tower has experts, or the data set or limit is empty.
    """
    counts = _new_counts(model.config)
    num_samples = len(dataset) if limit is None else min(limit, len(dataset))  # type: ignore[arg-type]
    if num_samples < 1:
        raise ValueError(f"nothing to measure: {len(dataset)} pairs, limit {limit}")  # type: ignore[arg-type]
    loader: DataLoader[Any] = DataLoader(
        Subset(dataset, range(num_samples)),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=CaptionCollator(processor, max_text_tokens(model.config.text_config), text_padding(model.config)),
    )
    was_training = model.training
    model.eval()
    try:
        for batch in tqdm(loader, desc="routing", leave=False, disable=not sys.stderr.isatty()):
            _count_batch(model, batch, counts)
    finally:
        model.train(was_training)
    return {"num_samples": num_samples, "towers": {name: tower.summary() for name, tower in counts.items()}}


def moe_layers(tower_config: Any) -> list[int]:
    """Indices of a tower's MoE blocks; empty for a dense tower."""
    return sorted(getattr(tower_config, "moe_block_indices", ()))


def _new_counts(config: Any) -> dict[str, RoutingCounts]:
    towers = {"vision": getattr(config, "vision_config", None), "text": getattr(config, "text_config", None)}
    for name, tower in towers.items():
        if tower is not None and moe_layers(tower) and not _chosen_by_logits(tower):
            raise ValueError(
                f"utilization is counted from softmax logits, which do not tell the choice of the {name} tower: "
                f"router_type={tower.router_type}, scoring_func={tower.scoring_func}, "
                f"router_bias_update_rate={tower.router_bias_update_rate}"
            )
    counts = {
        name: RoutingCounts(moe_layers(tower), tower.num_experts, tower.num_experts_per_tok)
        for name, tower in towers.items()
        if tower is not None and moe_layers(tower)
    }
    if not counts:
        raise ValueError(
            f"a {config.model_type} without MoE layers has no experts to count; pass a CLIP-MoE"
            " (vision_moe.upcycle makes one)"
        )
    return counts


def _chosen_by_logits(tower: Any) -> bool:
    plain = tower.router_type == "token_choice" and tower.scoring_func == "softmax"
    return plain and not tower.router_bias_update_rate


def _count_batch(model: Any, batch: dict[str, Any], counts: dict[str, RoutingCounts]) -> None:
    inputs = {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
        for name, tensor in batch.items()
        if name != "index"
    }
    output = model(**inputs, output_router_logits=True)
    # The vision tower's layers come first.
    num_vision = len(counts["vision"].layers) if "vision" in counts else 0
    if "vision" in counts:
        counts["vision"].add(output.router_logits[:num_vision], _token_mask(model.config.vision_config, inputs))
    if "text" in counts:
        counts["text"].add(output.router_logits[num_vision:], _token_mask(model.config.text_config, inputs))


def _token_mask(tower: Any, inputs: dict[str, Tensor]) -> Tensor | None:
    """The batch's padding mask of a tower, if padding takes no part in it."""
    return inputs.get(tower_family(tower).mask or "")


@dataclass(frozen=True, kw_only=True)
class AnalysisConfig:
    """Expert utilization of a CLIP-MoE over image-caption pairs: a table and a heat map."""

    model: str
    """CLIP-MoE with its processor: a folder or a hub name."""
    data: Path
    """Folder of WebDataset shards, or a JSON/JSONL file of captions (then set image_dir)."""
    output: Path
    """Folder for utilization.json and utilization.png."""
    split: str = "test"
    """Shards `{split}-*.tar` are read; ignored for JSON files."""
    caption_field: str = "captions"
    """Field of a sample's JSON with the caption or captions."""
    image_dir: Path | None = None
    """Folder that the picture names of a JSON file are relative to."""
    limit: int | None = None
    """Measure the first so many pairs; None = all."""
    batch_size: int = 64
    """Pairs a forward pass."""
    num_workers: int = 0
    """Data loading processes."""


def main(args: list[str] | None = None) -> None:
    """Entry point of `python -m vision_moe.analysis`."""
    setup_logging()
    config = parse(AnalysisConfig, args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(config.model).to(device)
    dataset = open_captions(
        config.data, split=config.split, caption_field=config.caption_field, image_dir=config.image_dir
    )
    result = utilization(
        model,
        AutoProcessor.from_pretrained(config.model),
        dataset,
        batch_size=config.batch_size,
        limit=config.limit,
        num_workers=config.num_workers,
    )
    write_json(config.output / "utilization.json", result)
    plot_utilization(result, config.output / "utilization.png")
    sys.stdout.write(f"{config.output / 'utilization.json'}\n{config.output / 'utilization.png'}\n")


if __name__ == "__main__":
    main()
