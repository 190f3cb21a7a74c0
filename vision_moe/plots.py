"""Plots of reports: training curves, expert utilization, accuracy per factor, differences; each one whole PNG.

The object-oriented interface of matplotlib throughout: pyplot keeps global state and picks a GUI backend.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vision_moe.files import replacing
from vision_moe.metrics import read_metrics

# Okabe and Ito's colors (2008), distinguishable with any common form of color blindness.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")


def plot_curves(files: Mapping[str, Path], output: Path, *, keys: Sequence[str] = ("loss",)) -> None:
    """Draws logged values over steps: one panel per key, one line per run and stage.

    Args:
        files: `metrics.jsonl` by the name its run has in the legend.
        output: PNG to write.
        keys: logged names, as they stand in the files; a run that never logs one is left out of its panel.

    Raises:
        ValueError: if no file logs a key.
    """
    runs = {name: read_metrics(path) for name, path in files.items()}
    figure = Figure(figsize=(5.2 * len(keys), 3.4), layout="constrained")
    for panel, key in zip(np.atleast_1d(figure.subplots(1, len(keys))), keys, strict=True):
        lines = [line for name, entries in runs.items() for line in _stages(name, entries, key)]
        if not lines:
            logged = sorted({known for entries in runs.values() for entry in entries for known in entry})
            raise ValueError(f"no run logs {key!r}; logged are: {', '.join(logged) or 'nothing'}")
        for index, (label, steps, values) in enumerate(lines):
            panel.plot(steps, values, label=label, color=COLORS[index % len(COLORS)], linewidth=1.4)
        panel.set(xlabel="step", ylabel=key)
        _plain(panel)
        if any(label for label, *_ in lines):
            panel.legend(frameon=False, fontsize=8)
    _save(figure, output)


def plot_utilization(result: Mapping[str, Any], output: Path, *, share: str = "share_top_k") -> None:
    """Draws layers x experts heat maps of a result of `vision_moe.analysis.utilization`, one per tower.

    Args:
        result: the result.
        output: PNG to write.
        share: "share_top_k" (all choices counted, as in the paper) or "share_top_1".

    Raises:
        ValueError: if `share` is unknown.
    """
    if share not in ("share_top_k", "share_top_1"):
        raise ValueError(f"unknown share {share!r}; choose one of: share_top_k, share_top_1")
    towers = result["towers"]
    rows = max(len(tower["layers"]) for tower in towers.values())
    figure = Figure(figsize=(1.2 + 3.4 * len(towers), 1.6 + 0.36 * rows), layout="constrained")
    for panel, (name, tower) in zip(np.atleast_1d(figure.subplots(1, len(towers))), towers.items(), strict=True):
        choices = tower["top_k"] if share == "share_top_k" else 1
        image = panel.imshow(np.asarray(tower[share]), cmap="viridis", vmin=0, vmax=1, aspect="auto")
        _annotate(panel, np.asarray(tower[share]))
        panel.set(
            title=f"{name}, {tower['num_tokens']:,} tokens\neven use: {choices / tower['num_experts']:.2f}",
            xlabel="expert",
            ylabel="block",
            xticks=range(tower["num_experts"]),
            yticks=range(len(tower["layers"])),
            yticklabels=tower["layers"],
        )
        panel.title.set_fontsize(10)
    what = "any of its choices" if share == "share_top_k" else "first choice"
    figure.colorbar(image, ax=panel, label=f"share of tokens ({what})")
    _save(figure, output)


def plot_factors(
    table: Mapping[str, Mapping[str, float]], output: Path, *, chance: Mapping[str, float] | None = None
) -> None:
    """Draws accuracy per factor as grouped bars, one color per model, with a mark where chance lies.

    Args:
        table: accuracy in [0, 1] by model and factor; every model must have the same factors.
        output: PNG to write.
        chance: chance accuracy by factor; None draws no marks.

    Raises:
        ValueError: if the table is empty or the models differ in their factors.
    """
    if not table:
        raise ValueError("got a table without rows; pass {model: {factor: accuracy}}")
    factors = list(next(iter(table.values())))
    for name, row in table.items():
        if set(row) != set(factors):
            raise ValueError(f"{name!r} has factors {sorted(row)}, but the first row has {sorted(factors)}")
    positions = np.arange(len(factors))
    width = 0.8 / len(table)
    figure = Figure(figsize=(max(4.0, 1.2 + len(factors) * (0.5 + 0.18 * len(table))), 3.4), layout="constrained")
    panel = figure.subplots()
    for index, (name, row) in enumerate(table.items()):
        offsets = positions - 0.4 + width * (index + 0.5)
        heights = [100 * row[factor] for factor in factors]
        panel.bar(offsets, heights, width * 0.92, label=name, color=COLORS[index % len(COLORS)])
    if chance is not None:
        marks = [100 * chance[factor] for factor in factors]
        panel.hlines(marks, positions - 0.44, positions + 0.44, color="#222222", linewidth=1.6, label="chance")
    panel.set(xticks=positions, xticklabels=factors, ylabel="accuracy, %", ylim=(0, 100))
    _plain(panel)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    _save(figure, output)


def plot_differences(
    rows: Mapping[str, Mapping[str, tuple[float, tuple[float, float]]]], output: Path, *, baseline: str
) -> None:
    """Draws differences to a baseline with their intervals: one panel per measure, one line per row.

    Args:
        rows: difference and its interval, as shares, by row and measure; every row must have the same measures.
        output: PNG to write.
        baseline: what the rows are compared with, for the axes.

    Raises:
        ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError("got no rows; pass {row: {measure: (difference, (low, high))}}")
    measures = list(next(iter(rows.values())))
    size = (2.2 + 2.3 * len(measures), 1.0 + 0.3 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    for panel, measure in zip(np.atleast_1d(figure.subplots(1, len(measures), sharey=True)), measures, strict=True):
        panel.axvline(0, color="#222222", linewidth=0.8)
        for index, row in enumerate(rows.values()):
            difference, interval = row[measure]
            color = COLORS[index % len(COLORS)]
            panel.plot([100 * end for end in interval], [index, index], color=color, linewidth=2)
            panel.plot(100 * difference, index, "o", color=color, markersize=5)
        panel.set(title=measure, xlabel=f"above {baseline}, points", yticks=range(len(rows)), yticklabels=rows)
        panel.title.set_fontsize(10)
        _plain(panel)
    # The axis is shared: the first row stands on top of every panel.
    panel.invert_yaxis()
    _save(figure, output)


def _stages(name: str, entries: list[dict[str, Any]], key: str) -> list[tuple[str, list[int], list[float]]]:
    points: dict[str, list[tuple[int, float]]] = {}
    for entry in entries:
        if key in entry:
            points.setdefault(entry.get("stage", ""), []).append((entry["step"], entry[key]))
    # A file of one stage needs no stage in its legend.
    labels = {stage: f"{name} {stage}".strip() if len(points) > 1 else name for stage in points}
    return [(labels[stage], [s for s, _ in seen], [v for _, v in seen]) for stage, seen in points.items()]


def _annotate(panel: Axes, values: "np.ndarray[Any, Any]") -> None:
    for row, column in np.ndindex(*values.shape):
        value = values[row, column]
        # Viridis is dark below its middle.
        color = "white" if value < 0.6 else "black"
        panel.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)


def _plain(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    panel.set_axisbelow(True)


def _save(figure: Figure, output: Path) -> None:
    FigureCanvasAgg(figure)
    with replacing(output) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
