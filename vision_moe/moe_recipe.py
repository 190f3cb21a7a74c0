"""The mixture in an encoder recipe: where the experts stand, how their routers start, and every routing field."""

from dataclasses import dataclass, fields
from typing import Any, Literal

# In the order in which a value is tried: "4" on the command line is a number.
Layers = int | list[int] | str


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """Fields that the model's config takes over; a field that is not set (null) keeps the default there.

    What they do, and their defaults, stand in `vision_moe.model.configuration.MoEFields` and docs/routing.md.
    """

    expert_width_factor: float | None = None
    """Hidden size of an expert, as a share of the dense MLP's; 1 / a whole number."""
    shared_expert: bool | None = None
    """One more expert that every token passes."""
    router_type: Literal["token_choice", "expert_choice"] | None = None
    """Who chooses: tokens their experts, or experts their tokens."""
    scoring_func: Literal["softmax", "sigmoid"] | None = None
    """Scores of the experts."""
    norm_topk_prob: bool | None = None
    """Gates of the chosen experts sum to 1."""
    capacity_factor: float | None = None
    """Tokens that an expert takes at most in training, as a multiple of its fair share."""
    eval_capacity_factor: float | None = None
    """The same in evaluation."""
    capacity_group_size: int | None = None
    """Pictures or captions that share capacity."""
    batch_priority: bool | None = None
    """Tokens of highest gate get the places first."""
    router_bias_update_rate: float | None = None
    """Step of loss-free balancing."""
    router_bias_update: Literal["sign", "z_score"] | None = None
    """Form of that step."""
    router_noise_std: float | None = None
    """Noise on the router's logits in training, times num_experts."""
    router_aux_loss_coef: float | None = None
    """Weight of the load-balance loss."""
    balance_top_k: bool | None = None
    """Count top-k slots (official code) instead of the first choice (paper) in the balance loss."""
    router_z_loss_coef: float | None = None
    """Weight of the z-loss."""
    router_importance_loss_coef: float | None = None
    """Weight of V-MoE's importance loss."""
    router_load_loss_coef: float | None = None
    """Weight of V-MoE's load loss."""
    router_local_entropy_loss_coef: float | None = None
    """Weight of LIMoE's local entropy loss."""
    router_global_entropy_loss_coef: float | None = None
    """Weight of LIMoE's global entropy loss."""
    router_global_entropy_min_experts: float | None = None
    """Its soft minimum of experts in use."""
    local_router_losses: bool | None = None
    """Router losses of each rank's own tokens, not of the global batch."""

    @property
    def model_fields(self) -> dict[str, Any]:
        """The fields that are set, by their names in the model's config."""
        values = {field.name: getattr(self, field.name) for field in fields(RoutingConfig)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class MoEConfig(RoutingConfig):
    """The mixture that is built and its router losses."""

    num_experts: int = 4
    """Experts per block; DMU trains num_experts - 1 stages, expert 0 is the dense start."""
    num_experts_per_tok: int = 2
    """Experts that see a token."""
    layers: Layers = "all"
    """Blocks that become mixtures: all; odd (every second one); every_n (blocks n - 1, 2n - 1, ... from 0); a number n
    for the last n of each tower; or a list of indices."""
    text_layers: Layers | None = None
    """The same for the text tower; null: as layers."""
    towers: tuple[Literal["vision", "text"], ...] = ("vision", "text")
    """Towers that get mixtures."""
    router_init: Literal["normal", "centroids"] = "normal"
    """Routers start at random, or from k-means clusters of their own inputs (vision_moe.router_init)."""
    router_std: float = 0.02
    """Standard deviation of the random router."""

    @property
    def tower_layers(self) -> dict[str, Layers]:
        """`layers` of each tower."""
        return {"vision": self.layers, "text": self.layers if self.text_layers is None else self.text_layers}
