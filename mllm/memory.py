"""Memory that weights, gradients and optimizer take in each process (ZeRO: Rajbhandari et al. 2020, section 5)."""

from dataclasses import dataclass, fields

from torch import nn

from mllm.parts import num_elements

# AdamW's two moments in float32, and DeepSpeed's float32 masters of what trains.
_MOMENTS, _MASTER = 8, 4
_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes; activations, buffers of communication and fragmentation come on top."""

    weights: int
    """Of each process."""
    gradients: int
    """Of each process."""
    optimizer: int
    """Of each process; in the host's memory where DeepSpeed's JSON offloads it."""
    checkpoint: int
    """On disk, all processes together."""

    def __str__(self) -> str:
        parts = [f"{field.name} {getattr(self, field.name) / _GIB:.2f} GiB" for field in fields(self)]
        return ", ".join(parts)


def estimate_memory(model: nn.Module, zero_stage: int | None, world_size: int) -> MemoryEstimate:
    """What training `model` by AdamW takes, at most.

    Args:
        model: with its parameters in their dtypes; those that do not require a gradient have no gradient and no
            optimizer state.
        zero_stage: DeepSpeed's, 0 to 3; None without DeepSpeed.
        world_size: processes that ZeRO splits over.
    """
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    weights = sum(num_elements(parameter) * parameter.element_size() for parameter in parameters)
    gradients = sum(num_elements(parameter) * parameter.element_size() for parameter in trained)
    per_weight = _MOMENTS if zero_stage is None else _MOMENTS + _MASTER
    optimizer = per_weight * sum(num_elements(parameter) for parameter in trained)
    # DeepSpeed's checkpoints hold all weights, ours what trains.
    checkpoint = optimizer + (gradients if zero_stage is None else weights)
    stage = zero_stage or 0
    return MemoryEstimate(
        weights=weights // world_size if stage >= 3 else weights,
        gradients=gradients // world_size if stage >= 2 else gradients,
        optimizer=optimizer // world_size if stage >= 1 else optimizer,
        checkpoint=checkpoint,
    )
