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
        expert_width_factor: hidden size of an expert as a fraction of the dense MLP's, intermediate_size; also of the
            shared expert.
        shared_expert: every token also passes an MLP of an expert's size, whose output is added with weight 1.
        router_type: "token_choice": a token takes its top num_experts_per_tok experts; "expert_choice": an expert takes
            its top tokens, capacity_factor experts a token on average (Zhou et al. 2022).
        scoring_func: the scores of the experts: "softmax" over all of them, or "sigmoid" of each (DeepSeek-V3).
        norm_topk_prob: the gates of the chosen experts sum to 1 (CLIP-MoE); otherwise raw scores (V-MoE).
        capacity_factor: in training an expert computes at most ceil(capacity_factor * tokens * num_experts_per_tok /
            num_experts) of a group's tokens, and the rest are dropped; with expert choice, without num_experts_per_tok
            and exactly. None = no token is dropped.
        eval_capacity_factor: the same in evaluation.
        capacity_group_size: sequences (pictures or captions) that share capacity; 8 in V-MoE, 1 makes a sequence's
            output independent of the rest of the batch. None = this process's whole batch.
        batch_priority: the tokens of highest gate get the places first (V-MoE, LIMoE), not those that come first.
        router_bias_update_rate: size of a step of loss-free balancing (Wang et al. 2024: 0.001), in which
            `vision_moe.router_bias.RouterBiasCallback` moves a bias on each expert's score. None or 0 = there is no
            bias; a model that was trained with one needs the rate kept.
        router_bias_update: "sign" of the lack of tokens, or "z_score": the lack in standard deviations (MoE-ViE).
        router_noise_std: in training the router's logits get N(0, (router_noise_std / num_experts)^2) (V-MoE).
        router_aux_loss_coef: of the load-balancing loss.
        balance_top_k: the load-balancing loss counts all choices (official CLIP-MoE code), not the first (paper).
        router_z_loss_coef: of the router z-loss.
        router_importance_loss_coef: of V-MoE's importance loss.
        router_load_loss_coef: of V-MoE's load loss; needs router_noise_std > 0.
        router_local_entropy_loss_coef: of LIMoE's local entropy loss.
        router_global_entropy_loss_coef: of LIMoE's global entropy loss.
        router_global_entropy_min_experts: its soft minimum S of experts in use (tau = log S); None = all.
        local_router_losses: in training under data parallelism, each rank's router losses are those of its own tokens
            (official CLIP-MoE code), and not those of the global batch.
        output_router_logits: return the router logits, and in evaluation the aux loss too.
    """

    num_experts: int = 4
    num_experts_per_tok: int = 2
    moe_layers: list[int] | None = None
    expert_width_factor: int | float = 1.0
    shared_expert: bool = False
    router_type: str = "token_choice"
    scoring_func: str = "softmax"
    norm_topk_prob: bool = True
    capacity_factor: int | float | None = None
    eval_capacity_factor: int | float | None = None
    capacity_group_size: int | None = None
    batch_priority: bool = False
    router_bias_update_rate: int | float | None = None
    router_bias_update: str = "sign"
    router_noise_std: int | float = 0.0
    router_aux_loss_coef: int | float = 0.01
    balance_top_k: bool = False
    router_z_loss_coef: int | float = 0.0
    router_importance_loss_coef: int | float = 0.0
    router_load_loss_coef: int | float = 0.0
    router_local_entropy_loss_coef: int | float = 0.0
    router_global_entropy_loss_coef: int | float = 0.0
    router_global_entropy_min_experts: int | float | None = None
    local_router_losses: bool = False
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
        self._validate_routing()
        self._validate_expert_choice()
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

    def _validate_routing(self) -> None:
        for name, allowed in (
            ("router_type", ("token_choice", "expert_choice")),
            ("scoring_func", ("softmax", "sigmoid")),
            ("router_bias_update", ("sign", "z_score")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, but got {getattr(self, name)!r}")
        for name in ("capacity_factor", "eval_capacity_factor", "capacity_group_size", "expert_width_factor"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, but got {value}")
        if self.router_bias_update_rate is not None and not self.router_bias_update_rate >= 0:
            raise ValueError(f"router_bias_update_rate must not be negative, but got {self.router_bias_update_rate}")
        width = self.intermediate_size * self.expert_width_factor  # type: ignore[attr-defined]
        if abs(width - self.expert_dim) > 1e-3 or self.expert_dim < 1:
            raise ValueError(
                f"expert_width_factor * intermediate_size must be a whole number, but got "
                f"{self.expert_width_factor} * {self.intermediate_size}"  # type: ignore[attr-defined]
            )
        capped = self.capacity_factor is not None or self.eval_capacity_factor is not None
        if not capped and (self.batch_priority or self.capacity_group_size is not None):
            raise ValueError("batch_priority and capacity_group_size order who is dropped; set capacity_factor as well")
        undefined = [
            name for name in ("router_z_loss_coef", "router_load_loss_coef", "router_noise_std") if getattr(self, name)
        ]
        if self.scoring_func == "sigmoid" and undefined:
            raise ValueError(f"{', '.join(undefined)} are defined for scoring_func='softmax'; set them to 0")
        if self.router_bias_update_rate and self.router_load_loss_coef:
            raise ValueError("router_load_loss_coef does not know the bias of router_bias_update_rate; set one to 0")

    def _validate_expert_choice(self) -> None:
        if self.router_type != "expert_choice":
            return
        if self.capacity_factor is None or self.eval_capacity_factor is None:
            raise ValueError(
                "router_type='expert_choice' needs capacity_factor and eval_capacity_factor, the experts per token on "
                f"average, but got {self.capacity_factor} and {self.eval_capacity_factor}"
            )
        useless = ("router_aux_loss_coef", "router_load_loss_coef", "router_bias_update_rate", "batch_priority")
        found = [name for name in useless if getattr(self, name)]
        if found:
            raise ValueError(f"router_type='expert_choice' balances the experts itself; switch off {', '.join(found)}")

    @property
    def expert_dim(self) -> int:
        """Hidden size of one expert, F."""
        return round(self.intermediate_size * self.expert_width_factor)  # type: ignore[attr-defined]

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
