"""Finds the sizes in `vision_moe.kernels.triton_configs` for the GPU at hand: each kernel alone, at each candidate.

.venv/bin/python scripts/bench/tune_gpu.py --output runs/bench/tune_gpu.json
"""

import argparse
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from layers import Case, make_inputs, make_variants
from measure import Row, table, write_json
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from triton.runtime.errors import OutOfResources

from vision_moe.kernels import ExpertWeights, triton
from vision_moe.kernels.problem import Needs, Problem, expert_order
from vision_moe.kernels.triton_configs import Config, Configs, configs_of

CASE = Case("L/14-336 B=32", 32 * 577, 1024, 4096, 4)
KERNELS = {
    "up": "up_kernel",
    "down": "down_kernel",
    "hidden": "hidden_gradient_kernel",
    "weight": "weight_gradient_kernel",
}
# By bytes per element: columns, depth, warps, stages; the tiles have 128 rows.
CANDIDATES = {
    2: [(256, 64, 8, 3), (256, 64, 8, 4), (128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 8, 3)],
    4: [(256, 32, 8, 3), (128, 32, 4, 3), (128, 32, 8, 3), (64, 32, 4, 3), (64, 32, 8, 3)],
}


def make_pass(dtype: torch.dtype) -> Callable[[Configs], object]:
    """The forward and the backward pass of one layer."""
    torch.backends.cuda.matmul.allow_tf32 = True
    inputs, experts = make_inputs(CASE, dtype), make_variants(CASE, dtype)["vision_moe"].cuda()
    x_TD, experts_TK, gates_TK, upstream_TD = (tensor.cuda() for tensor in inputs)
    weights = ExpertWeights(experts.up_proj, experts.up_proj_bias, experts.down_proj, experts.down_proj_bias)
    order = expert_order(experts_TK, CASE.E)
    problem = Problem(x_TD, gates_TK.float(), ExpertWeights(*(w.detach() for w in weights)), *order, "quick_gelu")

    def run(configs: Configs) -> object:
        _, h_NH = triton.forward(problem, save=True, configs=configs)
        return triton.backward(problem, h_NH, upstream_TD, Needs(*[True] * 6), configs)

    return run


def microseconds(run: Callable[[Configs], object], configs: Configs, rounds: int) -> dict[str, float]:
    """GPU time of each kernel by name, a mean over the launches."""
    run(configs)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(rounds):
            run(configs)
        torch.cuda.synchronize()
    return {event.key: event.device_time_total / rounds for event in recorded.key_averages()}


def candidates(dtype: torch.dtype) -> list[tuple[str, Config]]:
    """Each kernel with each of its candidates."""
    return [(kernel, Config(128, *sizes)) for kernel in KERNELS for sizes in CANDIDATES[dtype.itemsize]]


def _compile(dtype: torch.dtype, field: str, config: Config) -> None:
    """Fills Triton's cache on disk, in a process of its own."""
    try:
        make_pass(dtype)(_configs(dtype)._replace(**{field: config}))
        torch.cuda.synchronize()
    except OutOfResources:
        pass


def _configs(dtype: torch.dtype) -> Configs:
    major, minor = torch.cuda.get_device_capability()
    return configs_of(dtype, 10 * major + minor)


def measure(dtype: torch.dtype, rounds: int) -> list[Row]:
    """Each kernel at each candidate that fits the GPU, the fastest first."""
    run = make_pass(dtype)
    rows: list[Row] = []
    for field, config in tqdm(candidates(dtype), desc=f"measure {dtype}"):
        try:
            spent = microseconds(run, _configs(dtype)._replace(**{field: config}), rounds)[KERNELS[field]]
        except OutOfResources:
            continue
        # Down runs twice, the second time for the input's gradient, and so does the weights' gradient.
        flop = CASE.flop / 2 * (2 if field in ("down", "weight") else 1)
        row = {"dtype": str(dtype), "kernel": field, "config": str(tuple(config)), "us": spent}
        rows.append({**row, "tflops": flop / spent / 1e6})
    return sorted(rows, key=lambda row: row["us"])


def main() -> None:
    """Prints the best candidates of each kernel, and writes all as JSON, one dtype after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--best", type=int, default=4, help="candidates of each kernel to print")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/tune_gpu.json"))
    args = parser.parse_args()
    dtypes = (torch.bfloat16, torch.float32)
    jobs = [(dtype, *candidate) for dtype in dtypes for candidate in candidates(dtype)]
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1)) as pool:
        list(tqdm(pool.map(_compile, *zip(*jobs, strict=True)), total=len(jobs), desc="compile"))
    print(torch.cuda.get_device_name(), torch.__version__, CASE.name)
    rows: list[Row] = []
    for dtype in dtypes:
        found = measure(dtype, args.rounds)
        rows += found
        best = [row for field in KERNELS for row in [row for row in found if row["kernel"] == field][: args.best]]
        print(table(best, ("dtype", "kernel", "config", "us", "tflops")), flush=True)
        write_json(rows, args.output, device=torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
