"""Ratios of CPU time: variants of one computation take turns in one process, one thread, and each round gives a ratio.

Another program on the machine slows all variants of a round alike, so ratios carry and seconds do not.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from vision_moe import files
from vision_moe.kernels import gemm_choice

Row = dict[str, str | float]
Seconds = dict[str, list[float]]
OURS = "vision_moe"
COLUMNS = ("case", "work", "against", "ratio", "least", "greatest", "at most", "seconds", "share of GEMM peak")


def interleave(variants: Mapping[str, Callable[[], object]], rounds: int, label: str) -> Seconds:
    """CPU seconds of each variant in each round, after one round that warms up."""
    seconds: Seconds = {name: [] for name in variants}
    for turn in tqdm(range(rounds + 1), desc=label, disable=None, leave=False):
        for name, run in variants.items():
            start = time.process_time()
            run()
            if turn:
                seconds[name].append(time.process_time() - start)
    return seconds


def rows_of(seconds: Seconds, baseline: str, **case: str | float) -> list[Row]:
    """One row per variant: median seconds, and median, least and greatest ratio to the baseline of the same round."""
    rows = []
    for name, times in seconds.items():
        ratios = [mine / base for mine, base in zip(times, seconds[baseline], strict=True)]
        spread = {"ratio": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)}
        rows.append({**case, "variant": name, "baseline": baseline, "seconds": statistics.median(times), **spread})
    return rows


def comparisons(
    seconds: Seconds,
    limits: Mapping[str, float | None],
    *,
    case: str,
    work: str,
    ours: str = OURS,
    flop_share: float | None = None,
) -> list[Row]:
    """One row of the table for each baseline, ours against it.

    Args:
        seconds: of ours and of the baselines.
        limits: baseline to the ratio that we hold ourselves to, None where there is none.
        case: sizes.
        work: what was done.
        ours: name of our variant.
        flop_share: floating-point operations over the machine's GEMM peak: the seconds that they take at best.
    """
    rows = []
    for baseline, limit in limits.items():
        row = next(row for row in rows_of(seconds, baseline) if row["variant"] == ours)
        found = {"ratio": row["ratio"], "least": row["least"], "greatest": row["greatest"], "seconds": row["seconds"]}
        if limit is not None:
            found["at most"] = limit
        if flop_share is not None:
            found["share of GEMM peak"] = flop_share / float(row["seconds"])
        rows.append({"case": case, "work": work, "against": baseline, **found})
    return rows


def peak(dtype: torch.dtype, rounds: int, size: int) -> float:
    """Multiply-adds per CPU second, times two, of the faster of torch's and oneDNN's linear on square matrices."""
    x, w = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    variants: dict[str, Callable[[], object]] = {"torch": lambda: nn.functional.linear(x, w)}
    if gemm_choice.onednn_works(dtype):
        variants["onednn"] = lambda: gemm_choice.onednn_linear(x, w, None, "none", "")
    with torch.no_grad():
        seconds = interleave(variants, rounds, f"GEMM peak {dtype}")
    return 2.0 * size**3 / min(min(times) for times in seconds.values())


def in_child(name: str, *arguments: str) -> dict[str, float]:
    """What a function of child.py finds in a process of its own: CPU seconds, and memory in bytes."""
    command = [sys.executable, str(Path(__file__).with_name("child.py")), name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: Iterable[Row], columns: tuple[str, ...] = COLUMNS) -> str:
    """The rows as Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        lines.append(
            "| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"
        )
    return "\n".join(lines) + "\n"


def write_json(rows: list[Row], file: Path, **more: Any) -> None:
    """The rows, with the machine, the versions and the day."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    about = {line.split(":")[0].strip(): line.split(":")[1].strip() for line in lines if ":" in line}
    cpu = about.get("model name", platform.processor())
    # AMD's name does not say which generation it is.
    cpu += f" (family {about.get('cpu family')}, model {about.get('model')})" if about else ""
    where = {"cpu": cpu, "torch": torch.__version__, "threads": torch.get_num_threads(), "date": str(date.today())}
    files.write_json(file, {"where": where, **more, "rows": rows})
