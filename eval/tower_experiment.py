"""Compares vision towers as the eyes of one LLaVA: same photos, same dialogues, same steps, over several seeds.

    python -m eval.tower_experiment EXPERIMENT.yaml --data SHARDS --towers '{dense: DIR, CLIP-MoE: DIR}' --output DIR

Photos with captions become dialogues; each tower and seed is one run of the recipe. On photos not trained on,
`report.md` has the loss of their captions, with the photo and with a blank one, and the share of yes/no questions right
whether a caption is the photo's (half of the answers yes). Differences to the baseline are paired photo by photo.
Started again, it goes on where it stopped.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from eval.arm_scores import Hits, cached, summary
from eval.arms import run_trainer
from eval.parallel_runs import RunsConfig, train_all
from eval.tables import table
from eval.yes_no import YesNoConfig, ask
from mllm.caption_loss import CaptionLossConfig, sample_losses
from mllm.captions_to_conversations import ConversionConfig, convert
from mllm.stages import is_finished
from vision_moe.config import parse
from vision_moe.files import write_json, write_text
from vision_moe.run_folder import check_folder, claim_folder
from vision_moe.tracking import environment, setup_logging

logger = logging.getLogger(__name__)

# Fields that may differ between an experiment and its continuation.
_FREE_FIELDS = ("seeds", "num_processes", "parallel_runs")
_LOSS, _BLANK, _MATCHING = "caption loss", "caption loss, blank photo", "matching"


@dataclass(frozen=True, kw_only=True)
class TowerExperimentConfig(RunsConfig):
    """Towers, photos and seeds.

    Example:
        .venv/bin/python -m eval.tower_experiment eval/experiments/towers/flickr8k.yaml --data flickr8k --output o
    """

    recipe: Path
    """Recipe of mllm.train that all runs share: it pretrains on captions and fine-tunes on captions and questions."""
    data: Path
    """Folder of shards of photos with captions."""
    output: Path
    """Folder of the dialogues, all runs and the report."""
    towers: dict[str, str]
    """Vision towers by name: what mllm.train takes as --vision."""
    baseline: str
    """Tower that the others are compared with."""
    split: str = "train"
    """Shards `{split}-*.tar` are trained on."""
    held_out_split: str = "val"
    """Shards that are measured on."""
    held_out_photos: int | None = None
    """Photos of them to take; all if None."""
    questions: int = 2
    """Yes/no questions about each photo, half of them with yes."""
    flags: list[str] = field(default_factory=list)
    """Further flags of mllm.train for all runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline not in self.towers:
            raise ValueError(f"baseline must be one of the towers {sorted(self.towers)}, but got {self.baseline!r}")
        if self.questions < 2 or self.questions % 2:
            raise ValueError(f"questions must be an even number of at least 2, but got {self.questions}")


def main() -> None:
    """Entry point."""
    setup_logging()
    run(parse(TowerExperimentConfig))


def run(config: TowerExperimentConfig) -> dict[str, Any]:
    """Trains and measures every tower; writes and returns `results.json`.

    Raises:
        ValueError: the output folder holds an experiment of other settings.
        RuntimeError: a training run failed.
    """
    check_folder(config, config.output, _FREE_FIELDS)
    claim_folder(config, config.output)
    for split, limit in ((config.split, None), (config.held_out_split, config.held_out_photos)):
        if not _dialogues(config, split).is_dir():
            convert(
                ConversionConfig(
                    data=config.data, out=_dialogues(config, split), split=split, limit=limit, matching=config.questions
                )
            )
    # Seed by seed: what an interrupted experiment has, it has of all towers.
    runs = [(name, seed) for seed in config.seeds for name in config.towers]
    train_all(partial(_train, config), runs, config.parallel_runs, config.num_processes)
    found: dict[str, dict[str, list[Hits]]] = {name: {} for name in config.towers}
    for name, seed in runs:
        for measured, hits in _measure(config, _folder(config, name, seed)).items():
            found[name].setdefault(measured, []).append(hits)
    results = {
        "seeds": config.seeds,
        "baseline": config.baseline,
        "towers": config.towers,
        "rows": {
            name: {of: summary(hits, found[config.baseline][of]) for of, hits in measures.items()}
            for name, measures in found.items()
        },
        "environment": environment(),
    }
    write_json(config.output / "results.json", results)
    write_text(config.output / "report.md", render(results))
    logger.info("report: %s", config.output / "report.md")
    return results


