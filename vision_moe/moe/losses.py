"""Auxiliary router losses: pure functions of the logits or gates of one MoE block, each a float32 scalar.

T tokens, E experts, K chosen experts per token. Everywhere `mask_T` is bool[T], False at padding, which is left out of
every mean and count; None = all tokens are valid. `mean` takes the mean over tokens that a loss is a function of: over
those of this process, or of all ranks (vision_moe.moe.token_mean), before any product or square of means.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vision_moe.moe.token_mean import TokenMean, mean_of_process


def load_balance_loss(
    gates_TE: Tensor, topk_experts_TK: Tensor, mask_T: Tensor | None = None, mean: TokenMean = mean_of_process
) -> Tensor:
    """Switch load-balancing loss, E * sum_e f_e * P_e (Fedus et al. 2021, eq. 4; CLIP-MoE, eq. 6 to 8).

    f_e is the share of tokens with expert e among the K given choices, P_e the mean gate. With K = 1 and the argmax it
    is the papers' form: 1 when balanced, E when collapsed. With K > 1 it is the form of the official CLIP-MoE code.

    Args:
        gates_TE: float[T, E], rows sum to 1; gradients flow through these only.
        topk_experts_TK: int64[T, K], experts chosen per token.
        mask_T: bool[T].
        mean: over tokens.

    Returns:
        float32 scalar; K when perfectly balanced (f_e sums to K over the choices).

    Raises:
        ValueError: if there is no valid token.
    """
    gates_TE, topk_experts_TK = _valid(gates_TE, mask_T).float(), _valid(topk_experts_TK, mask_T)
    num_experts = gates_TE.shape[-1]
    chosen_TE = torch.zeros_like(gates_TE).scatter(1, topk_experts_TK, 1.0)
    f_E, P_E = mean(torch.stack([chosen_TE, gates_TE], dim=1))
    return num_experts * (f_E * P_E).sum()


def router_z_loss(router_logits_TE: Tensor, mask_T: Tensor | None = None, mean: TokenMean = mean_of_process) -> Tensor:
    """Mean squared log-partition of the router, mean_t (logsumexp_e s_te)^2 (Zoph et al. 2022, ST-MoE, eq. 5).

    Args:
        router_logits_TE: float[T, E].
        mask_T: bool[T].
        mean: over tokens.

    Raises:
        ValueError: if there is no valid token.
    """
    return mean(_valid(router_logits_TE, mask_T).float().logsumexp(dim=-1).square())


def importance_loss(gates_TE: Tensor, mask_T: Tensor | None = None, mean: TokenMean = mean_of_process) -> Tensor:
    """Squared coefficient of variation of the experts' summed gates (Riquelme et al. 2021, V-MoE).

    Args:
        gates_TE: float[T, E], noise-free gates.
        mask_T: bool[T].
        mean: over tokens.

    Returns:
        float32 scalar; 0 when balanced, E - 1 when collapsed to one expert.

    Raises:
        ValueError: if there is no valid token.
    """
    return _squared_variation(mean(_valid(gates_TE, mask_T).float()))


def load_loss(
    router_logits_TE: Tensor,
    noisy_logits_TE: Tensor,
    top_k: int,
    noise_std: float,
    mask_T: Tensor | None = None,
    mean: TokenMean = mean_of_process,
) -> Tensor:
    """Squared coefficient of variation of the expected load per expert (Riquelme et al. 2021, V-MoE).

    The load of expert e is the chance that it would be among the top k if its noise were drawn again:
    1 - Phi((thr_t - s_te) / sigma), with thr_t the k-th largest noisy logit.

    Args:
        router_logits_TE: float[T, E], noise-free.
        noisy_logits_TE: float[T, E], the same with the noise that chose the experts.
        top_k: K.
        noise_std: sigma of the noise, as added to the logits.
        mask_T: bool[T].
        mean: over tokens.

    Raises:
        ValueError: if there is no valid token, or no noise.
    """
    if not noise_std > 0:
        raise ValueError(f"load_loss is defined for noisy routing only, but got noise_std={noise_std}")
    logits_TE, noisy_TE = _valid(router_logits_TE, mask_T).float(), _valid(noisy_logits_TE, mask_T).float()
    threshold_T1 = noisy_TE.topk(top_k, dim=-1).values[:, -1:]
    load_TE = torch.special.ndtr((logits_TE - threshold_T1) / noise_std)
    return _squared_variation(mean(load_TE))


def local_entropy_loss(
    router_logits_TE: Tensor, mask_T: Tensor | None = None, mean: TokenMean = mean_of_process
) -> Tensor:
    """Mean entropy (nats) of the tokens' gates: makes each token's routing confident (Mustafa et al. 2022, LIMoE).

    Args:
        router_logits_TE: float[T, E]. Logits and not gates, because log softmax is exact where a gate underflows.
        mask_T: bool[T].
        mean: over tokens.

    Raises:
        ValueError: if there is no valid token.
    """
    log_gates_TE = _valid(router_logits_TE, mask_T).float().log_softmax(dim=-1)
    return -mean((log_gates_TE.exp() * log_gates_TE).sum(dim=-1))


def global_entropy_loss(
    gates_TE: Tensor,
    mask_T: Tensor | None = None,
    mean: TokenMean = mean_of_process,
    *,
    min_experts: float | None = None,
) -> Tensor:
    """Thresholded negative entropy (nats) of the mean gate, max(0, log S - H(mean_t p_t)) (LIMoE).

    Args:
        gates_TE: float[T, E], rows sum to 1.
        mask_T: bool[T].
        mean: over tokens.
        min_experts: S, a soft minimum of the experts in use, in [1, E]; None = E.

    Returns:
        float32 scalar; 0, with zero gradient, as soon as S experts are used evenly.

    Raises:
        ValueError: if there is no valid token, or S is out of range.
    """
    num_experts = gates_TE.shape[-1]
    if min_experts is not None and not 1 <= min_experts <= num_experts:
        raise ValueError(f"min_experts must be in [1, {num_experts}], but got {min_experts}")
    entropy = torch.special.entr(mean(_valid(gates_TE, mask_T).float())).sum()
    return (math.log(num_experts if min_experts is None else min_experts) - entropy).clamp_min(0.0)


@dataclass(frozen=True, kw_only=True)
class AuxLossWeights:
    """Coefficients of the router losses of one MoE block; a loss with coefficient 0 is not computed."""

    load_balance: float = 0.0
    """Switch load-balancing loss."""
    balance_top_k: bool = False
    """Count all K choices (the official CLIP-MoE code; K when balanced) instead of the first (the papers; 1)."""
    z: float = 0.0
    """Router z-loss."""
    importance: float = 0.0
    """V-MoE's importance loss."""
    load: float = 0.0
    """V-MoE's load loss; only in force where noise was drawn, that is in training."""
    local_entropy: float = 0.0
    """LIMoE's local entropy loss."""
    global_entropy: float = 0.0
    """LIMoE's global entropy loss."""
    global_entropy_min_experts: float | None = None
    """Its soft minimum S of experts in use (tau = log S); None = all."""

    def any(self) -> bool:
        """Whether any loss has a coefficient."""
        return any((self.load_balance, self.z, self.importance, self.load, self.local_entropy, self.global_entropy))


