"""Writes `metrics.jsonl` (`vision_moe.metrics`) while a run trains."""

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vision_moe.files import write_text


class MetricsCallback(TrainerCallback):
    """Appends every log of the Trainer to `metrics.jsonl`; a resumed run first drops what it will log again."""

    def __init__(self, folder: Path, stage: str) -> None:
        self.path = folder / "metrics.jsonl"
        self.stage = stage

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not self.path.exists():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if self._stays(line, state)]
        write_text(self.path, "".join(line + "\n" for line in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        entry = {"stage": self.stage, "step": state.global_step, "time": round(time.time(), 3), **logs}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _stays(self, line: str, state: TrainerState) -> bool:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            # A killed process may have left half a line at the end; its step is logged again.
            return False
        return entry["stage"] != self.stage or entry["step"] <= state.global_step
