"""Ratios of CPU time: variants of one computation take turns in one process, one thread, and each round gives a ratio.

Another program on the machine slows all variants of a round alike, so ratios carry and seconds do not.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path

import torch
from tqdm import tqdm

Row = dict[str, str | float]


def interleave(variants: dict[str, Callable[[], object]], rounds: int, label: str) -> dict[str, list[float]]:
    """CPU seconds of each variant in each round, after one round that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in tqdm(range(rounds + 1), desc=label, disable=None, leave=False):
        for name, run in variants.items():
            start = time.process_time()
            run()
            if turn:
                seconds[name].append(time.process_time() - start)
    return seconds


def rows_of(seconds: dict[str, list[float]], baseline: str, **case: str | float) -> list[Row]:
    """One row per variant: median seconds, and median, least and greatest ratio to the baseline of the same round."""
    rows = []
    for name, times in seconds.items():
        ratios = [mine / base for mine, base in zip(times, seconds[baseline], strict=True)]
        spread = {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
        rows.append({**case, "variant": name, "baseline": baseline, "seconds": statistics.median(times), **spread})
    return rows


def print_table(rows: Iterable[Row], columns: tuple[str, ...]) -> None:
    """Markdown on stdout."""
    print("| " + " | ".join(columns) + " |")
    print("| " + " | ".join("---" for _ in columns) + " |")
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        print("| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")


def write_json(rows: list[Row], file: Path) -> None:
    """The rows, with the machine, the versions and the day."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    where = {"cpu": cpu, "torch": torch.__version__, "threads": torch.get_num_threads(), "date": str(date.today())}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"where": where, "rows": rows}, indent=1) + "\n")
    print(f"\n{where}\nwritten to {file}")
