"""Which slots of the routing are computed: capacity and expert choice, as pure functions.

T tokens, E experts, K choices per token, G groups of tokens that share capacity, C capacity, N = T * K slots.

A slot that is not computed names expert E, one past the last, and has gate 0. That is what transformers' experts
interface takes for "not here": its implementations and ours skip it or give it no weight.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """Groups of tokens that compete for the experts' places; the group numbers of the tokens ascend.

    Attributes:
        group_T: int64[T], each token's group.
        size_G: int64[G], tokens per group.
    """

    group_T: Tensor
    size_G: Tensor

    def capacity(self, slots_per_expert: float) -> Tensor:
        """Places of one expert in each group, C = ceil(tokens * slots_per_expert), int64[G].

        Args:
            slots_per_expert: capacity_factor * K / E (V-MoE's code), or capacity_factor / E for expert choice (Zhou et
                al. 2022, eq. 1).
        """
        # Less a little, because 100 * 1.1 is 110.00000000000001 in floating point, and must give 110 places.
        return (self.size_G.double() * slots_per_expert - 1e-6).ceil().long()


def group_tokens(row_T: Tensor, num_rows: int, rows_per_group: int | None) -> Groups:
    """Groups of so many sequences each; the last may be smaller.

    Args:
        row_T: int64[T], ascending: the sequence that each valid token is of.
        num_rows: sequences in the batch.
        rows_per_group: sequences per group; None = the whole batch is one group.
    """
    per_group = num_rows if rows_per_group is None else rows_per_group
    group_T = row_T // max(per_group, 1)
    num_groups = -(-num_rows // max(per_group, 1))
    # A comparison, because bincount waits for the device.
    return Groups(group_T, (group_T[:, None] == torch.arange(num_groups, device=row_T.device)).sum(dim=0))


def drop_overflow(
    experts_TK: Tensor,
    gates_TK: Tensor,
    num_experts: int,
    groups: Groups,
    capacity_G: Tensor,
    priority_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Drops the slots that come too late for their expert's places (Riquelme et al. 2021, V-MoE, algorithms 1 and 2).

    All first choices come before all second choices, and so on; among equal choices the tokens come in their order.

    Args:
        experts_TK: int64[T, K], best choice first.
        gates_TK: float32[T, K].
        num_experts: E.
        groups: which tokens share places.
        capacity_G: int64[G], places per expert.
        priority_T: float32[T], batch priority routing: among equal choices the highest comes first; None = in order.

    Returns:
        experts int64[T, K] with E where dropped, and gates float32[T, K] with 0 there.
    """
    num_tokens, num_choices = experts_TK.shape
    order_T = torch.arange(num_tokens, device=experts_TK.device)
    if priority_T is not None:
        order_T = priority_T.argsort(descending=True, stable=True)
    queue_TK = groups.group_T[:, None] * num_experts + experts_TK
    queue_N = queue_TK[order_T].T.flatten()
    sorted_N, by_queue_N = queue_N.sort(stable=True)
    first_N = torch.searchsorted(sorted_N, sorted_N)
    place_N = torch.empty_like(queue_N)
    place_N[by_queue_N] = torch.arange(len(queue_N), device=queue_N.device) - first_N
    place_TK = torch.empty_like(experts_TK)
    place_TK[order_T] = place_N.view(num_choices, num_tokens).T
    dropped_TK = place_TK >= capacity_G[groups.group_T][:, None]
    return experts_TK.masked_fill(dropped_TK, num_experts), gates_TK.masked_fill(dropped_TK, 0.0)


def expert_choice(gates_TE: Tensor, groups: Groups, capacity_G: Tensor, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """Each expert takes the tokens of highest gate in each group (Zhou et al. 2022).

    Args:
        gates_TE: float32[T, E].
        groups: the tokens that an expert chooses among.
        capacity_G: int64[G], tokens per expert.
        normalize: divide a token's gates by their sum over the experts that took it (Komatsuzaki et al. 2023).

    Returns:
        experts int64[T, E] with E where an expert did not take the token, and gates float32[T, E] with 0 there.
    """
    num_tokens, num_experts = gates_TE.shape
    order_TE = gates_TE.argsort(dim=0, descending=True, stable=True)
    # Again by group: every column then lists group 0's tokens from its highest gate down, then group 1's, ...
    order_TE = order_TE.gather(0, groups.group_T[order_TE].argsort(dim=0, stable=True))
    start_G = groups.size_G.cumsum(0) - groups.size_G
    rank_T = torch.arange(num_tokens, device=gates_TE.device) - start_G[groups.group_T]
    taken_T = rank_T < capacity_G[groups.group_T]
    taken_TE = torch.zeros_like(gates_TE, dtype=torch.bool).scatter(0, order_TE, taken_T[:, None].expand_as(order_TE))
    gates_TE = gates_TE.masked_fill(~taken_TE, 0.0)
    if normalize:
        gates_TE = gates_TE / gates_TE.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(gates_TE.dtype).tiny)
    experts_TE = torch.arange(num_experts, device=gates_TE.device).expand_as(gates_TE)
    return experts_TE.masked_fill(~taken_TE, num_experts), gates_TE


def count_tokens(experts_TK: Tensor, num_experts: int) -> Tensor:
    """Tokens per expert, int64[E].

    Args:
        experts_TK: int64[T, K]; a slot of expert E counts for none.
        num_experts: E.
    """
    return (experts_TK.flatten()[:, None] == torch.arange(num_experts, device=experts_TK.device)).sum(dim=0)
