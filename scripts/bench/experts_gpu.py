"""Expert layers on one GPU: the Triton and grouped_mm backends and transformers' grouped_mm against a per-expert loop.

.venv/bin/python scripts/bench/experts_gpu.py --rounds 20 --output runs/bench/experts_gpu.json
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from layers import CASES, Case, Inputs, make_inputs, make_variants, runner
from measure import Row, rows_of, table, write_json
from torch import Tensor, nn

from vision_moe.kernels import ExpertWeights, routed_mlp
from vision_moe.moe.experts import Experts

LARGE = (Case("L/14-336 B=32", 32 * 577, 1024, 4096, 4), Case("B/16 B=128 E=8", 128 * 197, 768, 3072, 8))


class OnBackend(nn.Module):
    """Our experts on one backend."""

    def __init__(self, experts: Experts, backend: str) -> None:
        super().__init__()
        self.experts = experts
        self.backend = backend

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As `Experts.forward`."""
        experts = self.experts
        weights = ExpertWeights(experts.up_proj, experts.up_proj_bias, experts.down_proj, experts.down_proj_bias)
        return routed_mlp(hidden_states, top_k_index, top_k_weights, weights, "quick_gelu", self.backend)


def milliseconds(run: Callable[[], object]) -> float:
    """GPU time between two events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def main() -> None:
    """Prints a table of ratios for each case and writes all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--output", type=Path, default=Path("runs/bench/experts_gpu.json"))
    args = parser.parse_args()
    rows: list[Row] = []
    print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), torch.__version__)
    for case in (*CASES, *LARGE):
        known = len(rows)
        for dtype in (getattr(torch, name) for name in args.dtypes):
            inputs = Inputs(*(tensor.cuda() for tensor in make_inputs(case, dtype)))
            variants = make_variants(case, dtype)
            ours = variants.pop("vision_moe")
            variants |= {f"vision_moe {backend}": OnBackend(ours, backend) for backend in ("triton", "grouped", "auto")}
            for kind in ("forward", "training", "router"):
                runners = {name: runner(module.cuda(), inputs, kind) for name, module in variants.items()}
                for run in runners.values():
                    # Compiles, and warms up.
                    milliseconds(run)
                turns = [{name: milliseconds(run) for name, run in runners.items()} for _ in range(args.rounds)]
                seconds = {name: [turn[name] / 1000 for turn in turns] for name in runners}
                flop = case.flop * {"forward": 1, "training": 3, "router": 2}[kind]
                for row in rows_of(seconds, "loop", case=case.name, dtype=str(dtype), **{"pass": kind}):
                    rows.append({**row, "tflops": flop / float(row["seconds"]) / 1e12})
        columns = ("case", "dtype", "pass", "variant", "ratio", "least", "greatest", "seconds", "tflops")
        print(table(rows[known:], columns), flush=True)
        write_json(rows, args.output, device=torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
