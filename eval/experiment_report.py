"""What an experiment found: means over seeds, paired differences to the baseline and between rows, as Markdown.

R parts of a measure, N pictures.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.arm_scores import Hits, difference, mean_of, summary
from eval.tables import percent, table
from vision_moe.intervals import bootstrap_ratio_intervals

# Hits of every seed, by row of the table and by measure.
Rows = Mapping[str, Mapping[str, list[Hits]]]


def summarize(rows: Rows, baseline: str, contrasts: Sequence[Sequence[str]], parts: Mapping[str, Sequence[str]]) -> Any:
    """Rows and contrasts of `results.json`.

    Args:
        rows: the hits.
        baseline: row that the others are compared with.
        contrasts: pairs of rows; the second is taken from the first.
        parts: names of each measure's parts.
    """
    return {
        "rows": {
            row: {name: _row(rows[row][name], rows[baseline][name], parts[name]) for name in parts} for row in rows
        },
        "contrasts": [
            {"a": a, "b": b, "measures": {name: difference(rows[a][name], rows[b][name]) for name in parts}}
            for a, b in contrasts
        ],
    }


def render(results: dict[str, Any]) -> str:
    """`results.json` as Markdown."""
    rows, baseline = results["rows"], results["baseline"]
    measures = list(next(iter(rows.values())))
    header = ["", *(part for name in measures for part in (name, f"{name}, above {baseline}"))]
    lines = [[row, *(cell for name in measures for cell in _cells(found[name]))] for row, found in rows.items()]
    rates = ", ".join(f"{arm} {rate:g}" for arm, rate in results["learning_rates"].items())
    blocks = [
        table(header, lines),
        f"In %: mean over seeds {results['seeds']} with its deviation, and difference to {baseline} with its 95 % "
        f"interval, paired over pictures. Learning rates, each arm's best: {rates}. An oracle takes for every picture "
        "the member that answers best.",
    ]
    if results["contrasts"]:
        lines = [
            [
                f"{of['a']} above {of['b']}",
                *(percent(of["measures"][name]["difference"], of["measures"][name]["interval"]) for name in measures),
            ]
            for of in results["contrasts"]
        ]
        blocks.append(table(["", *measures], lines))
    blocks += [_part_table(rows, name, baseline) for name in measures]
    return "# Experiment\n\n" + "\n\n".join(blocks) + "\n"


def trained_rows(results: dict[str, Any]) -> dict[str, dict[str, tuple[float, tuple[float, float]]]]:
    """Difference to the baseline and its interval, by row and measure: of the other arms and of the start.

    What is made of an arm's experts is left out: an oracle's distance would squeeze all others.
    """
    names = [row for row in ("start", *results["learning_rates"]) if row in results["rows"]]
    return {
        row: {name: (of["difference"], tuple(of["interval"])) for name, of in results["rows"][row].items()}
        for row in names
        if row != results["baseline"]
    }


def _row(found: list[Hits], baseline: list[Hits], parts: Sequence[str]) -> dict[str, Any]:
    mean, base = mean_of(found), mean_of(baseline)
    intervals = bootstrap_ratio_intervals(mean.hits - base.hits, mean.questions, seed=0)
    share_R, base_R = _shares(mean), _shares(base)
    return {
        **summary(found, baseline),
        "parts": {
            part: {"mean": share_R[r], "difference": share_R[r] - base_R[r], "interval": list(intervals[r])}
            for r, part in enumerate(parts)
        },
    }


def _shares(of: Hits) -> list[float]:
    shares_R: NDArray[np.float64] = of.hits.sum(axis=1) / of.questions.sum(axis=1)
    return [float(share) for share in shares_R]


def _cells(found: dict[str, Any]) -> list[str]:
    spread = "" if found["deviation"] is None else f" ± {100 * found['deviation']:.1f}"
    return [percent(found["mean"]) + spread, percent(found["difference"], found["interval"])]


def _part_table(rows: dict[str, Any], name: str, baseline: str) -> str:
    """One measure part by part: the mean, and the difference to the baseline."""
    parts = list(next(iter(rows.values()))[name]["parts"])
    lines = [
        [
            row,
            *(
                f"{percent(part['mean'])}, {percent(part['difference'], part['interval'])}"
                for part in found[name]["parts"].values()
            ),
        ]
        for row, found in rows.items()
    ]
    return f"{name}, part by part (mean, above {baseline}):\n\n{table(['', *parts], lines)}"
