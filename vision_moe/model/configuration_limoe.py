"""Configuration of a LIMoE: one tower for images and text, the fields of its mixture, and losses for each modality."""

import dataclasses
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from vision_moe.model.configuration import MoEFields
from vision_moe.moe.losses import AuxLossWeights

# Our choice: the paper's coefficients are not known to us (docs/limoe.md).
_ENTROPY = {"global_entropy": 0.04}


@strict
class LIMoEConfig(MoEFields, PreTrainedConfig):
    """One tower, both embeddings and both heads; see also `MoEFields`, some of whose defaults differ here.

    The router losses of `MoEFields` are taken over all tokens of a batch, images and text alike.

    Attributes:
        hidden_size: width of the tower.
        intermediate_size: hidden size of its MLPs.
        num_hidden_layers: blocks.
        num_attention_heads: attention heads of a block.
        hidden_act: activation of the MLPs, by transformers' name.
        layer_norm_eps: of all layer norms.
        attention_dropout: dropout of the attention weights.
        image_size: pixels per side.
        patch_size: pixels per side of a patch.
        num_channels: of a picture.
        vocab_size: tokens of the tokenizer.
        max_position_embeddings: tokens of the longest caption.
        pad_token_id: of the tokenizer.
        bos_token_id: of the tokenizer.
        eos_token_id: of the tokenizer.
        projection_dim: width of the shared embedding space.
        logit_scale_init_value: log of the inverse temperature that training starts from.
        initializer_range: standard deviation of embeddings and routers at the start.
        initializer_factor: multiplies every initial standard deviation, as in CLIP.
        image_router_losses: coefficients of router losses over the image tokens alone, fields of
            `vision_moe.moe.losses.AuxLossWeights`; None = {"global_entropy": 0.04}, {} = none.
        text_router_losses: the same over the text tokens; None = {"global_entropy": 0.04, "local_entropy": 0.04}.
    """

    model_type = "limoe"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    attention_dropout: int | float = 0.0
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    projection_dim: int = 512
    logit_scale_init_value: int | float = 2.6592
    initializer_range: int | float = 0.02
    initializer_factor: int | float = 1.0
    num_experts_per_tok: int = 1
    norm_topk_prob: bool = False
    router_aux_loss_coef: int | float = 0.0
    image_router_losses: dict[str, Any] | None = None
    text_router_losses: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.image_router_losses is None:
            self.image_router_losses = dict(_ENTROPY)
        if self.text_router_losses is None:
            self.text_router_losses = {**_ENTROPY, "local_entropy": _ENTROPY["global_entropy"]}
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Called by `@strict` after construction."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, but got {self.hidden_size} with "
                f"{self.num_attention_heads} heads"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size, but got {self.image_size} with patches of "
                f"{self.patch_size}"
            )

    def validate_modalities(self) -> None:
        """Called by `@strict` after construction."""
        if self.capacity_group_size is not None:
            raise ValueError("capacity_group_size must be None: pictures and captions of a batch share the capacity")
        if self.router_bias_update_rate:
            raise ValueError("router_bias_update_rate must be None: the bias has no step per modality; use the losses")
        for name in ("image_router_losses", "text_router_losses"):
            self._validate_losses(name)

    def _validate_losses(self, name: str) -> None:
        losses = getattr(self, name)
        known = [field.name for field in dataclasses.fields(AuxLossWeights)]
        unknown = sorted(set(losses) - set(known))
        if unknown:
            raise ValueError(f"{name} has unknown losses {', '.join(unknown)}; choose from {', '.join(known)}")
        if losses.get("load") and not self.router_noise_std:
            raise ValueError(f"{name}: load needs noisy routing; set router_noise_std (V-MoE: 1.0)")
        undefined = [loss for loss in ("z", "load") if losses.get(loss)]
        if self.scoring_func == "sigmoid" and undefined:
            raise ValueError(f"{name}: {', '.join(undefined)} are defined for scoring_func='softmax'; set them to 0")
        minimum = losses.get("global_entropy_min_experts")
        if minimum is not None and not 1 <= minimum <= self.num_experts:
            raise ValueError(
                f"{name}: global_entropy_min_experts must be in [1, num_experts={self.num_experts}], but got {minimum}"
            )

    @property
    def image_loss_weights(self) -> AuxLossWeights:
        """Coefficients of the router losses over the image tokens."""
        return AuxLossWeights(**(self.image_router_losses or {}))

    @property
    def text_loss_weights(self) -> AuxLossWeights:
        """Coefficients of the router losses over the text tokens."""
        return AuxLossWeights(**(self.text_router_losses or {}))
