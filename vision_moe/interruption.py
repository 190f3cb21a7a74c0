"""Ctrl-C: a training ends after the running step with a checkpoint, and says how it goes on."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vision_moe.distributed import sum_over_ranks

logger = logging.getLogger(__name__)

# What shells expect of a command that Ctrl-C ended.
_STATUS = 128 + signal.SIGINT


@contextmanager
def says_how_to_go_on(output: Path) -> Iterator[None]:
    """Ends a command that Ctrl-C stops between or within its parts with a word instead of a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        _tell(output, "what is finished, and the last checkpoint, are kept")
        raise SystemExit(_STATUS) from None


@contextmanager
def stops_after_a_step(trainer: Trainer, output: Path) -> Iterator[None]:
    """Lets Ctrl-C end `trainer.train()` in the block after its step, with a checkpoint; a second one ends it at once.

    All ranks stop at the same step, whichever of them heard the signal.

    Raises:
        SystemExit: the training was stopped before its end.
    """
    watch = _Watch()
    trainer.add_callback(watch)
    before = signal.signal(signal.SIGINT, watch.hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if watch.stopped_at is not None and watch.stopped_at < trainer.state.max_steps:
        _tell(output, f"a checkpoint holds step {watch.stopped_at} of {trainer.state.max_steps}")
        raise SystemExit(_STATUS)


class _Watch(TrainerCallback):
    def __init__(self) -> None:
        self.heard = False
        self.stopped_at: int | None = None

    def hear(self, number: int, frame: FrameType | None) -> None:
        if self.heard:
            raise KeyboardInterrupt
        self.heard = True
        logger.warning("stopping after this step; Ctrl-C again stops at once, back to the last checkpoint")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if sum_over_ranks(torch.tensor(float(self.heard), device=args.device)) > 0:
            control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step


def _tell(output: Path, kept: str) -> None:
    logger.warning("stopped: %s in %s; the same command, started again, goes on from there", kept, output)
