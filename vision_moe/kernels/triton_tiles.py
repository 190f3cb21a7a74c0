"""Which rows each program of a Triton kernel works on."""

import torch
import triton
from torch import Tensor

from vision_moe.kernels.problem import Problem
from vision_moe.kernels.triton_parts import tile_kernel

# Tiles that one program of the kernel finds.
_BLOCK = 128


class Tiles:
    """Tiles of rows, one expert each; the number of tiles is an upper bound, so that nothing waits for the counts."""

    def __init__(self, problem: Problem, rows: int) -> None:
        counts_E = problem.tokens_per_expert_E
        E, N = len(counts_E), len(problem.order_N)
        # The last group is that of the slots that are not computed.
        self.count = triton.cdiv(N, rows) + E + 1
        self.start, self.end = counts_E.new_empty(2, self.count)
        self.expert = counts_E.new_empty(self.count, dtype=torch.int32)
        tile_kernel[triton.cdiv(self.count, _BLOCK),](
            counts_E, self.expert, self.start, self.end, E, N, self.count,
            ROWS=rows, BLOCK_G=triton.next_power_of_2(E + 1), BLOCK_T=_BLOCK,
        )  # fmt: skip

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the kernels take: tile_expert, tile_start, tile_end."""
        return self.expert, self.start, self.end
