"""The Triton kernels of `vision_moe.kernels.triton`: products over rows sorted by expert, on tiles of one expert each.

N slots sorted by expert, D model dim, F hidden dim, H = F or 2 F where the MLP is gated. A slot is t * K + k. Every
program works on at most BLOCK_M rows of one expert, which `tile_expert` and `tile_start` name; a tile of expert -1 has
none.

UPCAST serves the interpreter, whose bfloat16 products are wrong: operands become float32 before a product.
"""

import triton
import triton.language as tl


@triton.jit
def _activate(h, FUNCTION: tl.constexpr):
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
def _slope(h, FUNCTION: tl.constexpr):
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
def _dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def up_kernel(
    x_TD, w1_EHD, b1_EH, h_NH, a_NF, order_N, tile_expert, tile_start, ends_E,
    D, F, top_k, stride_xt, stride_xd,
    HAS_BIAS: tl.constexpr, GATED: tl.constexpr, SAVE: tl.constexpr, FUNCTION: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h = x W1^T + b1 of gathered rows, and the hidden state act(h), or act(g) * u where gated."""
    expert = tl.load(tile_expert + tl.program_id(1))
    if expert < 0:
        return
    # int64 only in scalars: offsets within a tile are small, and wide ones would cost registers.
    first = tl.load(tile_start + tl.program_id(1))
    rows = tl.arange(0, BLOCK_M)
    row_ok = rows < (tl.load(ends_E + expert) - first)
    token = tl.load(order_N + first + rows, mask=row_ok, other=0) // top_k
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_ok = cols < F
    H = 2 * F if GATED else F
    weights = w1_EHD + expert.to(tl.int64) * H * D
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_ok = k < D
        x = tl.load(
            x_TD + token[:, None] * stride_xt + k[None, :] * stride_xd, mask=row_ok[:, None] & k_ok[None, :], other=0.0
        )
        w_ok = k_ok[:, None] & col_ok[None, :]
        w = tl.load(weights + cols[None, :] * D + k[:, None], mask=w_ok, other=0.0)
        acc = _dot(x, w, acc, PRECISION, UPCAST)
        if GATED:
            w_up = tl.load(weights + (F + cols[None, :]) * D + k[:, None], mask=w_ok, other=0.0)
            acc_up = _dot(x, w_up, acc_up, PRECISION, UPCAST)
    if HAS_BIAS:
        acc += tl.load(b1_EH + expert * H + cols, mask=col_ok, other=0.0).to(tl.float32)[None, :]
        if GATED:
            acc_up += tl.load(b1_EH + expert * H + F + cols, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    ok = row_ok[:, None] & col_ok[None, :]
    if SAVE:
        h_tile = h_NH + first * H + rows[:, None] * H + cols[None, :]
        tl.store(h_tile, acc.to(h_NH.dtype.element_ty), mask=ok)
        if GATED:
            tl.store(h_tile + F, acc_up.to(h_NH.dtype.element_ty), mask=ok)
    hidden = _activate(acc, FUNCTION)
    if GATED:
        hidden *= acc_up
    tl.store(a_NF + first * F + rows[:, None] * F + cols[None, :], hidden.to(a_NF.dtype.element_ty), mask=ok)


@triton.jit
def down_kernel(
    a_NX, w_EXY, b_EY, gates_S, out_SY, order_N, tile_expert, tile_start, ends_E,
    X, Y, stride_wx, stride_wy,
    HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """gate * (a W + b), stored at the row's slot: nothing is added across programs: same bits each run."""
    expert = tl.load(tile_expert + tl.program_id(1))
    if expert < 0:
        return
    # int64 only in scalars: offsets within a tile are small, and wide ones would cost registers.
    first = tl.load(tile_start + tl.program_id(1))
    rows = tl.arange(0, BLOCK_M)
    row_ok = rows < (tl.load(ends_E + expert) - first)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_ok = cols < Y
    weights = w_EXY + expert.to(tl.int64) * X * Y
    a_rows = a_NX + first * X + rows[:, None] * X
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, X, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_ok = k < X
        a = tl.load(a_rows + k[None, :], mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        w = tl.load(
            weights + k[:, None] * stride_wx + cols[None, :] * stride_wy,
            mask=k_ok[:, None] & col_ok[None, :],
            other=0.0,
        )
        acc = _dot(a, w, acc, PRECISION, UPCAST)
    slot = tl.load(order_N + first + rows, mask=row_ok, other=0)
    if HAS_BIAS:
        acc += tl.load(b_EY + expert * Y + cols, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    if HAS_GATE:
        acc *= tl.load(gates_S + slot, mask=row_ok, other=0.0)[:, None]
    tl.store(out_SY + slot[:, None] * Y + cols[None, :], acc, mask=row_ok[:, None] & col_ok[None, :])


@triton.jit
def hidden_gradient_kernel(
    grad_TD, w2_EDF, gates_S, h_NH, dh_NH, a_NF, dgate_NB, order_N, tile_expert, tile_start, ends_E,
    D, F, top_k, num_blocks,
    HAS_GATE: tl.constexpr, GATED: tl.constexpr, FUNCTION: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dh = gate * (g W2) * act'(h), the hidden state again, and each column block's part of <g W2, act(h)>."""
    expert = tl.load(tile_expert + tl.program_id(1))
    if expert < 0:
        return
    # int64 only in scalars: offsets within a tile are small, and wide ones would cost registers.
    first = tl.load(tile_start + tl.program_id(1))
    rows = tl.arange(0, BLOCK_M)
    row_ok = rows < (tl.load(ends_E + expert) - first)
    slot = tl.load(order_N + first + rows, mask=row_ok, other=0)
    token = slot // top_k
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_ok = cols < F
    H = 2 * F if GATED else F
    weights = w2_EDF + expert.to(tl.int64) * D * F
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_ok = k < D
        g = tl.load(grad_TD + token[:, None] * D + k[None, :], mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        w = tl.load(weights + k[:, None] * F + cols[None, :], mask=k_ok[:, None] & col_ok[None, :], other=0.0)
        acc = _dot(g, w, acc, PRECISION, UPCAST)
    ok = row_ok[:, None] & col_ok[None, :]
    offset = rows[:, None] * H + cols[None, :]
    h = tl.load(h_NH + first * H + offset, mask=ok, other=0.0).to(tl.float32)
    a = _activate(h, FUNCTION)
    gate = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
    if HAS_GATE:
        gate = tl.load(gates_S + slot, mask=row_ok, other=0.0)
    dh = acc * _slope(h, FUNCTION)
    if GATED:
        d_up = gate[:, None] * acc * a
        tl.store(dh_NH + first * H + F + offset, d_up.to(dh_NH.dtype.element_ty), mask=ok)
        up = tl.load(h_NH + first * H + F + offset, mask=ok, other=0.0).to(tl.float32)
        a *= up
        dh *= up
    tl.store(dh_NH + first * H + offset, (gate[:, None] * dh).to(dh_NH.dtype.element_ty), mask=ok)
    tl.store(a_NF + first * F + rows[:, None] * F + cols[None, :], a.to(a_NF.dtype.element_ty), mask=ok)
    if HAS_GATE:
        dgate = tl.sum(tl.where(ok, acc * a, 0.0), axis=1)
        tl.store(dgate_NB + first * num_blocks + rows * num_blocks + tl.program_id(0), dgate, mask=row_ok)


@triton.jit
def weight_gradient_kernel(
    p_NP, q_TQ, gates_S, out_EPQ, sum_EX, order_N, ends_E,
    P, Q, top_k, stride_qt, stride_qq, stride_op, stride_oq,
    HAS_GATE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """p^T q over one expert's rows, q gathered by token and scaled by its gate; SUM "p" or "q": and its row sum."""
    expert = tl.program_id(2)
    start = tl.load(ends_E + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_E + expert)
    p_cols = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    q_cols = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    p_ok, q_ok = p_cols < P, q_cols < Q
    acc = tl.zeros((BLOCK_P, BLOCK_Q), dtype=tl.float32)
    p_sum = tl.zeros((BLOCK_P,), dtype=tl.float32)
    q_sum = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    for first in range(start, end, BLOCK_R):
        rows = tl.arange(0, BLOCK_R)
        row_ok = rows < end - first
        slot = tl.load(order_N + first + rows, mask=row_ok, other=0)
        p = tl.load(
            p_NP + first * P + rows[None, :] * P + p_cols[:, None], mask=p_ok[:, None] & row_ok[None, :], other=0.0
        )
        q = tl.load(
            q_TQ + (slot // top_k)[:, None] * stride_qt + q_cols[None, :] * stride_qq,
            mask=row_ok[:, None] & q_ok[None, :],
            other=0.0,
        )
        if HAS_GATE:
            gate = tl.load(gates_S + slot, mask=row_ok, other=0.0)
            q = (q.to(tl.float32) * gate[:, None]).to(p.dtype)
        acc = _dot(p, q, acc, PRECISION, UPCAST)
        if SUM == "p":
            p_sum += tl.sum(p.to(tl.float32), axis=1)
        if SUM == "q":
            q_sum += tl.sum(q.to(tl.float32), axis=0)
    out = out_EPQ + expert.to(tl.int64) * P * Q
    tl.store(
        out + p_cols[:, None] * stride_op + q_cols[None, :] * stride_oq,
        acc.to(out_EPQ.dtype.element_ty),
        mask=p_ok[:, None] & q_ok[None, :],
    )
    if SUM == "p":  # noqa: SIM102
        if tl.program_id(1) == 0:
            tl.store(sum_EX + expert * P + p_cols, p_sum.to(sum_EX.dtype.element_ty), mask=p_ok)
    if SUM == "q":  # noqa: SIM102
        if tl.program_id(0) == 0:
            tl.store(sum_EX + expert * Q + q_cols, q_sum.to(sum_EX.dtype.element_ty), mask=q_ok)
