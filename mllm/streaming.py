"""Generation in a thread of its own, which can be stopped and whose errors reach the reader."""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, TextIteratorStreamer


class StopOnEvent(StoppingCriteria):
    """Ends a generation as soon as one of the events is set."""

    def __init__(self, events: Sequence[threading.Event]) -> None:
        self.events = events

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        stopped = any(event.is_set() for event in self.events)
        return torch.full((input_ids.shape[0],), stopped, device=input_ids.device)


class Generation(threading.Thread):
    """Runs `model.generate` beside the reader of its streamer.

    Args:
        model: the model.
        streamer: receives the tokens; it ends when the generation does, in an error too.
        arguments: of `model.generate`.

    Attributes:
        error: what ended the generation, if it did not end by itself.
    """

    def __init__(self, model: PreTrainedModel, streamer: TextIteratorStreamer, arguments: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.model = model
        self.streamer = streamer
        self.arguments = arguments
        self.error: Exception | None = None

    def run(self) -> None:
        """What the thread does."""
        try:
            self.model.generate(**self.arguments, streamer=self.streamer)
        except Exception as error:  # handed to the reading thread, which raises it
            self.error = error
            self.streamer.end()
