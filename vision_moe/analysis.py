"""What the experts of a CLIP-MoE or a LIMoE do over image-caption pairs (CLIP-MoE, Zhang et al. 2024, appendix A.3).

    python -m vision_moe.analysis --model DIR --data SHARDS --split test --output DIR

writes `utilization.json` and `utilization.png` (layers x experts, one heat map per tower, or per modality of a LIMoE)
and `report.md`. Further flags add how alike the experts are, the patches that each prefers, and what each scores
alone. Several data sets (`--data '[A, B]'`) have a folder each.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoModel

import vision_moe.model  # noqa: F401  # registers the model types
from vision_moe.assets import find_model
from vision_moe.config import parse
from vision_moe.data.captions import CaptionDataset, open_captions
from vision_moe.expert_report import render
from vision_moe.expert_similarity import ExpertSimilarity
from vision_moe.files import write_json, write_text
from vision_moe.patch_sheets import TopPatches, write_sheet
from vision_moe.plots import plot_utilization
from vision_moe.processor import load_processor
from vision_moe.retrieval import retrieval
from vision_moe.routing_counts import RoutingCounts
from vision_moe.routing_trace import trace
from vision_moe.tracking import setup_logging
from vision_moe.upcycle import expert_as_dense


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

    Arguments and errors as of `vision_moe.routing_trace.trace`.

    Returns:
        {"num_samples", "towers": {"vision" | "text": tower}}; a LIMoE's modalities are told as towers. A dense tower is
        absent; a tower holds
        "layers" (block indices), "num_experts", "top_k", "num_tokens" (class token included, padding not);
        per layer and expert "tokens_top_k" (first to k-th choice counted alike, the paper's measure),
        "tokens_top_1" (first choice), their shares of the tokens "share_top_k" (a row sums to k) and
        "share_top_1", "mean_gates" (scores of all experts); and per layer "gate_entropy" (of the scores as shares of
        their sum; mean over tokens, nats; log E = undecided) and "dropped_fraction". With expert choice a choice is
        an expert's that took the token, "top_k" the mean number of them, and what is dropped are the tokens that no
        expert took, which have no first choice.
    """
    counts = RoutingCounts()
    num_samples = trace(
        model, processor, dataset, [counts], batch_size=batch_size, limit=limit, num_workers=num_workers
    )
    return {"num_samples": num_samples, "towers": counts.towers()}


def experts_alone(model: Any, processor: Any, dataset: CaptionDataset, *, batch_size: int = 64) -> dict[str, Any]:
    """Retrieval of the mixture and of each expert in the place of every mixture, see `expert_as_dense`.

    Returns:
        What `vision_moe.retrieval.retrieval` gives, by "mixture", "expert 0", "expert 1", ...

    Raises:
        ValueError: the experts are no whole MLPs.
    """
    num_experts = max(tower.num_experts for tower in (model.config.vision_config, model.config.text_config))
    alone = {
        f"expert {expert}": retrieval(expert_as_dense(model, expert), processor, dataset, batch_size=batch_size)
        for expert in range(num_experts)
    }
    return {"mixture": retrieval(model, processor, dataset, batch_size=batch_size), **alone}


@dataclass(frozen=True, kw_only=True)
class AnalysisConfig:
    """What the experts of a CLIP-MoE or a LIMoE do over image-caption pairs: tables, heat maps and contact sheets.

    Example:
        .venv/bin/python -m vision_moe.analysis --model outputs/encoder/dmu/model --data outputs/scenes --output experts
    """

    model: str
    """CLIP-MoE or LIMoE with its processor: a folder or a hub name."""
    data: Path | list[Path]
    """Folder of WebDataset shards, or a JSON/JSONL file of captions (then set image_dir); a list of several."""
    output: Path
    """Folder for what is written."""
    split: str = "test"
    """Shards `{split}-*.tar` are read; ignored for JSON files."""
    caption_field: str = "captions"
    """Field of a sample's JSON with the caption or captions."""
    image_dir: Path | None = None
    """Folder that the picture names of a JSON file are relative to."""
    limit: int | None = None
    """Trace the first so many pairs; None = all."""
    similarity_tokens: int = 0
    """Compare the experts' weights, and their outputs on so many tokens of each block; 0 = do not."""
    top_patches: int = 0
    """Draw so many patches of each expert; 0 = none."""
    experts_alone: bool = False
    """Measure the retrieval of each expert alone, over all pairs."""
    batch_size: int = 64
    """Pairs a forward pass."""
    num_workers: int = 0
    """Data loading processes."""
    seed: int = 0
    """Decides which tokens are compared."""


def analyze(config: AnalysisConfig, model: Any, processor: Any, data: Path, output: Path) -> dict[str, Any]:
    """Writes everything about one data set into `output`.

    Returns:
        {"utilization", "similarity", "experts_alone"}: the last two where they were asked for.
    """
    dataset = open_captions(data, split=config.split, caption_field=config.caption_field, image_dir=config.image_dir)
    num_pairs = len(dataset) if config.limit is None else min(config.limit, len(dataset))
    counts = RoutingCounts()
    visitors: list[Any] = [counts]
    if config.similarity_tokens:
        similarity = ExpertSimilarity(
            config.similarity_tokens, max(1, -(-num_pairs // config.batch_size)), seed=config.seed
        )
        visitors.append(similarity)
    if config.top_patches:
        grid = _grid(getattr(model.config, "vision_config", model.config))
        patches = TopPatches(grid[0] * grid[1], config.top_patches)
        visitors.append(patches)
    num_samples = trace(
        model,
        processor,
        dataset,
        visitors,
        batch_size=config.batch_size,
        limit=config.limit,
        num_workers=config.num_workers,
    )
    found: dict[str, Any] = {"utilization": {"num_samples": num_samples, "towers": counts.towers()}}
    plot_utilization(found["utilization"], output / "utilization.png")
    if config.similarity_tokens:
        found["similarity"] = similarity.towers()
    if config.top_patches:
        for block, experts in patches.blocks().items():
            sheet = output / "patches" / f"block_{block:02d}.png"
            write_sheet(experts, dataset, processor.image_processor, grid, sheet)
    if config.experts_alone:
        found["experts_alone"] = experts_alone(model, processor, dataset, batch_size=config.batch_size)
    for name, content in found.items():
        write_json(output / f"{name}.json", content)
    return found


def _grid(vision_config: Any) -> tuple[int, int]:
    side = vision_config.image_size // vision_config.patch_size
    return side, side


def main(args: list[str] | None = None) -> None:
    """Entry point of `python -m vision_moe.analysis`."""
    setup_logging()
    config = parse(AnalysisConfig, args)
    folders = config.data if isinstance(config.data, list) else [config.data]
    names = [path.stem for path in folders]
    if len(set(names)) != len(names):
        raise ValueError(f"data sets of one name would write over each other: {', '.join(names)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = find_model(config.model)
    model = AutoModel.from_pretrained(folder).to(device)
    processor = load_processor(folder)
    found = {
        name: analyze(config, model, processor, data, config.output / name if len(folders) > 1 else config.output)
        for name, data in zip(names, folders, strict=True)
    }
    write_text(config.output / "report.md", render(config.model, found))
    sys.stdout.write(f"{config.output / 'report.md'}\n")


if __name__ == "__main__":
    main()
