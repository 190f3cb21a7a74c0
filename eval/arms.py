"""The arms of an experiment: one recipe, run with the flags, the learning rate and the seed of each arm.

A run is `python -m vision_moe.train` in a folder of its own, so that an interrupted experiment goes on.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ArmConfig:
    """One way to train on the same pairs."""

    flags: list[str]
    """Flags of vision_moe.train that make this arm, such as --methods [direct]."""
    result: str
    """Stage whose model the arm ends with, such as direct, sparse_upcycling or dmu."""
    learning_rate: str
    """Field that the sweep sets, such as direct.learning_rate."""
    learning_rates: list[float]
    """Values to try on the first seed; the best one is run on the others."""
    experts: list[str] = field(default_factory=list)
    """Stages whose models are this arm's experts, besides the start; they are measured together as well."""

    def __post_init__(self) -> None:
        if not self.learning_rates:
            raise ValueError(f"the arm {self.result!r} has no learning_rates; name at least one")


@dataclass(frozen=True)
class ArmRun:
    """One training run of an arm."""

    name: str
    arm: ArmConfig
    learning_rate: float
    seed: int

    def folder(self, output: Path) -> Path:
        """Where the run lies."""
        return output / "runs" / f"{self.name}-lr{self.learning_rate:g}-seed{self.seed}"

    def model(self, output: Path) -> Path:
        """Its result."""
        return self.folder(output) / self.arm.result / "model"

    def members(self, output: Path) -> list[Path]:
        """The start and the experts; empty for an arm without experts."""
        stages = ["start", *self.arm.experts] if self.arm.experts else []
        return [self.folder(output) / stage / "model" for stage in stages]


def train(
    run: ArmRun, recipe: Path, flags: list[str], data: Path, output: Path, num_processes: int, gpus: Sequence[str]
) -> None:
    """Runs an arm to its end; one that has ended is left alone.

    Args:
        run: the run.
        recipe: of vision_moe.train.
        flags: further flags, of every arm.
        data: as --data.train.
        output: folder of the experiment.
        num_processes: of the training.
        gpus: as `run_trainer`.

    Raises:
        RuntimeError: as `run_trainer`.
    """
    folder = run.folder(output)
    if (folder / run.arm.result / "stage.json").is_file():
        return
    asked = [*flags, *run.arm.flags, "--data.train", str(data), "--output", str(folder), "--seed", str(run.seed)]
    # What is measured is the experiment's matter.
    asked += [f"--{run.arm.learning_rate}", str(run.learning_rate), "--report", "false"]
    run_trainer("vision_moe.train", [str(recipe), *asked], folder, num_processes, gpus)


def run_trainer(module: str, arguments: list[str], folder: Path, num_processes: int, gpus: Sequence[str]) -> None:
    """Runs `python -m module arguments`, by torchrun if there is more than one process.

    Args:
        module: to run.
        arguments: its.
        folder: of the run.
        num_processes: that train.
        gpus: the GPUs that they see, as in CUDA_VISIBLE_DEVICES; none on a machine without GPUs.

    Raises:
        RuntimeError: the training failed; its output stands in `train.log` of `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    command = [sys.executable, *(launcher if num_processes > 1 else []), "-m", module, *arguments]
    logger.info("%s", " ".join(command))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    with (folder / "train.log").open("a", encoding="utf-8") as log:
        ended = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
    if ended.returncode:
        raise RuntimeError(f"the run {folder} ended with status {ended.returncode}; see {folder / 'train.log'}")
