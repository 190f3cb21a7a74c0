"""Experiment trackers beside metrics.jsonl: transformers' callbacks for them, one run for each stage."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
)

from vision_moe.stage_recipe import Tracker

_IS_AVAILABLE = {
    "tensorboard": is_tensorboard_available,
    "wandb": is_wandb_available,
    "trackio": is_trackio_available,
}


class _StageWandb(WandbCallback):
    """Ends its run with the stage; transformers' own would log the next stage into it."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_end(args, state, control, **kwargs)
        self._wandb.finish()


def check_trackers(report_to: Sequence[Tracker]) -> None:
    """Raises ModuleNotFoundError where a tracker's package is not installed."""
    missing = [name for name in report_to if not _IS_AVAILABLE[name]()]
    if missing:
        raise ModuleNotFoundError(
            f"report_to names {', '.join(missing)}, not installed here: pip install {' '.join(missing)}, "
            "or leave it out"
        )


def tracker_callbacks(report_to: Sequence[Tracker], stage_folder: Path) -> list[TrainerCallback]:
    """The callbacks of one stage; runs have the name that TrainingArguments give.

    TensorBoard's files lie in the run's folder `tensorboard/STAGE`: transformers would put them below the checkpoints,
    which go when the stage is finished.
    """
    callbacks: list[TrainerCallback] = []
    for name in report_to:
        if name == "tensorboard":
            tensorboard = TensorBoardCallback()
            tensorboard.logging_dir = str(stage_folder.parent / "tensorboard" / stage_folder.name)
            callbacks.append(tensorboard)
        else:
            callbacks.append(_StageWandb() if name == "wandb" else TrackioCallback())
    return callbacks


def run_name(stage_folder: Path) -> str:
    """Name of a stage's run: RUN/STAGE."""
    return f"{stage_folder.parent.name}/{stage_folder.name}"
