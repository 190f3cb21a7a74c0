"""The end of an encoder run: every model on one table, as `results.json` and `report.md`."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModel, ProcessorMixin

from vision_moe.analysis import utilization
from vision_moe.data.captions import CaptionDataset, open_dataset
from vision_moe.data.read_config import all_fields
from vision_moe.distributed import barrier, is_main, rank, world_size
from vision_moe.encoder_card import write_encoder_card
from vision_moe.factors import factor_accuracy
from vision_moe.files import write_json, write_text
from vision_moe.metrics import read_metrics
from vision_moe.modality_routing import modality_table
from vision_moe.model import LIMoEModel
from vision_moe.recipe import TrainConfig
from vision_moe.retrieval import retrieval
from vision_moe.stages import finished_stages

logger = logging.getLogger(__name__)

_NAMES = {
    "dense": "dense start (expert 0)",
    "direct": "direct fine-tuning",
    "sparse_upcycling": "sparse upcycling",
    "dmu": "CLIP-MoE (DMU)",
    "limoe": "LIMoE (one tower, from nothing)",
}


def write_report(
    config: TrainConfig, models: dict[str, Path], processor: ProcessorMixin, dataset: CaptionDataset
) -> None:
    """Evaluates every model, each on one rank, and writes `results.json` and `report.md` into the run's folder.

    The scores of a model stand in `scores.json` beside its stage, so that a killed run does not measure it again.

    Args:
        config: the recipe.
        models: model folders by stage name.
        processor: of all of them.
        dataset: pictures to evaluate on, see `open_eval_data`.
    """
    for number, (name, folder) in enumerate(models.items()):
        scores = _scores_file(folder)
        if number % world_size() == rank() and not scores.is_file():
            logger.info("evaluating %s on %d pictures", name, len(dataset))
            write_json(scores, _evaluate(config, folder, processor, dataset))
    barrier()
    if is_main():
        rows = {name: json.loads(_scores_file(folder).read_text()) for name, folder in models.items()}
        for name, folder in models.items():
            write_encoder_card(config, folder.parent.name, rows[name])
        _write_tables(config, rows)


def _write_tables(config: TrainConfig, rows: dict[str, Any]) -> None:
    results = {
        "data": str(config.data.eval or config.data.train),
        "split": config.data.eval_split,
        "caption_field": config.data.eval_caption_field or all_fields(config.data),
        "seed": config.seed,
        "stages": finished_stages(config.output),
        "models": rows,
    }
    write_json(config.output / "results.json", results)
    report = config.output / "report.md"
    write_text(report, render(results))
    logger.info("report: %s", report)


def _scores_file(model_folder: Path) -> Path:
    return model_folder.parent / "scores.json"


def render(results: dict[str, Any]) -> str:
    """`results.json` as Markdown: retrieval, factors where the data has them, a LIMoE's routing, stages."""
    return f"# Encoder run\n\n{render_tables(results)}\n"


def render_tables(results: dict[str, Any]) -> str:
    """The tables of `render`, without its heading."""
    rows = results["models"]
    first = next(iter(rows.values()))["retrieval"]
    lines = [
        f"Retrieval on {first['num_images']} pictures and {first['num_captions']} captions "
        f"({results['data']}, split `{results['split']}`, field `{results['caption_field']}`), in %:",
        "",
        "| model | I2T R@1 | R@5 | R@10 | T2I R@1 | R@5 | R@10 | mean R@1 (95 % interval) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_retrieval_row(label(name), row["retrieval"]) for name, row in rows.items()]
    if "factors" in next(iter(rows.values())):
        lines += ["", *_factor_table(rows)]
    for name, row in rows.items():
        if "routing" in row:
            lines += ["", *modality_table(label(name), row["routing"])]
    lines += ["", "| stage | pairs seen | steps | seconds |", "| --- | --- | --- | --- |"]
    for name, stage in results["stages"].items():
        lines.append(f"| {name} | {stage['samples']:,} | {stage['steps']} | {stage['seconds']} |")
    return "\n".join([*lines, *_cluster_table(results["stages"])])


def _evaluate(config: TrainConfig, folder: Path, processor: ProcessorMixin, dataset: CaptionDataset) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(folder).to(device)
    dtype = torch.bfloat16 if config.bf16 else None
    batch = config.feature_batch_size
    row = {"retrieval": retrieval(model, processor, dataset, batch_size=batch, autocast_dtype=dtype)}
    if "variants" in dataset.metadata(0):
        row["factors"] = factor_accuracy(
            model, processor, dataset, limit=config.factor_pictures, batch_size=batch, autocast_dtype=dtype
        )
    if isinstance(model, LIMoEModel):
        routing = utilization(model, processor, dataset, batch_size=batch)
        stage = folder.parent.name
        logged = [entry for entry in read_metrics(config.output / "metrics.jsonl") if entry["stage"] == stage]
        row["routing"] = {**routing, "training": next((entry for entry in reversed(logged) if "loss" in entry), {})}
    return row


def open_eval_data(config: TrainConfig) -> CaptionDataset:
    """The pictures that the final table is measured on."""
    data = config.data
    reading = replace(
        data,
        format=data.eval_format or data.format,
        caption_field=data.eval_caption_field or all_fields(data),
        caption_weights=None,
    )
    check_cache = config.output / "readable_eval.json"
    return open_dataset(
        data.eval or data.train, reading, split=data.eval_split, seed=config.seed, check_cache=check_cache
    )


def label(name: str) -> str:
    """A stage's name for readers."""
    return _NAMES.get(name, f"expert {name.removeprefix('mcl')} alone" if name.startswith("mcl") else name)


def _cluster_table(stages: dict[str, Any]) -> list[str]:
    """Sizes of the clusters that each MCL stage drew its batches from; nothing where none did."""
    rows = []
    for name, stage in stages.items():
        found = stage["cluster_batches"]
        if found is not None:
            sizes = list(found["sizes"].values())
            counts = [len(sizes), min(sizes), f"{median(sizes):g}", max(sizes)]
            cells = [*counts, found["batches"], found["dropped"], found["dropped_clusters"], found["backed_off"]]
            rows.append(f"| {name} | {' | '.join(map(str, cells))} |")
    if not rows:
        return []
    columns = "stage | clusters | smallest | median | largest | batches an epoch | pictures dropped | clusters dropped"
    return ["", f"| {columns} | pictures backed off |", f"|{' --- |' * 9}", *rows]


def _retrieval_row(label: str, found: dict[str, Any]) -> str:
    cells = [
        f"{100 * found[direction][f'R@{k}']:.1f}"
        for direction in ("image_to_text", "text_to_image")
        for k in (1, 5, 10)
    ]
    low, high = found["mean_R@1_interval"]
    mean = f"{100 * found['mean_R@1']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
    return f"| {label} | {' | '.join(cells)} | {mean} |"


def _factor_table(rows: dict[str, Any]) -> list[str]:
    factors = next(iter(rows.values()))["factors"]
    names = list(factors)
    lines = [
        "Accuracy per factor, in %: the true caption among captions that differ in this factor alone.",
        "",
        f"| model | {' | '.join(names)} |",
        f"| --- |{' --- |' * len(names)}",
    ]
    for row, values in rows.items():
        cells = " | ".join(f"{100 * values['factors'][name]['accuracy']:.1f}" for name in names)
        lines.append(f"| {label(row)} | {cells} |")
    chances = " | ".join(f"{100 * factors[name]['chance']:.1f}" for name in names)
    counts = " | ".join(str(factors[name]["n"]) for name in names)
    return [*lines, f"| chance | {chances} |", f"| n | {counts} |"]
