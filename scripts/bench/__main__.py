"""The CPU benchmark, `bash scripts/bench/run.sh`: one table of ratios, one thread, CPU time; JSON and a plot too."""

import argparse
import logging
import time
from collections.abc import Callable
from pathlib import Path

import encoder
import growth
import language
import layers
import levers
import torch
from measure import Row, peak, table, write_json

from vision_moe.files import write_text

PARTS = ("layers", "encoder", "levers", "language", "growth")


def arguments() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, prog="scripts/bench/run.sh")
    parser.add_argument("--rounds", type=int, default=5, help="of layers; towers and levers take at most 3")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder of table, JSON and plot")
    parser.add_argument("--tiny", action="store_true", help="small sizes: that everything runs, no figures")
    return parser.parse_args()


def main() -> None:
    """Prints the table and writes the files, anew after every part: a run that is cut short leaves what it has."""
    args = arguments()
    # One table on stdout, and no progress of loading in between.
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    start = time.process_time()
    peaks = {dtype: peak(dtype, args.rounds, 64 if args.tiny else 1536) for dtype in layers.DTYPES}
    gflops = {layers.DTYPES[dtype]: round(value / 1e9, 1) for dtype, value in peaks.items()}
    parts: dict[str, Callable[[], list[Row]]] = {
        "layers": lambda: layers.all_rows(args.rounds, peaks, tiny=args.tiny),
        "encoder": lambda: encoder.all_rows(args.rounds, peaks, tiny=args.tiny),
        "levers": lambda: levers.all_rows(args.rounds, peaks[torch.float32], tiny=args.tiny),
        "language": lambda: language.all_rows(args.rounds, tiny=args.tiny),
        "growth": lambda: growth.all_rows(min(args.rounds, 3), tiny=args.tiny),
    }
    found: dict[str, list[Row]] = {}
    for part in args.parts:
        found[part] = parts[part]()
        rows = [row for name, part_rows in found.items() if name != "growth" for row in part_rows]
        more = {"gemm_peak_gflops": gflops, "cpu_seconds": round(time.process_time() - start)}
        write_json(rows, args.output / "bench.json", **more, growth=found.get("growth", []))
        write_text(args.output / "table.md", table(rows))
    if "growth" in found:
        growth.plot(found["growth"], args.output / "growth.png")
    print(table(rows))
    print(f"{more}; written to {args.output}")


if __name__ == "__main__":
    main()
