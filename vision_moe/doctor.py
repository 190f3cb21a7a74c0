"""What this machine has, what will be used of it, and what is missing: `python -m vision_moe.doctor`.

Ends with status 1 where a package that the encoder always needs is missing or of another version.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from vision_moe.command_help import CommandParser
from vision_moe.extras import extras, problem, requirements, version_of
from vision_moe.kernels import ExpertWeights, pick_backend
from vision_moe.tracking import environment
from vision_moe.version import __version__

_GIB = 1 << 30
_SHOWN = ("torch", "transformers", "accelerate", "deepspeed", "peft", "lmms-eval", "bitsandbytes", "gradio", "triton")
# What an extra is for; those of development are not asked about.
_USES = {
    "mllm": "LLaVA: training, chat",
    "eval": "lmms-eval, encoder benchmarks",
    "quant": "QLoRA, weights in 4 and 8 bits",
    "demo": "the chat in the browser",
    "data": "Hugging Face data sets, shards by URL",
    "open_clip": "checkpoints and class names of open_clip",
    "onnx": "reading ONNX files",
}


def main(args: Sequence[str] | None = None) -> int:
    """Prints the report; returns the status."""
    CommandParser(__doc__, ".venv/bin/python -m vision_moe.doctor").parse_args(args)
    broken = [found for needed in requirements() if (found := problem(needed))]
    sections = {
        f"vision-moe {__version__}": _versions(),
        "hardware": _hardware(),
        "will be used": _used(),
        "missing": [*(f"! {found}: bash scripts/setup.sh" for found in broken), *_missing()] or ["nothing"],
    }
    for title, lines in sections.items():
        sys.stdout.write(f"{title}\n" + "".join(f"  {line}\n" for line in lines) + "\n")
    return 1 if broken else 0


def _versions() -> list[str]:
    machine = environment()
    found = {package: version_of(package) for package in _SHOWN}
    return [
        f"python {machine['python']}, commit {machine['commit'] or 'unknown'}",
        ", ".join(f"{package} {version}" for package, version in found.items() if version),
    ]


def _hardware() -> list[str]:
    machine = environment()
    disk = shutil.disk_usage(Path.cwd())
    lines = [
        f"processor  {machine['processor']}; {len(os.sched_getaffinity(0))} cores for this process, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        f"memory     {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / _GIB:.1f} GiB",
        f"disk       {disk.free / _GIB:.0f} GiB free in {Path.cwd()}",
    ]
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        lines.append(f"GPU {number}      {gpu.name}, {gpu.total_memory / _GIB:.0f} GiB, sm{gpu.major}{gpu.minor}")
    return lines if torch.cuda.is_available() else [*lines, "GPU        none that torch can use"]


def _used() -> list[str]:
    gpus = torch.cuda.device_count()
    device = "cuda" if gpus else "cpu"
    experts = ", ".join(f"{dtype} {_backend(device, dtype)}" for dtype in (torch.float32, torch.bfloat16))
    default = f"{gpus}, one a GPU" if gpus else "1; the quick start takes 2 where there are two cores"
    attention = "sdpa" if gpus else "sdpa, or eager where a recipe says so: faster here for short sequences"
    compilers = [tool for tool in ("gcc", "g++") if shutil.which(tool) is None]
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    return [
        f"device     {device}",
        f"processes  {default}; NPROC=n chooses",
        f"experts    {experts}".replace("torch.", ""),
        f"attention  {attention}",
        f"DeepSpeed  {'lacks ' + ' and '.join(compilers) if compilers else 'can compile what it needs'}",
        f"model hub  {'not asked: HF_HUB_OFFLINE is set' if offline else 'asked for names that are no folder'}",
    ]


def _backend(device: str, dtype: torch.dtype) -> str:
    """The experts' kernel for a layer of CLIP's width with some hundred tokens an expert."""
    x_TD = torch.empty(1, 768, device=device, dtype=dtype)
    up_EFD, down_EDF = (x_TD.new_empty(4, *size) for size in ((3072, 768), (768, 3072)))
    weights = ExpertWeights(up_EFD, x_TD.new_empty(4, 3072), down_EDF, x_TD.new_empty(4, 768))
    return pick_backend(x_TD, weights, "quick_gelu")


def _missing() -> list[str]:
    lines = []
    for extra in (name for name in extras() if name.replace("-", "_") in _USES):
        found = [text for needed in requirements(extra) if (text := problem(needed))]
        if found:
            use = _USES[extra.replace("-", "_")]
            lines.append(f'{extra} ({use}): {"; ".join(found)}: pip install "vision-moe[{extra}]"')
    return lines


if __name__ == "__main__":
    sys.exit(main())
