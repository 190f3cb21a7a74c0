"""Markdown tables of what the commands of `eval` measure."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def percent(value: float, interval: Sequence[float] | None = None) -> str:
    """Share -> "12.3" or "12.3 [11.0, 13.7]", in per cent."""
    if interval is None:
        return f"{100 * value:.1f}"
    return f"{100 * value:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def number(value: float, interval: Sequence[float] | None, *, scale: float = 1.0) -> str:
    """A number in its own unit -> "1486.2 [1450.1, 1520.3]", times scale."""
    digits = 1 if scale != 1 or abs(value) >= 1 else 4
    shown = f"{scale * value:.{digits}f}"
    if interval is None:
        return shown
    return f"{shown} [{scale * interval[0]:.{digits}f}, {scale * interval[1]:.{digits}f}]"


def retrieval_table(result: dict[str, Any]) -> str:
    """Table of `vision_moe.retrieval.recalls`."""
    ks = list(result["image_to_text"])
    rows = []
    for way, n in (("image_to_text", "num_images"), ("text_to_image", "num_captions")):
        cells = [percent(result[way][k], result[f"{way}_interval"][k]) for k in ks]
        rows.append([way.replace("_", " "), *cells, str(result[n])])
    mean = percent(result["mean_R@1"], result["mean_R@1_interval"])
    return table(["direction", *ks, "n"], rows) + f"\n\nmean R@1 {mean} (%, 95 % intervals)"


def factors_table(result: dict[str, Any]) -> str:
    """Table of `vision_moe.factors.factor_accuracy`."""
    rows = [
        [name, percent(entry["accuracy"], entry["interval"]), percent(entry["chance"]), str(entry["n"])]
        for name, entry in result.items()
    ]
    accuracy, chance = (fmean(entry[key] for entry in result.values()) for key in ("accuracy", "chance"))
    rows.append(["mean of factors", percent(accuracy), percent(chance), ""])
    return table(["factor", "accuracy (%, 95 % interval)", "chance", "n"], rows)


def zero_shot_table(result: dict[str, Any]) -> str:
    """Table of `eval.zero_shot.zero_shot`."""
    rows = [
        [name, percent(entry["value"], entry["interval"]), str(entry["n"])]
        for name, entry in result["accuracy"].items()
    ]
    return table(["accuracy", "% (95 % interval)", "n"], rows)


def imagenet_o_table(result: dict[str, Any]) -> str:
    """Table of `eval.imagenet_o.detection`."""
    found, taken = result["aupr"], result["taken_for_folder"]
    rows = [
        ["AUPR", percent(found["value"], found["interval"]), percent(result["chance"]), str(found["n"])],
        ["taken for the folder's class", percent(taken["value"], taken["interval"]), "", str(taken["n"])],
    ]
    return table(["ImageNet-O", "% (95 % interval)", "chance", "n"], rows)


def comparison_table(result: dict[str, Any]) -> str:
    """Table of `eval.compare.compare`."""
    rows = []
    for name, entry in result["differences"].items():
        low, high = (f"{100 * value:+.1f}" for value in entry["interval"])
        p = f"{entry['mcnemar']['p']:.3g}" if "mcnemar" in entry else ""
        difference = f"{100 * entry['value']:+.1f} [{low}, {high}]"
        rows.append([name, percent(entry["a"]), percent(entry["b"]), difference, p, str(entry["n"])])
    return table(["", "A, %", "B, %", "B - A (95 % interval)", "McNemar's p", "n"], rows)


def yes_no_table(result: dict[str, Any]) -> str:
    """Table of `eval.metrics.yes_no_scores`."""
    found = result["accuracy"]
    rows = [["accuracy", percent(found["value"], found["interval"]), str(found["n"])]]
    rows += [[name, percent(result[name]), ""] for name in ("f1", "yes_ratio", "true_yes_ratio", "unparsed")]
    return table(["yes or no", "% (95 % interval)", "n"], rows)


def tasks_table(result: dict[str, Any]) -> str:
    """Table of `eval.run`: every number of every task."""
    rows = []
    for task, entry in result.items():
        for name, value in entry["metrics"].items():
            interval = entry["intervals"].get(name)
            ends = "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
            rows.append([task, name, f"{value:.4f}", ends, str(entry["n"])])
        if "yes_no" in entry:
            rows += [
                [task, key, f"{entry['yes_no'][key]:.4f}", "", str(entry["n"])] for key in ("yes_ratio", "unparsed")
            ]
    return table(["task", "metric", "value", "95 % interval", "n"], rows)