def render(results: Mapping[str, Any]) -> str:
    """`results.json` as Markdown."""
    baseline = results["baseline"]
    columns = [(_LOSS, 1, 3), (_BLANK, 1, 3), (_MATCHING, 100, 1)]
    header = ["tower", *(part for name, _, _ in columns for part in (name, f"{name}, above {baseline}"))]
    lines = []
    for tower, row in results["rows"].items():
        cells = []
        for name, scale, digits in columns:
            mean, deviation, difference, (low, high) = row[name].values()
            spread = "" if deviation is None else f" ± {scale * deviation:.{digits}f}"
            cells.append(f"{scale * mean:.{digits}f}{spread}")
            ends = (f"{scale * value:+.{digits}f}" for value in (low, high))
            cells.append(f"{scale * difference:+.{digits}f} [{', '.join(ends)}]")
        lines.append([tower, *cells])
    return (
        f"# Vision towers\n\n{table(header, lines)}\n\nLosses in nats per token, matching in % right (chance 50). Mean "
        f"over seeds {results['seeds']} with its deviation, and difference to {baseline} with its 95 % interval, "
        f"paired over photos.\n"
    )


def _dialogues(config: TowerExperimentConfig, split: str) -> Path:
    return config.output / "dialogues" / split


def _folder(config: TowerExperimentConfig, tower: str, seed: int) -> Path:
    return config.output / "runs" / f"{tower}-seed{seed}"


def _train(config: TowerExperimentConfig, run: tuple[str, int], gpus: list[str]) -> None:
    name, seed = run
    folder = _folder(config, name, seed)
    if is_finished(folder / "finetune"):
        return
    data = _dialogues(config, config.split)
    flags = ["--vision", config.towers[name], "--output", str(folder), "--seed", str(seed)]
    flags += ["--image_folder", str(data / "images"), "--pretrain.data", str(data / "llava_pretrain.json")]
    flags += ["--finetune.data", str(data / "llava_mixed.json"), *config.flags]
    run_trainer("mllm.train", [str(config.recipe), *flags], folder, config.num_processes, gpus)


def _measure(config: TowerExperimentConfig, folder: Path) -> dict[str, Hits]:
    """Losses and right answers of each held-out photo; kept on disk."""
    model, data = folder / "model", _dialogues(config, config.held_out_split)
    images = data / "images"
    # One pass gives both losses.
    losses = cache(
        lambda: sample_losses(CaptionLossConfig(model=model, data=data / "llava_finetune.json", image_folder=images))
    )

    def matching() -> Hits:
        answers = ask(YesNoConfig(model=str(model), data=data / "llava_matching.json", image_folder=images))
        return _hits(np.bincount(answers.picture_Q, answers.right), np.bincount(answers.picture_Q))

    measures = {
        _LOSS: lambda: _hits(losses().image_N, losses().tokens_N),
        _BLANK: lambda: _hits(losses().blank_N, losses().tokens_N),
        _MATCHING: matching,
    }
    return {name: cached(folder / "hits" / f"{name}.safetensors", compute) for name, compute in measures.items()}


def _hits(sums_N: Any, counts_N: Any) -> Hits:
    """One measure of N photos."""
    return Hits(np.asarray(sums_N, dtype=np.float64)[None], np.asarray(counts_N, dtype=np.float64)[None])


if __name__ == "__main__":
    main()