def aux_loss(
    router_logits_TE: Tensor,
    noisy_logits_TE: Tensor | None,
    mask_T: Tensor | None,
    *,
    top_k: int,
    noise_std: float,
    weights: AuxLossWeights,
    scoring_func: str = "softmax",
    mean: TokenMean = mean_of_process,
) -> Tensor:
    """Weighted sum of the router losses of one MoE block.

    Args:
        router_logits_TE: float[T, E], noise-free.
        noisy_logits_TE: float[T, E], the logits that chose the experts; None where no noise was drawn.
        mask_T: bool[T].
        top_k: K.
        noise_std: sigma of the noise, as added to the logits.
        weights: the coefficients.
        scoring_func: of the router. With "sigmoid" the gates of all losses are the scores divided by their sum
            (DeepSeek-V3, eq. 19).
        mean: over tokens.
    """
    logits_TE = _valid(router_logits_TE, mask_T).float()
    logits_TE = share_logits(logits_TE, scoring_func)
    noisy_TE = None if noisy_logits_TE is None else _valid(noisy_logits_TE, mask_T).float()
    gates_TE = logits_TE.softmax(dim=-1)
    terms = [logits_TE.new_zeros(())]
    if weights.load_balance:
        choices = top_k if weights.balance_top_k else 1
        experts_TK = (logits_TE if noisy_TE is None else noisy_TE).topk(choices, dim=-1).indices
        terms.append(weights.load_balance * load_balance_loss(gates_TE, experts_TK, mean=mean))
    if weights.z:
        terms.append(weights.z * router_z_loss(logits_TE, mean=mean))
    if weights.importance:
        terms.append(weights.importance * importance_loss(gates_TE, mean=mean))
    if weights.load and noisy_TE is not None:
        terms.append(weights.load * load_loss(logits_TE, noisy_TE, top_k, noise_std, mean=mean))
    if weights.local_entropy:
        terms.append(weights.local_entropy * local_entropy_loss(logits_TE, mean=mean))
    if weights.global_entropy:
        entropy = global_entropy_loss(gates_TE, mean=mean, min_experts=weights.global_entropy_min_experts)
        terms.append(weights.global_entropy * entropy)
    return torch.stack(terms).sum()


def share_logits(logits_TE: Tensor, scoring_func: str) -> Tensor:
    """Logits in the order of the router's, whose softmax is the experts' scores as shares of their sum."""
    return torch.nn.functional.logsigmoid(logits_TE) if scoring_func == "sigmoid" else logits_TE


def _valid(rows_TX: Tensor, mask_T: Tensor | None) -> Tensor:
    """The rows that are not padding; at least one."""
    rows_TX = rows_TX if mask_T is None else rows_TX[mask_T]
    if rows_TX.shape[0] == 0:
        raise ValueError("router losses are means over tokens, but got no valid token; check the attention mask")
    return rows_TX


def _squared_variation(x_E: Tensor) -> Tensor:
    """(population standard deviation / mean)^2."""
    return x_E.var(correction=0) / x_E.mean().square()
