"""Compares ways to train on the same pairs, each at its own best learning rate, over several seeds.

    python -m eval.experiment EXPERIMENT.yaml --train SHARDS --output DIR

Every arm is swept on the first seed by one measure (on pictures of their own), then run at its best learning rate on
the other seeds. `report.md` has every other measure's mean over the seeds, and its difference to the baseline arm,
paired picture by picture; `report.png` draws those of the start and the arms. Started again, it goes on where it
stopped.
"""

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from eval.arm_scores import Encoders, Hits, MeasureConfig, any_of, cached, load_all, measure, part_names, soup
from eval.arms import ArmConfig, ArmRun, train
from eval.experiment_report import render, summarize, trained_rows
from eval.parallel_runs import RunsConfig, train_all
from vision_moe.config import parse
from vision_moe.files import write_json, write_text
from vision_moe.interruption import says_how_to_go_on
from vision_moe.plots import plot_differences
from vision_moe.tracking import environment, setup_logging

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig(RunsConfig):
    """Arms, measures and seeds.

    Example:
        .venv/bin/python -m eval.experiment eval/experiments/scenes_narrow.yaml --train outputs/scenes --output o
    """

    recipe: Path
    """Recipe of vision_moe.train that all arms share."""
    train: Path
    """Pictures and captions to train on, as --data.train of the recipe."""
    output: Path
    """Folder of all runs and of the report."""
    arms: dict[str, ArmConfig]
    """Arms by name."""
    baseline: str
    """Arm that the others are compared with."""
    measures: dict[str, MeasureConfig]
    """What is asked of every model."""
    select: str
    """Measure that the learning rate is chosen by, and not reported beside others: its pictures should be its own."""
    contrasts: list[list[str]] = field(default_factory=list)
    """Pairs of rows of the report to compare, beside each row with the baseline: the second is taken from the first."""
    flags: list[str] = field(default_factory=list)
    """Flags of vision_moe.train for all arms, such as --model DIR."""
    bf16: bool = False
    """Measure under bfloat16 autocast, as the recipes do at their end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline not in self.arms:
            raise ValueError(f"baseline must be one of the arms {sorted(self.arms)}, but got {self.baseline!r}")
        if self.select not in self.measures:
            raise ValueError(f"select must be one of the measures {sorted(self.measures)}, but got {self.select!r}")
        rows = {row for name, arm in self.arms.items() for row in _row_names(name, arm)}
        for pair in self.contrasts:
            if len(pair) != 2 or not set(pair) <= rows:
                raise ValueError(f"contrasts must be pairs of the rows {sorted(rows)}, but got {pair}")


def main() -> None:
    """Entry point."""
    setup_logging()
    config = parse(ExperimentConfig)
    with says_how_to_go_on(config.output):
        run(config)


def run(config: ExperimentConfig) -> dict[str, Any]:
    """Trains and measures every arm; writes and returns `results.json`."""
    _train(config, [run for name in config.arms for run in _sweep(config, name)])
    rates = {name: _best_rate(config, name) for name in config.arms}
    runs = {name: [ArmRun(name, arm, rates[name], seed) for seed in config.seeds] for name, arm in config.arms.items()}
    _train(config, [run for of_arm in runs.values() for run in of_arm])
    rows: dict[str, dict[str, list[Hits]]] = {}
    for done in (run for of_arm in runs.values() for run in of_arm):
        for row, found in _rows(config, done).items():
            for measured, hits in found.items():
                rows.setdefault(row, {}).setdefault(measured, []).append(hits)
    results = {
        "learning_rates": rates,
        "seeds": config.seeds,
        "baseline": config.baseline,
        **summarize(
            rows,
            config.baseline,
            config.contrasts,
            {name: part_names(config.measures[name]) for name in _reported(config)},
        ),
        "environment": environment(),
    }
    write_json(config.output / "results.json", results)
    write_text(config.output / "report.md", render(results))
    if compared := trained_rows(results):
        plot_differences(compared, config.output / "report.png", baseline=config.baseline)
    logger.info("report: %s", config.output / "report.md")
    return results


def _train(config: ExperimentConfig, runs: list[ArmRun]) -> None:
    def one(run: ArmRun, gpus: list[str]) -> None:
        train(run, config.recipe, config.flags, config.train, config.output, config.num_processes, gpus)

    train_all(one, runs, config.parallel_runs, config.num_processes)


def _sweep(config: ExperimentConfig, name: str) -> list[ArmRun]:
    """The arm's runs on the first seed, by rising learning rate."""
    arm = config.arms[name]
    return [ArmRun(name, arm, rate, config.seeds[0]) for rate in sorted(arm.learning_rates)]


def _best_rate(config: ExperimentConfig, name: str) -> float:
    """The learning rate whose model scores best on the selecting measure; the smaller one on a tie."""
    runs = _sweep(config, name)
    if len(runs) == 1:
        return runs[0].learning_rate
    scores = {
        run.learning_rate: _measured(config, run, "result", config.select, [run.model(config.output)]).score
        for run in runs
    }
    best = max(scores, key=lambda rate: (scores[rate], -rate))
    logger.info("%s: %s by learning rate %s; best %g", name, config.select, scores, best)
    if best in (min(scores), max(scores)):
        logger.warning("the best learning rate of %s, %g, is at the edge of its sweep; widen it", name, best)
    return best


def _reported(config: ExperimentConfig) -> list[str]:
    """Measures of the report: all but the one that the learning rate is chosen by, unless it is the only one."""
    return [name for name in config.measures if name != config.select] or [config.select]


def _row_names(name: str, arm: ArmConfig) -> list[str]:
    """The arm's rows: itself, and what can be made of its experts; see `_rows`."""
    made = [f"{name}: {what}" for what in ("best expert alone", "soup", "ensemble", "oracle")]
    return [name, *(["start", *made] if arm.experts else [])]


def _rows(config: ExperimentConfig, run: ArmRun) -> dict[str, dict[str, Hits]]:
    """Hits by row of the table and by measure: the arm, and what can be made of its experts."""
    asked = partial(_measured, config, run)
    result, members = run.model(config.output), run.members(config.output)
    rows: dict[str, dict[str, Hits]] = {}
    for name in _reported(config):
        found = [asked("result", name, [result])]
        if members:
            alone = [asked(folder.parent.name, name, [folder]) for folder in members]
            best = max(alone[1:], key=lambda hits: hits.score)
            made = [asked(what, name, members) for what in ("soup", "ensemble")]
            found += [alone[0], best, *made, any_of(alone)]
        for row, hits in zip(_row_names(run.name, run.arm), found, strict=True):
            rows.setdefault(row, {})[name] = hits
    return rows


def _measured(config: ExperimentConfig, run: ArmRun, what: str, name: str, folders: list[Path]) -> Hits:
    """Hits of a model, or of several made one ("soup") or averaged ("ensemble"); kept on disk, as all embeddings are.

    All runs have the same start, which is measured once.
    """

    def compute() -> Hits:
        models, processor = load_all(folders)
        models = [soup(models)] if what == "soup" else models
        return measure(config.measures[name], Encoders(models, processor, config.output / "embeddings", config.bf16))

    home = config.output if what == "start" else run.folder(config.output)
    return cached(home / "hits" / f"{what}-{name}.safetensors", compute)


if __name__ == "__main__":
    main()
