"""Model cards of an encoder run: what each stage made, on what, and what the run's own table says of it."""

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult

from vision_moe.config import to_dict
from vision_moe.model_card import CardText, last_loss, training_facts, write_card
from vision_moe.recipe import TrainConfig

# A factor whose accuracy is less than this above chance is said not to be known.
_CHANCE_MARGIN = 0.05

_ABOUT = {
    "start": "The dense dual encoder that this run started from, as it was given.",
    "align": "A dual encoder of two pretrained towers, of which only a part has been trained yet.",
    "dense": "A dense dual encoder, trained here from the start that the recipe below names.",
    "direct": "The dense start, all of its weights fine-tuned: the baseline of this run.",
    "sparse_upcycling": "A mixture of experts that began as copies of the dense MLPs (sparse upcycling).",
    "dmu": "A CLIP-MoE by Diversified Multiplet Upcycling: expert 0 is the dense start, each other one comes from a "
    "stage of multistage contrastive learning, and the routers were trained last.",
    "limoe": "A LIMoE: one sparse transformer for pictures and captions, trained from nothing.",
}


def write_encoder_card(config: TrainConfig, stage: str, scores: dict[str, Any] | None = None) -> None:
    """Writes the card of a stage's model.

    Args:
        config: recipe of the run.
        stage: folder of the stage below the run's output.
        scores: its row of the run's table, where it has been measured.
    """
    folder = config.output / stage
    marker = folder / "stage.json"
    training: dict[str, object] = {"data": f"`{config.data.train}`, captions `{config.data.caption_field}`"}
    if marker.is_file():
        summary = json.loads(marker.read_text(encoding="utf-8"))
        training |= training_facts(summary, last_loss(config.output / "metrics.jsonl", stage))
    text = CardText(
        name=f"{config.output.name}/{stage}",
        about=_ABOUT.get(stage, f"Expert {stage.removeprefix('mcl')} of the CLIP-MoE of this run, as a dense model."),
        base=config.model,
        tags=["clip", *(["mixture-of-experts"] if stage in ("dmu", "sparse_upcycling", "limoe") else [])],
        pipeline="zero-shot-image-classification",
        use=f"import vision_moe.model  # the model types\nfrom transformers import AutoModel, AutoProcessor\n\n"
        f'model = AutoModel.from_pretrained("{folder / "model"}")\n'
        f'processor = AutoProcessor.from_pretrained("{folder / "model"}")',
        training=training,
        recipe=yaml.safe_dump(to_dict(config), sort_keys=False),
        limits=_limits(config, scores),
        **_measured(config, scores),
    )
    write_card(folder / "model", text)


def _measured(config: TrainConfig, scores: dict[str, Any] | None) -> dict[str, Any]:
    """Table and front matter of the scores, nothing without them."""
    if scores is None:
        return {}
    found = scores["retrieval"]
    data = str(config.data.eval or config.data.train)
    rows, results = [], []
    for direction, words in (("image_to_text", "image to text"), ("text_to_image", "text to image")):
        values = " | ".join(f"{100 * found[direction][f'R@{k}']:.1f}" for k in (1, 5, 10))
        rows.append(f"| retrieval, {words} | {values} |")
        results.append(
            EvalResult(
                task_type="image-text-retrieval",
                dataset_type="local",
                dataset_name=Path(data).name,
                dataset_split=config.data.eval_split,
                metric_type="recall@1",
                metric_name=f"R@1, {words}",
                metric_value=round(found[direction]["R@1"], 4),
            )
        )
    low, high = found["mean_R@1_interval"]
    lines = [
        f"On {found['num_images']:,} pictures and {found['num_captions']:,} captions of `{data}`, split "
        f"`{config.data.eval_split}`, in %:",
        "",
        "| | R@1 | R@5 | R@10 |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        f"Mean R@1 {100 * found['mean_R@1']:.1f} (95 % interval {100 * low:.1f} to {100 * high:.1f}).",
    ]
    if "factors" in scores:
        factors = scores["factors"]
        lines += ["", "| factor | accuracy | chance |", "| --- | --- | --- |"]
        lines += [f"| {name} | {100 * f['accuracy']:.1f} | {100 * f['chance']:.1f} |" for name, f in factors.items()]
    return {"tables": "\n".join(lines), "results": results}


def _limits(config: TrainConfig, scores: dict[str, Any] | None) -> list[str]:
    known = "the start's own data and " if config.model else ""
    limits = [
        f"It knows what {known}`{config.data.train}` teach; nothing was measured on other pictures or languages, or "
        "for bias and safety.",
        "Licence: whatever the start and the data ask for; this card grants nothing.",
    ]
    if scores is None:
        return limits
    blind = [
        f"{name} ({100 * f['accuracy']:.1f} %, chance {100 * f['chance']:.1f} %)"
        for name, f in scores.get("factors", {}).items()
        if f["accuracy"] < f["chance"] + _CHANCE_MARGIN
    ]
    return [*limits, *([f"Not better than chance, or hardly: {', '.join(blind)}."] if blind else [])]
