"""Which of torch's and oneDNN's products on CPU is taken: the faster one, measured, or an earlier process's choice.

Both compute the same, but for the last bits. So a run that must give the same bits when it goes on keeps its choice:
see `using` and `vision_moe.run_folder.same_products`.

n rows, I input dim, O output dim.
"""

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from vision_moe.kernels.activation import activate

logger = logging.getLogger(__name__)

# oneDNN's post-operations that are exactly our functions.
POST_OPS = {"silu": ("swish", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}
# oneDNN must win by so much.
_MARGIN = 0.95
_DTYPES = (torch.float32, torch.bfloat16)
# The choice inside `using`, by `_key`.
_CHOICE: ContextVar[Mapping[str, bool] | None] = ContextVar("choice", default=None)


class Product(Enum):
    """The kinds of product of a linear layer; they differ in which operand is a transposed view."""

    FORWARD = "forward"
    ACTIVATED = "forward and activation"
    INPUT_GRADIENT = "input gradient"
    WEIGHT_GRADIENT = "weight gradient"


def onednn_wins(dtype: torch.dtype, product: Product) -> bool:
    """Whether oneDNN's linear is taken: inside `using` as its choice says, else where it is faster here.

    Measured once per process, dtype, product and number of threads.

    Args:
        dtype: of the operands.
        product: the kind of product.
    """
    choice = _CHOICE.get()
    if choice is not None:
        return choice.get(_key(dtype, product), False)
    return _onednn_wins(dtype, product, torch.get_num_threads())


def measured() -> dict[str, bool]:
    """The choice for every dtype and product on this machine, for `using`."""
    return {_key(dtype, product): onednn_wins(dtype, product) for dtype in _DTYPES for product in Product}


@contextmanager
def using(choice: Mapping[str, bool]) -> Iterator[None]:
    """Takes products in the block by this choice, and not by a measurement.

    Args:
        choice: what `measured` returned, here or elsewhere; what this torch lacks is warned of and not taken.
    """
    lacking = [
        name
        for dtype in _DTYPES
        for product in Product
        if choice.get(name := _key(dtype, product)) and not onednn_works(dtype)
    ]
    if lacking:
        logger.warning(
            "the choice takes oneDNN for %s, which this torch or CPU lacks; results will differ in their last bits",
            ", ".join(lacking),
        )
    token = _CHOICE.set({name: wins for name, wins in choice.items() if name not in lacking})
    try:
        yield
    finally:
        _CHOICE.reset(token)


def _key(dtype: torch.dtype, product: Product) -> str:
    return f"{str(dtype).removeprefix('torch.')} {product.value}"


def onednn_linear(x_nI: Tensor, w_OI: Tensor, b_O: Tensor | None, post_op: str, algorithm: str) -> Tensor:
    """oneDNN's x W^T + b and a post-operation; only where `onednn_works`."""
    # The private operator that torch's compiler emits.
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
                (onednn_linear(x_nI, w_OI, b_O, *post_op), activate(functional.linear(x_nI, w_OI, b_O), function))
                for function, post_op in POST_OPS.items()
            ]
            results.append((onednn_linear(grad_nO, w_OI.t(), None, "none", ""), grad_nO @ w_OI))
            results.append((onednn_linear(grad_nO.t(), x_nI.t(), None, "none", ""), grad_nO.t() @ x_nI))
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
    # The first round warms up. A ratio of each round: what disturbs it disturbs both.
    return statistics.median(onednn / plain for onednn, plain in seconds[1:]) < _MARGIN


def _contenders(dtype: torch.dtype, product: Product) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The same product by oneDNN and by torch."""
    x_nI, w_OI = _operands(256, 768, 1536, dtype)
    grad_nO, out_OI = torch.ones(256, 1536, dtype=dtype), torch.empty_like(w_OI)
    match product:
        case Product.FORWARD:
            return (
                lambda: onednn_linear(x_nI, w_OI, None, "none", ""),
                lambda: functional.linear(x_nI, w_OI),
            )
        case Product.ACTIVATED:
            return (
                lambda: onednn_linear(x_nI, w_OI, None, *POST_OPS["silu"]),
                lambda: activate(functional.linear(x_nI, w_OI), "silu"),
            )
        case Product.INPUT_GRADIENT:
            return lambda: onednn_linear(grad_nO, w_OI.t(), None, "none", ""), lambda: grad_nO @ w_OI
        case Product.WEIGHT_GRADIENT:
            return (
                lambda: out_OI.copy_(onednn_linear(grad_nO.t(), x_nI.t(), None, "none", "")),
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
