"""The fields of one training stage in an encoder recipe."""

from dataclasses import dataclass
from typing import Literal

Tracker = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One optimisation: what CLIP-MoE's training scripts set, one field each."""

    samples: int | None = None
    """Image-caption pairs seen; None: `epochs` times the training set, or, for a baseline, what DMU sees in all."""
    epochs: float = 1.0
    """Passes over the training set when samples is None."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    weight_decay: float = 0.2
    """Decoupled weight decay."""
    warmup_steps: float = 200
    """Linear warm-up: steps, or a share of all steps when below 1."""
    schedule: str = "cosine"
    """A transformers scheduler name; cosine decays to 0."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """"muon" orthogonalises the steps of linear weights and leaves the rest to AdamW (vision_moe.muon)."""
    adam_beta2: float = 0.999
    """AdamW: the second moment's decay."""
    max_grad_norm: float = 0.0
    """Gradient clipping by global norm; 0 is off."""
    label_smoothing: float = 0.0
    """Smoothing of both cross-entropies; the official code uses 0.1, the paper names none."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights, which the finished model then has; None is off."""
    patch_dropout: float = 0.0
    """Share of each picture's patches that training leaves out (FLIP, arXiv:2212.00794)."""
    grad_cache_batch_size: int | None = None
    """Pairs of a forward in one process, where memory does not hold its share of the global batch: the gradient cache
    (arXiv:2101.06983) embeds everything twice, for the same gradients. None is off."""

    loss_tile: int | None = None
    """Rows of the contrastive loss's logits held at a time: the same loss and gradients, to rounding, without the
    matrix of this process's pairs times all pairs. None holds it."""

    def __post_init__(self) -> None:
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), or null for no average, but got {self.ema_decay}")
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(f"patch_dropout must be in [0, 1), but got {self.patch_dropout}")
        for name in ("grad_cache_batch_size", "loss_tile"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, or null to do without, but got {value}")
