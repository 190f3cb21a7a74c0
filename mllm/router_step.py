"""Router losses of a whole optimizer step of an unfrozen CLIP-MoE tower.

They are functions of means over the tokens of all pictures of the step, on all ranks and in all micro batches. Those
are counted before the step by one more forward of the tower without a graph, so that neither the number of ranks nor
that of micro batches, nor which of them hold text alone, changes the losses or their gradients.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vision_moe.moe.token_mean import ChunkMeans
from vision_moe.replay import Replay


@dataclass(frozen=True)
class RouterStep:
    """What a micro batch's forward takes of its step.

    Attributes:
        means: of the step.
        replay: the random numbers that this micro batch was counted with.
        is_empty: it has no picture, and was not counted.
    """

    means: ChunkMeans
    replay: Replay
    is_empty: bool

    @contextmanager
    def tower_forward(self) -> Iterator[None]:
        """Around the tower's forward, which takes `means` as `router_means`."""
        self.means.next_chunk(is_empty=self.is_empty)
        with self.replay.again():
            yield


def router_steps(tower: PreTrainedModel, pictures: Sequence[Tensor | None], blank: Tensor) -> list[RouterStep]:
    """Counts the means of a step; every rank must come here, with as many micro batches.

    Args:
        tower: in training.
        pictures: float[N, 3, H, W] of each micro batch of this rank; None = text alone.
        blank: float[1, 3, H, W], run where there is no picture, and not counted.
    """
    means, steps = ChunkMeans(), []
    with torch.no_grad():
        for pixel_values in pictures:
            # Also without pictures: under ZeRO-3 the ranks gather the tower's weights together.
            steps.append(RouterStep(means, Replay(blank.device), is_empty=pixel_values is None))
            means.next_chunk(is_empty=pixel_values is None)
            tower(blank if pixel_values is None else pixel_values.to(blank), router_means=means)
    means.counted()
    return steps
