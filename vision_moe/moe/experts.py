"""E two-layer MLPs with stacked weights, behind transformers' experts interface, and one that every token passes.

T tokens, D model dim, F hidden dim, E experts, K experts per token, N = T * K routed tokens.

The default implementation is "vision_moe", our kernels, which importing this module registers. "eager" is the forward
below. transformers' "grouped_mm" ignores autocast: under bf16 autocast it computes in float32.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from vision_moe.kernels import interface  # noqa: F401  # registers "vision_moe"
from vision_moe.kernels.linear import linear


class ExpertsConfig(Protocol):
    """The fields that `Experts` reads; any transformers config with these names will do."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    hidden_act: str
    _experts_implementation: str


@use_experts_implementation(has_gate=False, has_bias=True, is_transposed=False)
class Experts(nn.Module):
    """E expert MLPs: y = W2 act(W1 x + b1) + b2, weighted by the gates and summed over the chosen experts.

    Args:
        config: the sizes.
        expert_dim: F; None = `config.intermediate_size`.
    """

    def __init__(self, config: ExpertsConfig, expert_dim: int | None = None) -> None:
        super().__init__()
        E, D, F_ = config.num_experts, config.hidden_size, expert_dim or config.intermediate_size
        self.num_experts = E
        self.up_proj = nn.Parameter(torch.empty(E, F_, D))
        self.up_proj_bias = nn.Parameter(torch.zeros(E, F_))
        self.down_proj = nn.Parameter(torch.empty(E, D, F_))
        self.down_proj_bias = nn.Parameter(torch.zeros(E, D))
        self.act_fn = ACT2FN[config.hidden_act]
        nn.init.normal_(self.up_proj, std=(2 * D) ** -0.5)
        nn.init.normal_(self.down_proj, std=D**-0.5)

    # The parameters' names are transformers' interface: its implementations are called with the same arguments.
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sorts the routed tokens by expert and gives each expert one contiguous slice.

        Args:
            hidden_states: float[T, D].
            top_k_index: int64[T, K], experts of each token; a slot of expert E, one past the last, is not computed.
            top_k_weights: float32[T, K], their weights.

        Returns:
            float[T, D] in the dtype of `hidden_states`; the weighted sum is taken in float32.
        """
        experts_N = top_k_index.flatten()
        *tokens_per_expert, _ = torch.bincount(experts_N, minlength=self.num_experts + 1).tolist()
        # The slots of expert E come last.
        order_N = experts_N.argsort(stable=True)[: sum(tokens_per_expert)]
        token_N = order_N // top_k_index.shape[-1]
        x_TD = hidden_states
        if torch.is_autocast_enabled(x_TD.device.type):
            # Once here, and not in every expert's linear: the gather below then moves half the bytes.
            x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
        slices = x_TD.index_select(0, token_N).split(tokens_per_expert)
        # unbind, because indexing per expert would build a zero-filled [E, F, D] gradient per expert. An empty slice
        # is computed too: its expert then has a zero gradient instead of none, which DDP and ZeRO need.
        weights = zip(
            self.up_proj.unbind(),
            self.up_proj_bias.unbind(),
            self.down_proj.unbind(),
            self.down_proj_bias.unbind(),
            strict=True,
        )
        y_ND = torch.cat(
            [
                nn.functional.linear(self.act_fn(nn.functional.linear(x_nD, w1_FD, b1_F)), w2_DF, b2_D)
                for x_nD, (w1_FD, b1_F, w2_DF, b2_D) in zip(slices, weights, strict=True)
            ]
        )
        weighted_ND = y_ND * top_k_weights.flatten().index_select(0, order_N)[:, None]
        y_TD = weighted_ND.new_zeros(hidden_states.shape).index_add(0, token_N, weighted_ND)
        return y_TD.to(hidden_states.dtype)


class SharedExpert(nn.Module):
    """The MLP of an expert, for all tokens (Dai et al. 2024, DeepSeekMoE, section 3.2).

    Args:
        config: the sizes.
        expert_dim: F.
    """

    def __init__(self, config: ExpertsConfig, expert_dim: int) -> None:
        super().__init__()
        D = config.hidden_size
        self.config: Any = config
        # As in Experts, and not nn.Linear: transformers skips the initialization of our modules without own parameters.
        self.up_proj = nn.Parameter(torch.empty(expert_dim, D))
        self.up_proj_bias = nn.Parameter(torch.zeros(expert_dim))
        self.down_proj = nn.Parameter(torch.empty(D, expert_dim))
        self.down_proj_bias = nn.Parameter(torch.zeros(D))
        self.act_fn = ACT2FN[config.hidden_act]
        nn.init.normal_(self.up_proj, std=(2 * D) ** -0.5)
        nn.init.normal_(self.down_proj, std=D**-0.5)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Maps float[T, D] to float[T, D]."""
        h_TF = self.act_fn(linear(x_TD, self.up_proj, self.up_proj_bias))
        return linear(h_TF, self.down_proj, self.down_proj_bias)
