"""Ends a process in which no training step ends, and leaves the stacks of its threads.

A rank that waits for another one waits for ever: the wrong collective, a dead file system, a loader process that was
killed. faulthandler's timer runs beside the interpreter, so it also strikes where Python itself is stuck.
"""

import faulthandler
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vision_moe.distributed import rank

logger = logging.getLogger(__name__)


class HangWatchdog(TrainerCallback):
    """A timer that every step and every checkpoint sets back.

    Args:
        folder: gets hang_rank<N>.txt if the timer runs out.
        timeout: seconds; 0 is no timer.
    """

    def __init__(self, folder: Path, timeout: int) -> None:
        self.path = folder / f"hang_rank{rank()}.txt"
        self.timeout = timeout
        self._file: TextIO | None = None

    @contextmanager
    def watching(self, trainer: Trainer) -> Iterator[None]:
        """The timer runs within this block, from its beginning on; the process exits with status 1 if it runs out."""
        if not self.timeout:
            yield
            return
        trainer.add_callback(self)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as self._file:
            self._set_back()
            try:
                yield
            finally:
                faulthandler.cancel_dump_traceback_later()
                # What an earlier hang left stays.
                if not self.path.stat().st_size:
                    self.path.unlink()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._set_back()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._set_back()

    def _set_back(self) -> None:
        assert self._file is not None
        faulthandler.dump_traceback_later(self.timeout, exit=True, file=self._file)
