"""Random numbers drawn twice: a forward that is run again makes the same draws."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Replay:
    """The state of the random numbers now, to draw the same again.

    Args:
        device: whose numbers are drawn, beside the CPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        self.cpu_state = torch.get_rng_state()
        self.cuda_states = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draws what was drawn from that state on; afterwards the random numbers go on as if nothing had been drawn."""
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.cpu_state)
            for device, state in zip(self.devices, self.cuda_states, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
