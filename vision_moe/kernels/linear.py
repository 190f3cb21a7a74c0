"""nn.Linear that takes the faster of torch's and oneDNN's products on CPU: the dense layers beside the experts.

n rows, I input dim, O output dim.
"""

from typing import Any

import torch
from torch import Tensor, library, nn

from vision_moe.kernels import gemm
from vision_moe.kernels.gemm_choice import Product


@library.custom_op("vision_moe::linear", mutates_args=())
def _linear(x_nI: Tensor, w_OI: Tensor, b_O: Tensor | None) -> Tensor:
    return gemm.linear(x_nI, w_OI, b_O)


@_linear.register_fake
def _(x_nI: Tensor, w_OI: Tensor, b_O: Tensor | None) -> Tensor:
    return x_nI.new_empty(x_nI.shape[0], w_OI.shape[0])


@library.custom_op("vision_moe::linear_backward", mutates_args=())
def _linear_backward(
    x_nI: Tensor, w_OI: Tensor, grad_nO: Tensor, input_needed: bool, weight_needed: bool
) -> tuple[Tensor, Tensor]:
    dx_nI = gemm.input_gradient(grad_nO, w_OI) if input_needed else grad_nO.new_empty(0)
    dw_OI = grad_nO.new_empty(w_OI.shape if weight_needed else (0,))
    if weight_needed:
        gemm.weight_gradient(grad_nO, x_nI, dw_OI)
    return dx_nI, dw_OI


@_linear_backward.register_fake
def _(x_nI: Tensor, w_OI: Tensor, grad_nO: Tensor, input_needed: bool, weight_needed: bool) -> tuple[Tensor, Tensor]:
    n, (O, I) = len(grad_nO), w_OI.shape  # noqa: E741
    return grad_nO.new_empty((n, I) if input_needed else (0,)), grad_nO.new_empty((O, I) if weight_needed else (0,))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x_nI, w_OI, _ = inputs
    ctx.save_for_backward(x_nI if ctx.needs_input_grad[1] else x_nI.new_empty(0, x_nI.shape[1]), w_OI)


def _backward(ctx: Any, grad_nO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x_nI, w_OI = ctx.saved_tensors
    input_needed, weight_needed, bias_needed = ctx.needs_input_grad
    dx_nI, dw_OI = None, None
    if input_needed or weight_needed:
        dx_nI, dw_OI = _linear_backward(x_nI, w_OI, grad_nO.contiguous(), input_needed, weight_needed)
    return (
        dx_nI if input_needed else None,
        dw_OI if weight_needed else None,
        grad_nO.sum(dim=0) if bias_needed else None,
    )


_linear.register_autograd(_backward, setup_context=_setup_context)


def linear(x_XI: Tensor, w_OI: Tensor, b_O: Tensor | None) -> Tensor:
    """x W^T + b; large float32 products on CPU run on what a measurement picked.

    Under autocast, on other devices and in other dtypes it is torch's: there torch takes the fast road itself.

    Args:
        x_XI: float[..., I].
        w_OI: float[O, I].
        b_O: float[O], or None.
    """
    fits = x_XI.device.type == "cpu" and x_XI.dtype == w_OI.dtype == torch.float32
    if not fits or torch.is_autocast_enabled("cpu") or x_XI.numel() * len(w_OI) < gemm.MIN_WORK:
        return nn.functional.linear(x_XI, w_OI, b_O)
    if not torch.compiler.is_compiling() and not gemm.onednn_wins(torch.float32, Product.FORWARD):
        return nn.functional.linear(x_XI, w_OI, b_O)
    return _linear(x_XI.reshape(-1, x_XI.shape[-1]), w_OI, b_O).unflatten(0, x_XI.shape[:-1])


class Linear(nn.Linear):
    """nn.Linear, its parameters and their names, with the products of `linear`."""

    @classmethod
    def replacing(cls, layer: nn.Linear) -> "Linear":
        """The same layer, with the parameters of the given one."""
        fast = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        fast.weight, fast.bias = layer.weight, layer.bias
        return fast

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # nn.Linear's name
        """Maps float[..., I] to float[..., O]."""
        return linear(input, self.weight, self.bias)


def replace_linears(block: nn.Module) -> None:
    """Puts `Linear` in the place of every nn.Linear in a block, with the same parameters; subclasses stay."""
    for module in list(block.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, Linear.replacing(child))
