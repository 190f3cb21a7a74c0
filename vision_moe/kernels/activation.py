"""Activations that the kernels know in both directions. n rows, F hidden dim; H = F, or 2 F where the MLP is gated.

Any other name of transformers' ACT2FN runs on the reference.
"""

import torch
from torch import Tensor
from torch.nn import functional

# Name in ACT2FN -> the function that the kernels compute; several names may mean one function.
FUSED = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
# QuickGELU(h) = silu(1.702 h) / 1.702 (Hendrycks & Gimpel 2016, section 2).
QUICK_GELU_SCALE = 1.702


def activate(h_nF: Tensor, function: str) -> Tensor:
    """The activation.

    Args:
        h_nF: float[n, F].
        function: a value of `FUSED`.
    """
    match function:
        case "quick_gelu":
            return functional.silu(h_nF * QUICK_GELU_SCALE).mul_(1 / QUICK_GELU_SCALE)
        case "gelu":
            return functional.gelu(h_nF)
        case "gelu_tanh":
            return functional.gelu(h_nF, approximate="tanh")
        case "silu":
            return functional.silu(h_nF)
        case "relu":
            return h_nF.relu()
    raise AssertionError(function)


def activation_gradient(grad_nF: Tensor, h_nF: Tensor, function: str) -> Tensor:
    """Gradient at the pre-activation.

    Args:
        grad_nF: float[n, F], gradient at the activation's output.
        h_nF: float[n, F], pre-activation.
        function: a value of `FUSED`.
    """
    match function:
        case "quick_gelu":
            return torch.ops.aten.silu_backward(grad_nF, h_nF * QUICK_GELU_SCALE)
        case "gelu":
            return torch.ops.aten.gelu_backward(grad_nF, h_nF)
        case "gelu_tanh":
            return torch.ops.aten.gelu_backward(grad_nF, h_nF, approximate="tanh")
        case "silu":
            return torch.ops.aten.silu_backward(grad_nF, h_nF)
        case "relu":
            return torch.ops.aten.threshold_backward(grad_nF, h_nF, 0)
    raise AssertionError(function)


def mlp_activation(h_nH: Tensor, function: str, *, gated: bool) -> Tensor:
    """Hidden state float[n, F] from the pre-activation."""
    if not gated:
        return activate(h_nH, function)
    gate_nF, up_nF = h_nH.chunk(2, dim=-1)
    return activate(gate_nF, function).mul_(up_nF)


def mlp_activation_gradient(grad_nF: Tensor, h_nH: Tensor, function: str, *, gated: bool) -> Tensor:
    """Gradient float[n, H] at the pre-activation from that at the hidden state."""
    if not gated:
        return activation_gradient(grad_nF, h_nH, function)
    gate_nF, up_nF = h_nH.chunk(2, dim=-1)
    through_gate_nF = activation_gradient(grad_nF * up_nF, gate_nF, function)
    return torch.cat([through_gate_nF, activate(gate_nF, function).mul_(grad_nF)], dim=-1)
