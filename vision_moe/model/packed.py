"""The blocks of a LIMoE, over a packed row: the tokens of all pictures, then those of all captions.

B batch, S sequence, T tokens of all rows of all modalities, D model dim, X any dim, M modalities.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vision_moe.model.encoder import CLIPMoEEncoder, CLIPMoEEncoderLayer, EncoderOutput, LayerOutput

# (B, S) of each modality, in the order of their tokens.
Shapes = tuple[tuple[int, int], ...]


def pack(rows_BSX: Sequence[Tensor]) -> Tensor:
    """[B, S, X] of each modality -> [1, T, X]."""
    return torch.cat([x_BSX.flatten(0, 1) for x_BSX in rows_BSX])[None]


def unpack(packed_1TX: Tensor, shapes: Shapes) -> list[Tensor]:
    """[1, T, X] -> [B, S, X] of each modality."""
    parts = packed_1TX[0].split([num_rows * length for num_rows, length in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def pack_masks(masks_BS: Sequence[Tensor | None], shapes: Shapes) -> Tensor | None:
    """bool[B, S] of each modality, None = no padding, -> bool[1, T]; None if no modality has padding."""
    devices = [mask_BS.device for mask_BS in masks_BS if mask_BS is not None]
    if not devices:
        return None
    full = [
        torch.ones(shape, dtype=torch.bool, device=devices[0]) if mask_BS is None else mask_BS
        for mask_BS, shape in zip(masks_BS, shapes, strict=True)
    ]
    return torch.cat([mask_BS.flatten() for mask_BS in full])[None]


def unpack_encoded(encoded: EncoderOutput, shapes: Shapes) -> list[EncoderOutput]:
    """What the blocks returned, modality by modality, each as if it had been alone."""
    hidden, tokens_LME, dropped_LM = encoded.last_hidden_state, encoded.tokens_per_expert, encoded.dropped_fraction
    return [
        EncoderOutput(
            unpack(hidden, shapes)[part],
            tuple(unpack(logits, shapes)[part] for logits in encoded.router_logits),
            tuple(unpack(logits, shapes)[part] for logits in encoded.noisy_logits),
            None if tokens_LME is None else tokens_LME[:, part],
            None if dropped_LM is None else dropped_LM[:, part],
        )
        for part in range(len(shapes))
    ]


class LIMoEEncoderLayer(CLIPMoEEncoderLayer):
    """A block over a packed row: attention row by row, the MLP or the mixture over all tokens at once."""

    def forward(  # type: ignore[override]  # a packed row needs its shapes
        self,
        hidden_states: Tensor,
        attention_masks: Sequence[Tensor | None],
        mask_1T: Tensor | None,
        *,
        shapes: Shapes,
        **kwargs: Any,
    ) -> LayerOutput:
        """One block; returns what `CLIPMoEEncoderLayer` does, the counts with an axis of modalities.

        Args:
            hidden_states: float[1, T, D].
            attention_masks: for each modality what the attention implementation takes.
            mask_1T: bool[1, T], False at padding; None = no padding.
            shapes: (B, S) of each modality.
            **kwargs: passed on to the attention.
        """
        attended = [
            self.self_attn(normed_BSD, attention_mask=mask, **kwargs)[0]
            for normed_BSD, mask in zip(unpack(self.layer_norm1(hidden_states), shapes), attention_masks, strict=True)
        ]
        parts = tuple(num_rows * length for num_rows, length in shapes)
        return self.feed_forward(hidden_states + pack(attended), mask_1T, parts)


class LIMoEEncoder(CLIPMoEEncoder):
    """The blocks of the tower."""

    layer_class = LIMoEEncoderLayer
