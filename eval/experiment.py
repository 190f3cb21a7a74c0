"""Compares ways to train on the same pairs, each at its own best learning rate, over several seeds.

    python -m eval.experiment EXPERIMENT.yaml --train SHARDS --output DIR

Every arm is swept on the first seed by one measure (on pictures of their own), then run at its best learning rate on
the other seeds. `report.md` has every measure's mean over the seeds, and its difference to the baseline arm, paired
picture by picture. Started again, it goes on where it stopped.
"""

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import stdev
from typing import Any

from eval.arm_scores import Encoders, Hits, MeasureConfig, any_of, cached, load_all, mean_of, measure, soup
from eval.arms import ArmConfig, ArmRun, train
from eval.report import percent, table
from vision_moe.config import parse
from vision_moe.files import write_json, write_text
from vision_moe.interruption import says_how_to_go_on
from vision_moe.intervals import bootstrap_ratio_interval
from vision_moe.tracking import environment, setup_logging

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
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
    """Measure that the learning rate is chosen by; its pictures should not be those of the others."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """The first is the sweep's."""
    num_processes: int = 1
    """Processes of each training run."""

    def __post_init__(self) -> None:
        if self.baseline not in self.arms:
            raise ValueError(f"baseline must be one of the arms {sorted(self.arms)}, but got {self.baseline!r}")
        if self.select not in self.measures:
            raise ValueError(f"select must be one of the measures {sorted(self.measures)}, but got {self.select!r}")
        if not self.seeds:
            raise ValueError("seeds is empty; name at least one")


def main() -> None:
    """Entry point."""
    setup_logging()
    config = parse(ExperimentConfig)
    with says_how_to_go_on(config.output):
        run(config)


def run(config: ExperimentConfig) -> dict[str, Any]:
    """Trains and measures every arm; writes and returns `results.json`."""
    rates = {name: _best_rate(config, name) for name in config.arms}
    rows: dict[str, dict[str, list[Hits]]] = {}
    for name, arm in config.arms.items():
        for seed in config.seeds:
            done = _trained(config, ArmRun(name, arm, rates[name], seed))
            for row, found in _rows(config, done).items():
                for measured, hits in found.items():
                    rows.setdefault(row, {}).setdefault(measured, []).append(hits)
    results = {
        "learning_rates": rates,
        "seeds": config.seeds,
        "baseline": config.baseline,
        "rows": {row: {name: _summary(config, rows, row, name) for name in config.measures} for row in rows},
        "environment": environment(),
    }
    write_json(config.output / "results.json", results)
    write_text(config.output / "report.md", render(results))
    logger.info("report: %s", config.output / "report.md")
    return results


def render(results: dict[str, Any]) -> str:
    """`results.json` as Markdown."""
    rows = results["rows"]
    measures = list(next(iter(rows.values())))
    header = ["", *(part for name in measures for part in (name, f"{name}, above {results['baseline']}"))]
    lines = []
    for row, found in rows.items():
        cells = []
        for name in measures:
            spread = "" if found[name]["deviation"] is None else f" ± {100 * found[name]['deviation']:.1f}"
            cells.append(percent(found[name]["mean"]) + spread)
            cells.append(percent(found[name]["difference"], found[name]["interval"]))
        lines.append([row, *cells])
    rates = ", ".join(f"{arm} {rate:g}" for arm, rate in results["learning_rates"].items())
    return (
        f"# Experiment\n\n{table(header, lines)}\n\nIn %: mean over seeds {results['seeds']} with its deviation, and "
        f"difference to {results['baseline']} with its 95 % interval, paired over pictures. Learning rates, each "
        f"arm's best: {rates}. An oracle takes for every picture the member that answers best.\n"
    )


def _trained(config: ExperimentConfig, run: ArmRun) -> ArmRun:
    train(run, config.recipe, config.train, config.output, config.num_processes)
    return run


def _best_rate(config: ExperimentConfig, name: str) -> float:
    """The learning rate whose model scores best on the selecting measure; the smaller one on a tie."""
    arm, seed = config.arms[name], config.seeds[0]
    if len(arm.learning_rates) == 1:
        return arm.learning_rates[0]
    scores = {}
    for rate in sorted(arm.learning_rates):
        done = _trained(config, ArmRun(name, arm, rate, seed))
        scores[rate] = _measured(config, done, "result", config.select, [done.model(config.output)]).score
    best = max(scores, key=lambda rate: (scores[rate], -rate))
    logger.info("%s: %s by learning rate %s; best %g", name, config.select, scores, best)
    if best in (min(scores), max(scores)):
        logger.warning("the best learning rate of %s, %g, is at the edge of its sweep; widen it", name, best)
    return best


def _rows(config: ExperimentConfig, run: ArmRun) -> dict[str, dict[str, Hits]]:
    """Hits by row of the table and by measure: the arm, and what can be made of its experts."""
    asked = partial(_measured, config, run)
    result, members = run.model(config.output), run.members(config.output)
    rows: dict[str, dict[str, Hits]] = {run.name: {}}
    for name in config.measures:
        rows[run.name][name] = asked("result", name, [result])
        if members:
            alone = [asked(folder.parent.name, name, [folder]) for folder in members]
            made = {
                "start": alone[0],
                f"{run.name}: best expert alone": max(alone[1:], key=lambda hits: hits.score),
                f"{run.name}: soup": asked("soup", name, members),
                f"{run.name}: ensemble": asked("ensemble", name, members),
                f"{run.name}: oracle": any_of(alone),
            }
            for row, hits in made.items():
                rows.setdefault(row, {})[name] = hits
    return rows


def _measured(config: ExperimentConfig, run: ArmRun, what: str, name: str, folders: list[Path]) -> Hits:
    """Hits of a model, or of several made one ("soup") or averaged ("ensemble"); kept on disk.

    All runs have the same start, which is measured once.
    """

    def compute() -> Hits:
        models, processor = load_all(folders)
        return measure(config.measures[name], Encoders([soup(models)] if what == "soup" else models, processor))

    home = config.output if what == "start" else run.folder(config.output)
    return cached(home / "hits" / f"{what}-{name}.safetensors", compute)


def _summary(
    config: ExperimentConfig, rows: dict[str, dict[str, list[Hits]]], row: str, name: str
) -> dict[str, float | list[float] | None]:
    found, baseline = mean_of(rows[row][name]), mean_of(rows[config.baseline][name])
    scores = [hits.score for hits in rows[row][name]]
    interval = bootstrap_ratio_interval(found.hits - baseline.hits, found.questions, seed=0)
    return {
        "mean": found.score,
        "deviation": stdev(scores) if len(scores) > 1 else None,
        "difference": found.score - baseline.score,
        "interval": list(interval),
    }


if __name__ == "__main__":
    main()
