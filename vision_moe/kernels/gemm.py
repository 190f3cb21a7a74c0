"""Matrix products on CPU: torch's linear, or oneDNN's where a short measurement finds it faster.

torch gives float32 products to MKL, which keeps to narrower vector instructions on some CPUs; oneDNN's linear takes the
widest that there are. Which of the two wins is measured, for each kind of product, and never guessed from a vendor:
`vision_moe.kernels.gemm_choice`. `torch.backends.mkldnn.flags(enabled=False)` keeps to torch's.

n rows, I input dim, O output dim.
"""

import torch
from torch import Tensor
from torch.nn import functional

from vision_moe.kernels.activation import activate
from vision_moe.kernels.gemm_choice import POST_OPS, Product, onednn_linear, onednn_wins

# Below this many multiply-adds a call's overhead decides, and the plain road has less.
MIN_WORK = 2**24


def linear(x_nI: Tensor, w_OI: Tensor, b_O: Tensor | None = None, product: Product = Product.FORWARD) -> Tensor:
    """x W^T + b; transposed views are taken as they are.

    Args:
        x_nI: float[n, I].
        w_OI: float[O, I].
        b_O: float[O].
        product: what the product is for.
    """
    if _use_onednn(x_nI, w_OI, product):
        return onednn_linear(x_nI, w_OI, b_O, "none", "")
    return functional.linear(x_nI, w_OI, b_O)


def activated_linear(x_nI: Tensor, w_OI: Tensor, b_O: Tensor | None, function: str) -> Tensor:
    """act(x W^T + b), in one pass where that wins.

    Args:
        x_nI: float[n, I].
        w_OI: float[O, I].
        b_O: float[O].
        function: a value of `vision_moe.kernels.activation.FUSED`.
    """
    if function in POST_OPS and _use_onednn(x_nI, w_OI, Product.ACTIVATED):
        return onednn_linear(x_nI, w_OI, b_O, *POST_OPS[function])
    return activate(linear(x_nI, w_OI, b_O), function)


def input_gradient(grad_nO: Tensor, w_OI: Tensor) -> Tensor:
    """dX = dY W, float[n, I]."""
    return linear(grad_nO, w_OI.t(), product=Product.INPUT_GRADIENT)


def weight_gradient(grad_nO: Tensor, x_nI: Tensor, out_OI: Tensor) -> None:
    """dW = dY^T X, written to float[O, I]: a stack's gradient is made in place, where torch's product can."""
    if _use_onednn(grad_nO.t(), x_nI.t(), Product.WEIGHT_GRADIENT):
        out_OI.copy_(onednn_linear(grad_nO.t(), x_nI.t(), None, "none", ""))
    else:
        torch.mm(grad_nO.t(), x_nI, out=out_OI)


def linear_into(x_nI: Tensor, w_OI: Tensor, b_O: Tensor | None, out_nO: Tensor) -> None:
    """x W^T + b, written to float[n, O]."""
    if _use_onednn(x_nI, w_OI, Product.FORWARD):
        out_nO.copy_(onednn_linear(x_nI, w_OI, b_O, "none", ""))
    elif b_O is None:
        torch.mm(x_nI, w_OI.t(), out=out_nO)
    else:
        torch.addmm(b_O, x_nI, w_OI.t(), out=out_nO)


def _use_onednn(x_nI: Tensor, w_OI: Tensor, product: Product) -> bool:
    return (
        x_nI.device.type == "cpu"
        and torch.backends.mkldnn.enabled
        and x_nI.shape[0] * w_OI.numel() >= MIN_WORK
        and onednn_wins(x_nI.dtype, product)
    )
