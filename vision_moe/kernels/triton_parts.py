"""What the Triton kernels share, and the kernel that finds their tiles."""

import triton
import triton.language as tl


@triton.jit
def activate(h, FUNCTION: tl.constexpr):
    """The activation of float32 values."""
    if FUNCTION == "quick_gelu":
        return h * tl.sigmoid(1.702 * h)
    elif FUNCTION == "silu":
        return h * tl.sigmoid(h)
    elif FUNCTION == "gelu":
        return 0.5 * h * (1 + tl.erf(h * 0.7071067811865476))
    elif FUNCTION == "gelu_tanh":
        # tanh(z) = 2 sigmoid(2 z) - 1.
        return h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    else:
        return tl.maximum(h, 0.0)


@triton.jit
def slope(h, FUNCTION: tl.constexpr):
    """Derivative of the activation."""
    if FUNCTION == "quick_gelu":
        s = tl.sigmoid(1.702 * h)
        return s + 1.702 * h * s * (1 - s)
    elif FUNCTION == "silu":
        s = tl.sigmoid(h)
        return s + h * s * (1 - s)
    elif FUNCTION == "gelu":
        return 0.5 * (1 + tl.erf(h * 0.7071067811865476)) + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    elif FUNCTION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
        return s + h * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * h * h)
    else:
        return tl.where(h > 0, 1.0, 0.0)


@triton.jit
def token(slot, TOP_K: tl.constexpr, INDEX: tl.constexpr):
    """The slot's token. In a loop, a division of 64-bit numbers would take longer than the loop's product."""
    return (slot.to(tl.int32) // TOP_K).to(INDEX)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a b. UPCAST serves the interpreter, whose products of bfloat16 are wrong."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def halves(acc):
    """The left and the right half of a tile's columns: what comes after the product then needs half the registers."""
    M: tl.constexpr = acc.shape[0]
    N: tl.constexpr = acc.shape[1]
    return tl.split(tl.permute(tl.reshape(acc, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def tile_kernel(
    counts_E, tile_expert, tile_start, tile_end, E, N, num_tiles,
    ROWS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Cuts each expert's rows, and as the last group those that are not computed, into tiles of at most ROWS rows."""
    group = tl.arange(0, BLOCK_G)
    counts = tl.load(counts_E + group, mask=group < E, other=0)
    counts = tl.where(group == E, N - tl.sum(counts), counts)
    ends = tl.cumsum(counts)
    tiles = (counts + ROWS - 1) // ROWS
    last = tl.cumsum(tiles)
    tile = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    # One group, or none where there are more tiles than needed.
    mine = (tile[:, None] >= (last - tiles)[None, :]) & (tile[:, None] < last[None, :])
    first = (ends - counts - ROWS * (last - tiles))[None, :] + ROWS * tile[:, None]
    ok = tile < num_tiles
    tl.store(tile_start + tile, tl.sum(tl.where(mine, first, 0), axis=1), mask=ok)
    tl.store(tile_end + tile, tl.sum(tl.where(mine, ends[None, :], 0), axis=1), mask=ok)
    expert = tl.sum(tl.where(mine & (group < E)[None, :], group[None, :] + 1, 0), axis=1) - 1
    tl.store(tile_expert + tile, expert, mask=ok)
