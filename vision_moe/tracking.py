"""Logging of an entry point, and the environment that every training run notes in its folder."""

import importlib.metadata
import logging
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from vision_moe.files import write_json

_OURS = ("vision_moe", "mllm", "eval", "demo", "__main__")
_PACKAGES = ("vision-moe", "torch", "transformers", "accelerate", "deepspeed", "peft", "lmms-eval", "numpy")


def setup_logging(level: int = logging.INFO) -> None:
    """Configures logging of an entry point: INFO on rank 0, warnings on the other ranks, of libraries each once."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(
        level=level if rank == 0 else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    logging.captureWarnings(True)
    # Messages of transformers go the way of all others; its bars over files mean nothing in a log.
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    for handler in logging.getLogger().handlers:
        handler.addFilter(_OncePerMessage())
    for noisy in ("httpx", "matplotlib", "PIL", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _OncePerMessage(logging.Filter):
    """Shows what a library says once, however often it says it; what we say is shown every time."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[tuple[str, object]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.split(".")[0] in _OURS:
            return True
        key = (record.name, record.msg if record.args else record.getMessage())
        seen = key in self._seen
        self._seen.add(key)
        return not seen


def environment() -> dict[str, Any]:
    """Commit, package versions and hardware of this process."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": versions,
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "gpus": gpus,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "torch_threads": torch.get_num_threads(),
    }


def write_environment(folder: Path) -> None:
    """Writes `environment.json` into the run's folder (rank 0 only)."""
    if int(os.environ.get("RANK", "0")) == 0:
        write_json(folder / "environment.json", environment())


def _commit() -> str | None:
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
