"""What the CLIP-MoE models return."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput


@dataclass
class CLIPMoETowerOutput(BaseModelOutputWithPooling):
    """Output of one tower.

    Attributes:
        router_logits: one float32[B, S, E] per MoE block, noise-free, zero at padding; with output_router_logits.
        aux_loss: float32 scalar, coefficients applied, mean over the tower's MoE blocks; in training or with
            output_router_logits.
        tokens_per_expert: int64[L, E], choices of valid tokens per MoE block and expert, before any is dropped; when
            `aux_loss` is, and not for a dense tower.
        dropped_fraction: float32[L], share of the valid tokens' choices that no expert computed for want of capacity
            (of the tokens, with expert choice); as `tokens_per_expert`.
    """

    router_logits: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None
    tokens_per_expert: Tensor | None = None
    dropped_fraction: Tensor | None = None


@dataclass
class LIMoEModalityOutput(CLIPMoETowerOutput):
    """What the one tower of a LIMoE gives for one modality; all counts are of that modality's tokens alone.

    Attributes:
        aux_loss: the modality's own router losses; those over both modalities are in `CLIPMoEOutput.aux_loss` only.
        mean_gates: float32[L, E], mean gate of the valid tokens per MoE block; as `tokens_per_expert`.
        gate_entropy: float32[L], mean entropy (nats) of the valid tokens' gates; as `tokens_per_expert`.
    """

    mean_gates: Tensor | None = None
    gate_entropy: Tensor | None = None


@dataclass
class CLIPMoEOutput(CLIPOutput):
    """Output of `CLIPMoEModel` and `LIMoEModel`; its towers' (modalities') outputs hold what is counted per MoE block.

    Beyond `transformers.models.clip.modeling_clip.CLIPOutput`:

    Attributes:
        loss: contrastive loss of this process's batch plus `aux_loss`, where that is computed; with return_loss.
        router_logits: the image tower's MoE blocks, then the text tower's (of a LIMoE those of the image tokens, then
            those of the text tokens); with output_router_logits.
        aux_loss: float32 scalar, coefficients applied, mean over the MoE blocks of both towers (CLIP-MoE, eq. 9); in
            training or with output_router_logits.
    """

    router_logits: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None
