"""Expert kernels, ignorant of routing and of images: `grouped_mlp` on sorted rows, `routed_mlp` on a layer's tokens.

Arguments are checked and a backend is picked here, once; see `pick_backend`. All backends compute what
`vision_moe.kernels.reference` says.

T tokens, D model dim, F hidden dim, E experts, K experts per token, N = T * K slots.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from vision_moe.kernels import grouped, op, reference
from vision_moe.kernels.activation import FUSED
from vision_moe.kernels.problem import ExpertWeights, expert_order

__all__ = ["BACKENDS", "ExpertWeights", "grouped_mlp", "pick_backend", "routed_mlp"]

BACKENDS = ("auto", "reference", "cpu", "grouped", "triton")


def routed_mlp(
    x_TD: Tensor,
    topk_experts_TK: Tensor,
    topk_gates_TK: Tensor,
    weights: ExpertWeights,
    activation: str = "quick_gelu",
    backend: str = "auto",
) -> Tensor:
    """The gate-weighted sum of the MLPs of each token's experts. Under autocast the products are in autocast's dtype.

    Args:
        x_TD: float[T, D].
        topk_experts_TK: int64[T, K], distinct in each row; a slot of expert E, one past the last, is not computed.
        topk_gates_TK: float[T, K].
        weights: of the E experts; all of one dtype.
        activation: name in transformers' ACT2FN, of a function without parameters.
        backend: one of `BACKENDS`.

    Returns:
        float[T, D], in the dtype of `x_TD`.

    Raises:
        ValueError: where shapes or dtypes do not fit, or an explicit backend cannot run this.
    """
    _check_weights(x_TD, weights)
    E = len(weights.w1_EHD)
    if topk_experts_TK.shape != topk_gates_TK.shape or topk_experts_TK.shape[:1] != x_TD.shape[:1]:
        raise ValueError(
            f"experts and gates must both be [T={len(x_TD)}, K], but got {tuple(topk_experts_TK.shape)} and "
            f"{tuple(topk_gates_TK.shape)}"
        )
    if x_TD.device.type == "cpu" and not torch.compiler.is_compiling() and topk_experts_TK.numel():
        # Elsewhere a look at the values would wait for the device.
        low, high = topk_experts_TK.aminmax()
        if low < 0 or high > E:
            raise ValueError(f"experts must be in [0, {E}], {E} for a slot that is not computed; got {low} to {high}")
    x, cast = _autocast(x_TD, weights)
    backend = pick_backend(x, cast, activation, backend)
    if backend == "reference":
        return reference.routed_mlp(x, topk_experts_TK, topk_gates_TK, cast, activation).to(x_TD.dtype)
    order_N, tokens_per_expert_E = expert_order(topk_experts_TK, E)
    gates_TK = topk_gates_TK.to(torch.promote_types(x.dtype, torch.float32))
    return _run(x, gates_TK, cast, order_N, tokens_per_expert_E, (activation, backend)).to(x_TD.dtype)


def grouped_mlp(
    x_ND: Tensor,
    w1_EFD: Tensor,
    b1_EF: Tensor | None,
    w2_EDF: Tensor,
    b2_ED: Tensor | None,
    tokens_per_expert_E: Tensor,
    activation: str = "quick_gelu",
    backend: str = "auto",
) -> Tensor:
    """Each expert's MLP over its own rows, W2 act(W1 x + b1) + b2.

    Args:
        x_ND: float[N, D], sorted by expert.
        w1_EFD: float[E, F, D]; with 2 F rows the MLP is gated, see `ExpertWeights`.
        b1_EF: float[E, F] (or 2 F), or None.
        w2_EDF: float[E, D, F].
        b2_ED: float[E, D], or None.
        tokens_per_expert_E: int64[E], rows of each expert; those past the last expert's are not computed.
        activation: name in transformers' ACT2FN, of a function without parameters.
        backend: one of `BACKENDS`.

    Returns:
        float[N, D] in the dtype of `x_ND`; 0 in rows that are not computed.

    Raises:
        ValueError: where shapes or dtypes do not fit, or an explicit backend cannot run this.
    """
    weights = ExpertWeights(w1_EFD, b1_EF, w2_EDF, b2_ED)
    _check_weights(x_ND, weights)
    if tokens_per_expert_E.shape != (len(w1_EFD),):
        raise ValueError(f"tokens_per_expert must be [{len(w1_EFD)}], but got {tuple(tokens_per_expert_E.shape)}")
    x, cast = _autocast(x_ND, weights)
    backend = pick_backend(x, cast, activation, backend)
    if backend == "reference":
        return reference.grouped_mlp(x, cast, tokens_per_expert_E, activation).to(x_ND.dtype)
    order_N = torch.arange(len(x), device=x.device)
    return _run(x, None, cast, order_N, tokens_per_expert_E, (activation, backend)).to(x_ND.dtype)


def pick_backend(x: Tensor, weights: ExpertWeights, activation: str, requested: str = "auto") -> str:
    """The backend that runs, by device and dtype.

    Args:
        x: the input, for its device and dtype.
        weights: of the E experts.
        activation: name in transformers' ACT2FN.
        requested: one of `BACKENDS`.

    Raises:
        ValueError: where the requested backend is unknown or cannot run this.
    """
    if requested not in BACKENDS:
        raise ValueError(f"unknown backend {requested!r}; choose one of: {', '.join(BACKENDS)}")
    if requested != "auto":
        obstacle = _obstacle(requested, x, weights, activation)
        if obstacle is not None:
            possible = [name for name in BACKENDS[1:] if _obstacle(name, x, weights, activation) is None]
            raise ValueError(f"backend {requested!r} cannot run this: {obstacle}; possible are: {', '.join(possible)}")
        return requested
    preferred = {"cpu": ["cpu"], "cuda": ["triton", "grouped"]}.get(x.device.type, [])
    if x.dtype == torch.float32:
        # On an H100 a loop over cuBLAS beats Triton's products of float32, and nothing beats those of 16 bits.
        preferred.reverse()
    return next((name for name in preferred if _obstacle(name, x, weights, activation) is None), "reference")


def _obstacle(backend: str, x: Tensor, weights: ExpertWeights, activation: str) -> str | None:
    """Why the backend cannot run this, or None."""
    if backend == "reference":
        return None
    if activation not in FUSED:
        return f"it knows the activations {', '.join(FUSED)}, not {activation!r}"
    if backend == "cpu":
        return None if x.device.type == "cpu" else f"the input is on {x.device}"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32, float16 and bfloat16, not {x.dtype}"
    if backend == "grouped":
        return None if grouped.is_aligned(weights) else "D and F must be multiples of 16 bytes"
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the input is on {x.device}"
    return "triton is not installed" if find_spec("triton") is None else None


def _check_weights(x: Tensor, weights: ExpertWeights) -> None:
    w1_EHD = weights.w1_EHD
    E, H, D, F_ = len(w1_EHD), w1_EHD.shape[1], x.shape[-1], weights.w2_EDF.shape[-1]
    expected = ((E, H, D), (E, H), (E, D, F_), (E, D))
    found = tuple(None if weight is None else tuple(weight.shape) for weight in weights)
    if x.dim() != 2 or H not in (F_, 2 * F_) or any(a not in (None, b) for a, b in zip(found, expected, strict=True)):
        raise ValueError(
            "the experts take x [T, D], w1 [E, F, D] (or [E, 2 F, D], gated), b1 [E, F] (or [E, 2 F]), w2 [E, D, F], "
            f"b2 [E, D], but got x {tuple(x.shape)} and {', '.join(str(shape) for shape in found)}"
        )
    tensors = [weight for weight in weights if weight is not None]
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 or not w1_EHD.is_floating_point() or {tensor.device for tensor in tensors} != {x.device}:
        raise ValueError(
            "the experts' weights must have one float dtype and be where x is, but got "
            f"{', '.join(f'{tensor.dtype} on {tensor.device}' for tensor in tensors)} and x on {x.device}"
        )
    if x.dtype != w1_EHD.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"x is {x.dtype} and the experts are {w1_EHD.dtype}; cast one of them, or use torch.autocast")


def _autocast(x: Tensor, weights: ExpertWeights) -> tuple[Tensor, ExpertWeights]:
    """What `torch.nn.functional.linear` would cast under autocast, which the operator does not see."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weights
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weights.to(dtype)


def _run(
    x: Tensor,
    gates: Tensor | None,
    weights: ExpertWeights,
    order_N: Tensor,
    tokens_per_expert_E: Tensor,
    names: tuple[str, str],
) -> Tensor:
    # ZeRO's and safetensors' views are contiguous; a transposed checkpoint is not, and is copied once per call.
    weights = ExpertWeights(*(None if weight is None else weight.contiguous() for weight in weights))
    tensors = (x, gates, *weights)
    save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    y, _ = op.routed_mlp(x.contiguous(), gates, *weights, order_N, tokens_per_expert_E, *names, save)
    return y
