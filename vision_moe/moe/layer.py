"""MoEMLP: router -> dispatch -> experts, in the place of a transformer block's MLP.

B batch, S sequence, T = B * S tokens, D model dim, E experts, K choices per token.
"""

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vision_moe.moe.dispatch import count_tokens, drop_overflow, expert_choice, group_tokens
from vision_moe.moe.experts import Experts, ExpertsConfig, SharedExpert
from vision_moe.moe.router import Router, RouterOutput


class RoutedConfig(ExpertsConfig):
    """The fields that `MoEMLP` reads; vision_moe.model.configuration says what they do."""

    num_experts_per_tok: int
    norm_topk_prob: bool
    router_noise_std: float
    router_type: str
    scoring_func: str
    capacity_factor: float | None
    eval_capacity_factor: float | None
    capacity_group_size: int | None
    batch_priority: bool
    router_bias_update_rate: float | None
    shared_expert: bool
    expert_dim: int


class MoEOutput(NamedTuple):
    """Output of one MoE block.

    Attributes:
        hidden_states_BSD: float[B, S, D] in the input's dtype; zero at padding.
        router_logits_BSE: float32[B, S, E], noise-free; zero at padding.
        noisy_logits_BSE: float32[B, S, E], the logits that chose the experts; None where no noise was drawn.
        tokens_per_expert_E: int64[E], choices of valid tokens, before any is dropped; [M, E] for M parts.
        dropped_fraction: float32 scalar, share of the valid tokens' K choices that no expert computed; with expert
            choice, of the valid tokens that no expert took; [M] for M parts.
    """

    hidden_states_BSD: Tensor
    router_logits_BSE: Tensor
    noisy_logits_BSE: Tensor | None
    tokens_per_expert_E: Tensor
    dropped_fraction: Tensor


class Route(NamedTuple):
    """The valid tokens of a batch, V of B * S, and the experts that compute them.

    Attributes:
        x_VD: float[V, D].
        token_V: int64[V], their positions among B * S.
        routed: the router's output.
        experts_VK: int64[V, K], or [V, E] with expert choice: the experts that compute each token, E where a slot is
            not computed.
        gates_VK: float32, of the same shape.
    """

    x_VD: Tensor
    token_V: Tensor
    routed: RouterOutput
    experts_VK: Tensor
    gates_VK: Tensor


class MoEMLP(nn.Module):
    """A sparse MLP: each token is the gate-weighted sum of its experts, plus the shared expert where there is one."""

    def __init__(self, config: RoutedConfig) -> None:
        super().__init__()
        self.expert_choice = config.router_type == "expert_choice"
        self.capacity_factor = config.capacity_factor
        self.eval_capacity_factor = config.eval_capacity_factor
        self.capacity_group_size = config.capacity_group_size
        self.batch_priority = config.batch_priority
        self.router = Router(
            config.hidden_size,
            config.num_experts,
            config.num_experts_per_tok,
            normalize=config.norm_topk_prob,
            noise_std=config.router_noise_std,
            scoring_func=config.scoring_func,
            choice_bias=bool(config.router_bias_update_rate),
        )
        self.experts = Experts(config, config.expert_dim)
        if self.expert_choice or self.capacity_factor is not None or self.eval_capacity_factor is not None:
            # transformers' name for "slots may name an expert that is not here"; its implementations then skip them.
            self.experts._is_expert_parallel = True
        self.shared_expert = SharedExpert(config, config.expert_dim) if config.shared_expert else None

    def forward(self, x_BSD: Tensor, mask_BS: Tensor | None = None, parts: tuple[int, ...] | None = None) -> MoEOutput:
        """Routes each valid token to its experts.

        Args:
            x_BSD: float[B, S, D].
            mask_BS: bool[B, S], False at padding, which is neither routed nor computed; None = every token is valid.
            parts: lengths of the M parts that S consists of, in their order. They are routed as one, share capacity,
                and are counted apart. None = one part, and counts without the axis of parts.
        """
        route = self.route(x_BSD, mask_BS)
        routed = route.routed
        y_VD = self.experts(route.x_VD, route.experts_VK, route.gates_VK)
        if self.shared_expert is not None:
            y_VD = y_VD + self.shared_expert(route.x_VD).to(y_VD.dtype)

        def unflatten(rows_VX: Tensor) -> Tensor:
            if mask_BS is not None:
                T = x_BSD.shape[0] * x_BSD.shape[1]
                rows_VX = rows_VX.new_zeros(T, rows_VX.shape[-1]).index_copy(0, route.token_V, rows_VX)
            return rows_VX.unflatten(0, x_BSD.shape[:2])

        noisy_TE = routed.noisy_logits_TE
        chosen_VK = route.experts_VK if self.expert_choice else routed.topk_experts_TK
        position_V = route.token_V % x_BSD.shape[1]
        bounds = pairwise(accumulate(parts or (x_BSD.shape[1],), initial=0))
        counted = [
            self._count(chosen_VK, route.experts_VK, (start <= position_V) & (position_V < end))
            for start, end in bounds
        ]
        tokens_ME, dropped_M = (torch.stack(counts) for counts in zip(*counted, strict=True))
        return MoEOutput(
            unflatten(y_VD),
            unflatten(routed.router_logits_TE),
            None if noisy_TE is None else unflatten(noisy_TE),
            tokens_ME[0] if parts is None else tokens_ME,
            dropped_M[0] if parts is None else dropped_M,
        )

    def route(self, x_BSD: Tensor, mask_BS: Tensor | None = None) -> Route:
        """The first half of `forward`: which experts compute each valid token."""
        x_VD, token_V = x_BSD.flatten(0, 1), torch.arange(x_BSD.shape[0] * x_BSD.shape[1], device=x_BSD.device)
        if mask_BS is not None:
            token_V = mask_BS.flatten().nonzero().squeeze(-1)
            x_VD = x_VD.index_select(0, token_V)
        routed = self.router(x_VD)
        return Route(x_VD, token_V, routed, *self._dispatch(routed, token_V // x_BSD.shape[1], x_BSD.shape[0]))

    def _dispatch(self, routed: RouterOutput, row_T: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """Experts and gates of the slots to compute; see vision_moe.moe.dispatch for those that are not."""
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is None:
            return routed.topk_experts_TK, routed.topk_gates_TK
        E, K = self.router.num_experts, self.router.top_k
        groups = group_tokens(row_T, num_rows, self.capacity_group_size)
        if self.expert_choice:
            capacity_G = groups.capacity(factor / E)
            return expert_choice(routed.gates_TE, groups, capacity_G, normalize=self.router.normalize)
        # The raw gate and not the first of K, which is 1 for K = 1 when the gates are normalized.
        priority_T = routed.gates_TE.detach().amax(dim=-1) if self.batch_priority else None
        capacity_G = groups.capacity(factor * K / E)
        return drop_overflow(routed.topk_experts_TK, routed.topk_gates_TK, E, groups, capacity_G, priority_T)

    def _count(self, chosen_TK: Tensor, experts_TK: Tensor, inside_T: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens per expert and dropped fraction of the tokens inside a part."""
        E = self.router.num_experts
        dropped_TK = experts_TK == E
        if self.expert_choice:
            dropped_TK = dropped_TK.all(dim=-1, keepdim=True)
        num_slots = (inside_T.sum() * dropped_TK.shape[-1]).clamp_min(1)
        dropped = (dropped_TK & inside_T[:, None]).sum() / num_slots
        return count_tokens(chosen_TK.masked_fill(~inside_T[:, None], E), E), dropped
