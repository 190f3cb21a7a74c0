"""Sizes of the Triton launches, by architecture and bytes per element. `scripts/bench/tune_gpu.py` finds them."""

from typing import NamedTuple

import torch


class Config(NamedTuple):
    """Sizes of a launch.

    Attributes:
        m: rows of the output tile.
        n: its columns.
        k: depth of a step.
        warps: per program.
        stages: of the software pipeline.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int


class Configs(NamedTuple):
    """One for each of the kernels, of a plain and of a gated MLP; all but the last have one `m`."""

    up: Config
    up_gated: Config
    hidden: Config
    hidden_gated: Config
    down: Config
    weight: Config


_WIDE, _NARROW = Config(128, 128, 64, 8, 3), Config(128, 64, 64, 8, 3)
_WIDE_FP32, _NARROW_FP32 = Config(128, 128, 32, 8, 3), Config(128, 64, 32, 8, 3)
# By compute capability (None: every other) and bytes per element. Tests compile every entry for every architecture in
# ARCHITECTURES: none spills a register, and each fits the shared memory.
_TABLE: dict[tuple[int | None, int], Configs] = {
    # Measured on an H100 at the sizes of ViT-L/14 (docs/performance.md); the other entry is not.
    (90, 2): Configs(_WIDE, _NARROW, _NARROW, _NARROW, Config(128, 256, 64, 8, 4), _WIDE),
    (None, 2): Configs(_WIDE, _NARROW, _NARROW, _NARROW, _WIDE, _WIDE),
    (None, 4): Configs(_WIDE_FP32, _NARROW_FP32, _NARROW_FP32, _NARROW_FP32, _WIDE_FP32, _WIDE_FP32),
}
# Compute capabilities that the tests compile for.
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
_INTERPRETED = Configs(*[Config(32, 32, 32, 4, 1)] * len(Configs._fields))


def configs_of(dtype: torch.dtype, capability: int | None) -> Configs:
    """The launches' sizes.

    Args:
        dtype: of the operands.
        capability: ten times the major plus the minor compute capability; None for the interpreter.
    """
    if capability is None:
        return _INTERPRETED
    return _TABLE.get((capability, dtype.itemsize), _TABLE[None, dtype.itemsize])
