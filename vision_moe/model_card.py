"""The card of a saved model: README.md with front matter for the model hub, written when the model is.

It says how the model came to be and what was measured in that run, and no more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vision_moe.files import write_text
from vision_moe.metrics import read_metrics
from vision_moe.tracking import environment
from vision_moe.version import __version__


@dataclass(frozen=True, kw_only=True)
class CardText:
    """What one card says."""

    name: str
    """Of the model: RUN/STAGE."""
    about: str
    """A sentence or two: what it is."""
    base: str | None
    """Folder or hub name of the model it was made from."""
    tags: Sequence[str]
    """For the hub."""
    pipeline: str
    """Task by the hub's names."""
    use: str
    """Python that loads it."""
    training: Mapping[str, object]
    """What was trained on what, for how long."""
    recipe: str
    """The resolved recipe, YAML."""
    tables: str = "Nothing was measured in this run beside the training itself."
    """Markdown: what was measured."""
    results: Sequence[EvalResult] = field(default_factory=tuple)
    """The same for the front matter."""
    limits: Sequence[str] = ()
    """What it cannot do, and what was not looked at."""


def write_card(folder: Path, text: CardText) -> None:
    """Writes `README.md` into a model folder; an earlier card is replaced."""
    write_text(folder / "README.md", str(card(text)))


def card(text: CardText) -> ModelCard:
    """The card, valid for the hub's own reader."""
    data = ModelCardData(
        # The hub wants names of its own kind.
        base_model=text.base if text.base and "/" in text.base and not Path(text.base).exists() else None,
        eval_results=list(text.results) or None,
        library_name="transformers",
        model_name=text.name,
        pipeline_tag=text.pipeline,
        tags=["vision-moe", *text.tags],
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(text)}")


def training_facts(summary: Mapping[str, Any], last_log: Mapping[str, Any]) -> dict[str, object]:
    """A stage's own summary, its last logged losses, and the machine.

    Args:
        summary: what `stage.json` holds.
        last_log: the last entry of `metrics.jsonl` with a loss; empty if there is none.
    """
    machine = environment()
    hardware = ", ".join(machine["gpus"]) or f"{machine['processor']}, no GPU"
    losses = {name: last_log[name] for name in ("loss", "contrastive_loss", "aux_loss") if name in last_log}
    return {
        "steps": f"{summary['steps']:,}",
        "samples seen": f"{summary['samples']:,}",
        "seconds": f"{summary['seconds']:,} ({summary['seconds_cover']})",
        "hardware": f"{hardware}; {machine['world_size']} processes",
        **{f"{name.replace('_', ' ')} at the end": f"{value:.4g}" for name, value in losses.items()},
        "code": f"vision-moe {__version__}, commit {machine['commit'] or 'unknown'}",
    }


def last_loss(metrics: Path, stage: str) -> dict[str, Any]:
    """The last entry of a run's `metrics.jsonl` that has a loss of this stage; empty where there is none."""
    if not metrics.is_file():
        return {}
    found = [entry for entry in read_metrics(metrics) if entry["stage"] == stage and "loss" in entry]
    return found[-1] if found else {}


def _body(text: CardText) -> str:
    facts = "\n".join(f"| {name} | {value} |" for name, value in text.training.items())
    limits = "\n".join(f"- {limit}" for limit in text.limits)
    made_from = f"Made from `{text.base}`.\n\n" if text.base else ""
    return (
        f"# {text.name}\n\n{text.about}\n\n{made_from}```python\n{text.use}\n```\n\n"
        f"## Measured\n\n{text.tables}\n\n"
        f"## Training\n\n| | |\n| --- | --- |\n{facts}\n\n"
        f"## Limits\n\n{limits}\n\n"
        f"## Recipe\n\n```yaml\n{text.recipe.rstrip()}\n```\n"
    )
