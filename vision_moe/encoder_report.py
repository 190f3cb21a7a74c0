"""The end of an encoder run: every model on one table, as `results.json` and `report.md`."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, ProcessorMixin

from vision_moe.data.captions import CaptionDataset, open_captions
from vision_moe.factors import factor_accuracy
from vision_moe.files import write_json, write_text
from vision_moe.recipe import TrainConfig
from vision_moe.retrieval import retrieval
from vision_moe.stages import finished_stages

logger = logging.getLogger(__name__)

_NAMES = {
    "dense": "dense start (expert 0)",
    "direct": "direct fine-tuning",
    "sparse_upcycling": "sparse upcycling",
    "dmu": "CLIP-MoE (DMU)",
}


def write_report(
    config: TrainConfig, models: dict[str, Path], processor: ProcessorMixin, dataset: CaptionDataset
) -> dict[str, Any]:
    """Evaluates every model and writes `results.json` and `report.md` into the run's folder.

    Args:
        config: the recipe.
        models: model folders by stage name.
        processor: of all of them.
        dataset: pictures to evaluate on, see `open_eval_data`.

    Returns:
        What `results.json` holds.
    """
    saved = config.output / "results.json"
    rows: dict[str, Any] = json.loads(saved.read_text())["models"] if saved.is_file() else {}
    for name, folder in models.items():
        if name not in rows:
            logger.info("evaluating %s on %d pictures", name, len(dataset))
            rows[name] = _evaluate(config, folder, processor, dataset)
    results = {
        "data": str(config.data.eval or config.data.train),
        "split": config.data.eval_split,
        "caption_field": config.data.eval_caption_field or config.data.caption_field,
        "seed": config.seed,
        "stages": finished_stages(config.output),
        "models": rows,
    }
    write_json(saved, results)
    report = config.output / "report.md"
    write_text(report, render(results))
    logger.info("report: %s", report)
    return results


def render(results: dict[str, Any]) -> str:
    """`results.json` as Markdown: retrieval, factors where the data has them, stages."""
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
    lines += ["", "| stage | pairs seen | steps | seconds |", "| --- | --- | --- | --- |"]
    for name, stage in results["stages"].items():
        lines.append(f"| {name} | {stage['samples']:,} | {stage['steps']} | {stage['seconds']} |")
    return "\n".join(lines)


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
    return row


def open_eval_data(config: TrainConfig) -> CaptionDataset:
    """The pictures that the final table is measured on."""
    data = config.data
    return open_captions(
        data.eval or data.train,
        split=data.eval_split,
        caption_field=data.eval_caption_field or data.caption_field,
        image_dir=data.image_dir,
        seed=config.seed,
        max_unreadable_share=data.max_unreadable_share,
        check_cache=config.output / "readable_eval.json",
    )


def label(name: str) -> str:
    """A stage's name for readers."""
    return _NAMES.get(name, f"expert {name.removeprefix('mcl')} alone" if name.startswith("mcl") else name)


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
