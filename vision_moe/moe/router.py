"""The router: which experts take a token, and with what weight.

T tokens, D model dim, E experts, K experts chosen per token.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class RouterOutput(NamedTuple):
    """What a router decides about T tokens.

    Attributes:
        router_logits_TE: float32[T, E], noise-free.
        noisy_logits_TE: float32[T, E], the logits that chose the experts; None where no noise was drawn.
        gates_TE: float32[T, E], the scores of all experts, with the noise.
        topk_gates_TK: float32[T, K], the weights of the chosen experts, in the order of the choice.
        topk_experts_TK: int64[T, K], the chosen experts, best first.
    """

    router_logits_TE: Tensor
    noisy_logits_TE: Tensor | None
    gates_TE: Tensor
    topk_gates_TK: Tensor
    topk_experts_TK: Tensor


def expert_scores(logits_TE: Tensor, scoring_func: str) -> Tensor:
    """Scores of all experts, float[T, E]: a softmax over each row, or with "sigmoid" that of each logit."""
    return logits_TE.sigmoid() if scoring_func == "sigmoid" else logits_TE.softmax(dim=-1)


class Router(nn.Module):
    """Bias-free linear router with a score for every expert and a top-k choice (CLIP-MoE, eq. 3 and 5).

    Always computed in float32, whatever the weights' dtype and the autocast: a rounding step here changes which
    experts are chosen, not just by how much.

    Args:
        dim: D.
        num_experts: E.
        top_k: K.
        normalize: divide the K gates by their sum, which for a softmax equals a softmax over the K chosen logits;
            otherwise the gates are the raw scores (V-MoE).
        noise_std: in training, adds N(0, (noise_std / E)^2) to the logits before the choice (V-MoE); 0 = none.
        scoring_func: "softmax" over all experts, or "sigmoid" of each logit (DeepSeek-V3, eq. 15).
        choice_bias: hold a bias that is added to the scores for the choice and not for the gates (Wang et al. 2024,
            loss-free balancing). It starts at 0, is no parameter, and stays float32 when the model is cast.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        normalize: bool = True,
        noise_std: float = 0.0,
        scoring_func: str = "softmax",
        choice_bias: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be in [1, num_experts], but got top_k={top_k} with num_experts={num_experts}")
        if scoring_func not in ("softmax", "sigmoid"):
            raise ValueError(f"scoring_func must be 'softmax' or 'sigmoid', but got {scoring_func!r}")
        self.num_experts = num_experts
        self.top_k = top_k
        self.normalize = normalize
        self.noise_std = noise_std
        self.scoring_func = scoring_func
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        nn.init.normal_(self.weight, std=0.02)
        self.choice_bias: Tensor | None
        self.register_buffer("choice_bias", torch.zeros(num_experts, dtype=torch.float32) if choice_bias else None)

    def forward(self, x_TD: Tensor) -> RouterOutput:
        """Routes each token.

        Args:
            x_TD: float[T, D].
        """
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            router_logits_TE = nn.functional.linear(x_TD.float(), self.weight.float())
            noisy_logits_TE = None
            if self.training and self.noise_std > 0:
                noise_TE = torch.randn_like(router_logits_TE) * (self.noise_std / self.num_experts)
                noisy_logits_TE = router_logits_TE + noise_TE
            return self.decide(router_logits_TE, noisy_logits_TE)

    def decide(self, router_logits_TE: Tensor, noisy_logits_TE: Tensor | None = None) -> RouterOutput:
        """The choice that follows from logits.

        Args:
            router_logits_TE: float32[T, E], noise-free.
            noisy_logits_TE: float32[T, E], the logits that choose; None = those without noise.
        """
        logits_TE = router_logits_TE if noisy_logits_TE is None else noisy_logits_TE
        gates_TE = expert_scores(logits_TE, self.scoring_func)
        if self.choice_bias is None:
            topk_gates_TK, topk_experts_TK = gates_TE.topk(self.top_k, dim=-1)
        else:
            topk_experts_TK = (gates_TE.detach() + self.choice_bias).topk(self.top_k, dim=-1).indices
            topk_gates_TK = gates_TE.gather(-1, topk_experts_TK)
        if self.normalize:
            topk_gates_TK = topk_gates_TK / topk_gates_TK.sum(dim=-1, keepdim=True)
        return RouterOutput(router_logits_TE, noisy_logits_TE, gates_TE, topk_gates_TK, topk_experts_TK)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Moves and casts as any module does, except that the bias keeps float32: bfloat16 would swallow its steps."""
        bias_E = self.choice_bias
        super()._apply(fn, recurse)
        if bias_E is not None and self.choice_bias is not None and self.choice_bias.dtype != torch.float32:
            self.choice_bias = bias_E.to(self.choice_bias.device)
        return self

    def extra_repr(self) -> str:
        """Shows the sizes in `print(model)`."""
        return f"dim={self.weight.shape[-1]}, num_experts={self.num_experts}, top_k={self.top_k}"
