"""What a training shows on the console: the Trainer's own output without the numbers of single blocks."""

from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


def headline(logs: dict[str, Any] | None) -> dict[str, Any]:
    """The entries of a log whose name has no "/"; `metrics.jsonl` has them all."""
    return {name: value for name, value in (logs or {}).items() if "/" not in name}


class _Headline(TrainerCallback):
    """Base beside a callback of transformers, before it."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().on_log(args, state, control, logs=headline(logs), **kwargs)


class HeadlineProgress(_Headline, ProgressCallback):
    """A progress bar, and the headline of each log."""


class HeadlinePrinter(_Headline, PrinterCallback):
    """The headline of each log, where stderr is no terminal."""
