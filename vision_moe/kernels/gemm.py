"""Matrix products on CPU: torch's linear, or oneDNN's where a short measurement finds it faster.

torch gives float32 products to MKL, which keeps to narrower vector instructions on some CPUs; oneDNN's linear takes the
widest that there are. Which of the two wins is measured, for each kind of product, and never guessed from a vendor.
`torch.backends.mkldnn.flags(enabled=False)` keeps to torch's.

n rows, I input dim, O output dim.
"""

import time
from collections.abc import Callable
from enum import Enum
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from vision_moe.kernels.activation import activate

# oneDNN's post-operations that are exactly our functions.
_POST_OPS = {"silu": ("swish", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}
# Below this many multiply-adds a call's overhead decides, and the plain road has less.
MIN_WORK = 2**24
# oneDNN must win by so much: the choice should not hang on noise.
_MARGIN = 0.9


class Product(Enum):
    """The kinds of product of a linear layer; they differ in which operand is a transposed view."""

    FORWARD = "forward"
    ACTIVATED = "forward and activation"
    INPUT_GRADIENT = "input gradient"
    WEIGHT_GRADIENT = "weight gradient"


def linear(x_nI: Tensor, w_OI: Tensor, b_O: Tensor | None = None, product: Product = Product.FORWARD) -> Tensor:
    """x W^T + b; transposed views are taken as they are.

    Args:
        x_nI: float[n, I].
        w_OI: float[O, I].
        b_O: float[O].
        product: what the product is for.
    """
    if _use_onednn(x_nI, w_OI, product):
        return _onednn_linear(x_nI, w_OI, b_O, "none", "")
    return functional.linear(x_nI, w_OI, b_O)


def activated_linear(x_nI: Tensor, w_OI: Tensor, b_O: Tensor | None, function: str) -> Tensor:
    """act(x W^T + b), in one pass where that wins.

    Args:
        x_nI: float[n, I].
        w_OI: float[O, I].
        b_O: float[O].
        function: a value of `vision_moe.kernels.activation.FUSED`.
    """
    if function in _POST_OPS and _use_onednn(x_nI, w_OI, Product.ACTIVATED):
        return _onednn_linear(x_nI, w_OI, b_O, *_POST_OPS[function])
    return activate(linear(x_nI, w_OI, b_O), function)


def input_gradient(grad_nO: Tensor, w_OI: Tensor) -> Tensor:
    """dX = dY W, float[n, I]."""
    return linear(grad_nO, w_OI.t(), product=Product.INPUT_GRADIENT)


def weight_gradient(grad_nO: Tensor, x_nI: Tensor, out_OI: Tensor) -> None:
    """dW = dY^T X, written to float[O, I]: a stack's gradient is made in place, where torch's product can."""
    if _use_onednn(grad_nO.t(), x_nI.t(), Product.WEIGHT_GRADIENT):
        out_OI.copy_(_onednn_linear(grad_nO.t(), x_nI.t(), None, "none", ""))
    else:
        torch.mm(grad_nO.t(), x_nI, out=out_OI)


def linear_into(x_nI: Tensor, w_OI: Tensor, b_O: Tensor | None, out_nO: Tensor) -> None:
    """x W^T + b, written to float[n, O]."""
    if _use_onednn(x_nI, w_OI, Product.FORWARD):
        out_nO.copy_(_onednn_linear(x_nI, w_OI, b_O, "none", ""))
    elif b_O is None:
        torch.mm(x_nI, w_OI.t(), out=out_nO)
    else:
        torch.addmm(b_O, x_nI, w_OI.t(), out=out_nO)


def onednn_wins(dtype: torch.dtype, product: Product) -> bool:
    """Whether oneDNN's linear is the faster one here, measured once per process, dtype, product and number of threads.

    Args:
        dtype: of the operands.
        product: the kind of product.
    """
    return _onednn_wins(dtype, product, torch.get_num_threads())


def _use_onednn(x_nI: Tensor, w_OI: Tensor, product: Product) -> bool:
    return (
        x_nI.device.type == "cpu"
        and torch.backends.mkldnn.enabled
        and x_nI.shape[0] * w_OI.numel() >= MIN_WORK
        and onednn_wins(x_nI.dtype, product)
    )


def _onednn_linear(x_nI: Tensor, w_OI: Tensor, b_O: Tensor | None, post_op: str, algorithm: str) -> Tensor:
    # The operator that torch's compiler emits. It is private, so it is used only where `onednn_works`.
    return torch.ops.mkldnn._linear_pointwise(x_nI, w_OI, b_O, post_op, [], algorithm)


@lru_cache
def onednn_works(dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN's linear for the dtype, and it computes what we take it to compute.

    Args:
        dtype: of the operands.
    """
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    x_nI, w_OI = _operands(5, 8, 12, dtype)
    grad_nO, b_O = functional.linear(x_nI, w_OI), w_OI[:, 0].contiguous()
    try:
        with torch.no_grad():
            results = [
                (_onednn_linear(x_nI, w_OI, b_O, *post_op), activate(functional.linear(x_nI, w_OI, b_O), function))
                for function, post_op in _POST_OPS.items()
            ]
            results.append((_onednn_linear(grad_nO, w_OI.t(), None, "none", ""), grad_nO @ w_OI))
            results.append((_onednn_linear(grad_nO.t(), x_nI.t(), None, "none", ""), grad_nO.t() @ x_nI))
    except (AttributeError, RuntimeError):
        # No such operator, other arguments, or a CPU that cannot.
        return False
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    return all((mine - truth).float().norm() <= bound * truth.float().norm() for mine, truth in results)


@lru_cache
def _onednn_wins(dtype: torch.dtype, product: Product, threads: int) -> bool:
    if not onednn_works(dtype):
        return False
    run_onednn, run_torch = _contenders(dtype, product)
    with torch.no_grad():
        seconds = [(_seconds(run_onednn), _seconds(run_torch)) for _ in range(6)]
    # The first round warms up. The best and not the mean: disturbances only ever add time.
    onednn, plain = (min(times) for times in zip(*seconds[1:], strict=True))
    return onednn < _MARGIN * plain


def _contenders(dtype: torch.dtype, product: Product) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The same product by oneDNN and by torch."""
    x_nI, w_OI = _operands(256, 512, 1024, dtype)
    grad_nO, out_OI = torch.ones(256, 1024, dtype=dtype), torch.empty_like(w_OI)
    match product:
        case Product.FORWARD:
            return (
                lambda: _onednn_linear(x_nI, w_OI, None, "none", ""),
                lambda: functional.linear(x_nI, w_OI),
            )
        case Product.ACTIVATED:
            return (
                lambda: _onednn_linear(x_nI, w_OI, None, *_POST_OPS["silu"]),
                lambda: activate(functional.linear(x_nI, w_OI), "silu"),
            )
        case Product.INPUT_GRADIENT:
            return lambda: _onednn_linear(grad_nO, w_OI.t(), None, "none", ""), lambda: grad_nO @ w_OI
        case Product.WEIGHT_GRADIENT:
            return (
                lambda: out_OI.copy_(_onednn_linear(grad_nO.t(), x_nI.t(), None, "none", "")),
                lambda: torch.mm(grad_nO.t(), x_nI, out=out_OI),
            )


def _operands(rows: int, input_dim: int, output_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # A generator of its own: a measurement must not move the user's random state.
    generator = torch.Generator().manual_seed(0)
    x_nI = torch.randn(rows, input_dim, generator=generator)
    return x_nI.to(dtype), (torch.randn(output_dim, input_dim, generator=generator) * input_dim**-0.5).to(dtype)


def _seconds(function: Callable[[], Tensor]) -> float:
    # Of the CPU and not of the clock, which also counts the time that other programs took.
    start = time.process_time()
    function()
    return time.process_time() - start
