"""Records of measurements -> Markdown tables: `python -m eval.report FILE_OR_FOLDER ...`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from vision_moe.command_help import CommandParser


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


def tasks_table(result: dict[str, Any]) -> str:
    """Table of `eval.run`: every number of every task."""
    rows = []
    for task, entry in result.items():
        rows += [[task, name, f"{value:.4f}", str(entry["n"])] for name, value in entry["metrics"].items()]
        if "yes_no" in entry:
            scores = entry["yes_no"]
            low, high = scores["accuracy"]["interval"]
            rows.append([task, "accuracy, 95 % interval", f"{low:.4f} to {high:.4f}", str(entry["n"])])
            rows += [[task, key, f"{scores[key]:.4f}", str(entry["n"])] for key in ("yes_ratio", "unparsed")]
    return table(["task", "metric", "value", "n"], rows)


def render(record: dict[str, Any]) -> str:
    """The table of any record that a command of `eval` wrote.

    Raises:
        ValueError: if the file is none of them.
    """
    tables = {
        "retrieval": retrieval_table,
        "factors": factors_table,
        "zero_shot": zero_shot_table,
        "imagenet_o": imagenet_o_table,
        "lmms_eval": tasks_table,
    }
    benchmark = record.get("benchmark")
    if benchmark not in tables:
        raise ValueError(f"unknown benchmark {benchmark!r}; choose one of: {', '.join(tables)}")
    return tables[benchmark](record["result"])


def main(args: Sequence[str] | None = None) -> None:
    """Prints the table of each record named, or found in the folders named."""
    parser = CommandParser(__doc__, ".venv/bin/python -m eval.report outputs/records")
    parser.add_argument("records", nargs="+", type=Path, help="record files, or folders searched for *.json")
    files: list[Path] = []
    for path in parser.parse_args(args).records:
        files += sorted(path.rglob("*.json")) if path.is_dir() else [path]
    shown = 0
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and "benchmark" in content:
            sys.stdout.write(f"## {content['benchmark']}: {content['model']['path']}\n\n{render(content)}\n\n")
            shown += 1
    if not shown:
        raise SystemExit(f"no record among {len(files)} files; name the JSON that a command of eval wrote")


if __name__ == "__main__":
    main()
