"""Loss-free balancing: steps of the routers' choice bias, from the experts' counts.

E experts.
"""

import torch
from torch import Tensor


def bias_step(tokens_per_expert_E: Tensor, rate: float, form: str) -> Tensor:
    """What one optimizer step adds to the choice bias; rows of a matrix are routers of their own.

    "sign": rate * sign(mean - count) (Wang et al. 2024, algorithm 1). "z_score": rate * (mean - count) / std, with the
    population standard deviation over experts (MoE-ViE, 2026).

    Args:
        tokens_per_expert_E: int64[E] or int64[L, E], of the whole global batch.
        rate: size of the step.
        form: "sign" or "z_score".

    Returns:
        float32, as the counts; 0 where they are all equal.

    Raises:
        ValueError: if the form is unknown.
    """
    # float64: counts beyond 2^24 lose their last digits in float32.
    counts_E = tokens_per_expert_E.double()
    lack_E = counts_E.mean(dim=-1, keepdim=True) - counts_E
    if form == "sign":
        step_E = lack_E.sign()
    elif form == "z_score":
        std_1 = lack_E.square().mean(dim=-1, keepdim=True).sqrt()
        step_E = torch.where(std_1 > 0, lack_E / std_1, torch.zeros_like(lack_E))
    else:
        raise ValueError(f"the form of the bias step must be 'sign' or 'z_score', but got {form!r}")
    return (rate * step_E).float()
