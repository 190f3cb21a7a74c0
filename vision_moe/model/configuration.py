"""Configurations of CLIP-MoE: transformers' CLIP configurations plus the fields of the mixture."""

from dataclasses import dataclass

from huggingface_hub.dataclasses import strict
from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from transformers.utils import logging

from vision_moe.moe.losses import AuxLossWeights

# transformers' logger, for its warning_once: a config is rebuilt many times on its way into a model.
logger = logging.get_logger(__name__)


@dataclass(kw_only=True, repr=False)
class MoEFields:
    """The mixture's fields, the same for both towers; a name that transformers has is kept.

    Attributes:
        num_experts: experts per MoE block.
        num_experts_per_tok: experts that compute each token.
        moe_layers: blocks whose MLP is a mixture, counted from 0; None = all, [] = a dense tower.
        norm_topk_prob: the gates of the chosen experts sum to 1 (CLIP-MoE); otherwise raw probabilities (V-MoE).
        router_noise_std: in training the router's logits get N(0, (router_noise_std / num_experts)^2) (V-MoE).
        router_aux_loss_coef: of the load-balancing loss.
        balance_top_k: the load-balancing loss counts all choices (official CLIP-MoE code), not the first (paper).
        router_z_loss_coef: of the router z-loss.
        router_importance_loss_coef: of V-MoE's importance loss.
        router_load_loss_coef: of V-MoE's load loss; needs router_noise_std > 0.
        router_local_entropy_loss_coef: of LIMoE's local entropy loss.
        router_global_entropy_loss_coef: of LIMoE's global entropy loss.
        router_global_entropy_min_experts: its soft minimum S of experts in use (tau = log S); None = all.
        output_router_logits: return the router logits, and in evaluation the aux loss too.
    """

    num_experts: int = 4
    num_experts_per_tok: int = 2
    moe_layers: list[int] | None = None
    norm_topk_prob: bool = True
    router_noise_std: int | float = 0.0
    router_aux_loss_coef: int | float = 0.01
    balance_top_k: bool = False
    router_z_loss_coef: int | float = 0.0
    router_importance_loss_coef: int | float = 0.0
    router_load_loss_coef: int | float = 0.0
    router_local_entropy_loss_coef: int | float = 0.0
    router_global_entropy_loss_coef: int | float = 0.0
    router_global_entropy_min_experts: int | float | None = None
    output_router_logits: bool = False

    def validate_moe(self) -> None:
        """Called by `@strict` after construction."""
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok must be in [1, num_experts], but got num_experts_per_tok="
                f"{self.num_experts_per_tok} with num_experts={self.num_experts}"
            )
        depth: int = self.num_hidden_layers  # type: ignore[attr-defined]  # a field of the CLIP half
        layers = self.moe_block_indices
        if len(set(layers)) != len(layers) or not all(0 <= layer < depth for layer in layers):
            raise ValueError(
                f"moe_layers must be distinct and in [0, num_hidden_layers={depth}), but got {self.moe_layers}"
            )
        if self.router_load_loss_coef and not self.router_noise_std:
            raise ValueError("router_load_loss_coef needs noisy routing; set router_noise_std (V-MoE: 1.0)")
        minimum = self.router_global_entropy_min_experts
        if minimum is not None and not 1 <= minimum <= self.num_experts:
            raise ValueError(
                f"router_global_entropy_min_experts must be in [1, num_experts={self.num_experts}], but got {minimum}"
            )
        if layers and self.num_experts_per_tok == 1 and self.norm_topk_prob and self.num_experts > 1:
            logger.warning_once(
                "num_experts_per_tok=1 with norm_topk_prob=True makes every gate 1: the routers learn from the aux "
                "losses only. Set norm_topk_prob=False to train them through the output."
            )

    @property
    def moe_block_indices(self) -> tuple[int, ...]:
        """Indices of the MoE blocks, with None resolved."""
        if self.moe_layers is None:
            return tuple(range(self.num_hidden_layers))  # type: ignore[attr-defined]
        return tuple(self.moe_layers)

    @property
    def aux_loss_weights(self) -> AuxLossWeights:
        """The router losses' coefficients."""
        return AuxLossWeights(
            load_balance=self.router_aux_loss_coef,
            balance_top_k=self.balance_top_k,
            z=self.router_z_loss_coef,
            importance=self.router_importance_loss_coef,
            load=self.router_load_loss_coef,
            local_entropy=self.router_local_entropy_loss_coef,
            global_entropy=self.router_global_entropy_loss_coef,
            global_entropy_min_experts=self.router_global_entropy_min_experts,
        )


@strict
class CLIPMoEVisionConfig(MoEFields, CLIPVisionConfig):
    """An image tower; see `MoEFields` and `transformers.CLIPVisionConfig`.

    Attributes:
        pre_layernorm: normalize the embeddings before the first block, as CLIP does and DINOv2 does not.
    """

    model_type = "clip_moe_vision_model"

    pre_layernorm: bool = True


@strict
class CLIPMoETextConfig(MoEFields, CLIPTextConfig):
    """A text tower; see `MoEFields` and `transformers.CLIPTextConfig`."""

    model_type = "clip_moe_text_model"


@strict
class CLIPMoEConfig(CLIPConfig):
    """Both towers and the projections; see `transformers.CLIPConfig`."""

    model_type = "clip_moe"
    sub_configs_defaults = {  # noqa: RUF012  # transformers' class-level protocol
        "vision_config": CLIPMoEVisionConfig,
        "text_config": CLIPMoETextConfig,
    }
