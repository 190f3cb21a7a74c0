"""MoEMLP: router -> experts, in the place of a transformer block's MLP.

B batch, S sequence, T = B * S tokens, D model dim, E experts.
"""

from typing import NamedTuple

from torch import Tensor, nn

from vision_moe.moe.experts import Experts, ExpertsConfig
from vision_moe.moe.router import Router


class RoutedConfig(ExpertsConfig):
    """The fields that `MoEMLP` reads."""

    num_experts_per_tok: int
    norm_topk_prob: bool
    router_noise_std: float


class MoEOutput(NamedTuple):
    """Output of one MoE block.

    Attributes:
        hidden_states_BSD: float[B, S, D] in the input's dtype; zero at padding.
        router_logits_BSE: float32[B, S, E], noise-free; zero at padding.
        noisy_logits_BSE: float32[B, S, E], the logits that chose the experts; None where no noise was drawn.
    """

    hidden_states_BSD: Tensor
    router_logits_BSE: Tensor
    noisy_logits_BSE: Tensor | None


class MoEMLP(nn.Module):
    """A sparse MLP: each token is the gate-weighted sum of its top-k experts; dropless, no shared expert."""

    def __init__(self, config: RoutedConfig) -> None:
        super().__init__()
        self.router = Router(
            config.hidden_size,
            config.num_experts,
            config.num_experts_per_tok,
            normalize=config.norm_topk_prob,
            noise_std=config.router_noise_std,
        )
        self.experts = Experts(config)

    def forward(self, x_BSD: Tensor, mask_BS: Tensor | None = None) -> MoEOutput:
        """Routes each valid token to its experts.

        Args:
            x_BSD: float[B, S, D].
            mask_BS: bool[B, S], False at padding, which is neither routed nor computed; None = every token is valid.
        """
        x_TD = x_BSD.flatten(0, 1)
        valid_V = None if mask_BS is None else mask_BS.flatten().nonzero().squeeze(-1)
        if valid_V is not None:
            x_TD = x_TD.index_select(0, valid_V)
        routed = self.router(x_TD)
        y_TD = self.experts(x_TD, routed.topk_experts_TK, routed.topk_gates_TK)

        def unflatten(rows_TX: Tensor) -> Tensor:
            if valid_V is not None:
                T = x_BSD.shape[0] * x_BSD.shape[1]
                rows_TX = rows_TX.new_zeros(T, rows_TX.shape[-1]).index_copy(0, valid_V, rows_TX)
            return rows_TX.unflatten(0, x_BSD.shape[:2])

        noisy_TE = routed.noisy_logits_TE
        return MoEOutput(
            unflatten(y_TD),
            unflatten(routed.router_logits_TE),
            None if noisy_TE is None else unflatten(noisy_TE),
        )
