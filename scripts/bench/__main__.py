"""The CPU benchmark, `bash scripts/bench/run.sh`: one table of ratios, one thread, CPU time; JSON and a plot too."""

import argparse
import logging
import time
from pathlib import Path

import encoder
import growth
import language
import layers
import levers
import torch
from measure import Row, peak, print_table, write_json

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
    """Prints the table and writes the files."""
    args = arguments()
    # One table on stdout, and no progress of loading in between.
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    start = time.process_time()
    peaks = {dtype: peak(dtype, args.rounds, 64 if args.tiny else 1536) for dtype in layers.DTYPES}
    rows: list[Row] = []
    if "layers" in args.parts:
        rows += layers.all_rows(args.rounds, peaks, tiny=args.tiny)
    if "encoder" in args.parts:
        rows += encoder.all_rows(args.rounds, peaks, tiny=args.tiny)
    if "levers" in args.parts:
        rows += levers.all_rows(args.rounds, peaks[torch.float32], tiny=args.tiny)
    if "language" in args.parts:
        rows += language.all_rows(args.rounds, tiny=args.tiny)
    print_table(rows, file=args.output / "table.md")
    curves = growth.all_rows(min(args.rounds, 3), tiny=args.tiny) if "growth" in args.parts else []
    if curves:
        growth.plot(curves, args.output / "growth.png")
    gflops = {layers.DTYPES[dtype]: round(value / 1e9, 1) for dtype, value in peaks.items()}
    seconds = round(time.process_time() - start)
    write_json(rows, args.output / "bench.json", gemm_peak_gflops=gflops, cpu_seconds=seconds, growth=curves)


if __name__ == "__main__":
    main()
