"""The Triton kernels of `vision_moe.kernels.triton`: products over rows sorted by expert, on tiles of one expert each.

N slots sorted by expert, D model dim, F hidden dim, H = F or 2 F where the MLP is gated. A slot is t * K + k. Every
program works on the rows from `tile_start` to `tile_end`, at most BLOCK_M of them, all of one expert; those of expert
-1 are not computed, or there are none.
"""

import triton
import triton.language as tl

from vision_moe.kernels.triton_parts import activate, dot, halves, slope, token


@triton.jit
def _up_part(
    acc, acc_up, bias, h_rows, a_rows, row_ok, cols, F,
    HAS_BIAS: tl.constexpr, GATED: tl.constexpr, SAVE: tl.constexpr, FUNCTION: tl.constexpr,
):  # fmt: skip
    """Some columns of h and of the hidden state, stored."""
    col_ok = cols < F
    ok = row_ok[:, None] & col_ok[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=col_ok, other=0.0).to(tl.float32)[None, :]
        if GATED:
            acc_up += tl.load(bias + F + cols, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    if SAVE:
        tl.store(h_rows + cols[None, :], acc.to(h_rows.dtype.element_ty), mask=ok)
        if GATED:
            tl.store(h_rows + F + cols[None, :], acc_up.to(h_rows.dtype.element_ty), mask=ok)
    hidden = activate(acc, FUNCTION)
    if GATED:
        hidden *= acc_up
    tl.store(a_rows + cols[None, :], hidden.to(a_rows.dtype.element_ty), mask=ok)


@triton.jit
def up_kernel(
    x_TD, w1_EHD, b1_EH, h_NH, a_NF, order_N, tile_expert, tile_start, tile_end,
    D, F, stride_xt, stride_xd,
    TOP_K: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr, SAVE: tl.constexpr, FUNCTION: tl.constexpr,
    INDEX: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h = x W1^T + b1 of gathered rows, and the hidden state act(h), or act(g) * u where gated."""
    expert = tl.load(tile_expert + tl.program_id(1))
    if expert < 0:
        return
    # int64 only in scalars: offsets within a tile are small, and wide ones would cost registers.
    first = tl.load(tile_start + tl.program_id(1))
    rows = tl.arange(0, BLOCK_M)
    row_ok = rows < tl.load(tile_end + tl.program_id(1)) - first
    slot = tl.load(order_N + first + rows, mask=row_ok, other=0)
    x_rows = x_TD + (token(slot, TOP_K, INDEX) * stride_xt)[:, None]
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_ok = cols < F
    H = 2 * F if GATED else F
    weights = w1_EHD + expert.to(tl.int64) * H * D
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_ok = (k < D) | EVEN
        x = tl.load(x_rows + k[None, :] * stride_xd, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        w_ok = k_ok[:, None] & col_ok[None, :]
        w = tl.load(weights + cols[None, :] * D + k[:, None], mask=w_ok, other=0.0)
        acc = dot(x, w, acc, PRECISION, UPCAST)
        if GATED:
            w_up = tl.load(weights + (F + cols[None, :]) * D + k[:, None], mask=w_ok, other=0.0)
            acc_up = dot(x, w_up, acc_up, PRECISION, UPCAST)
    bias = b1_EH + expert * H if HAS_BIAS else b1_EH
    h_rows, a_rows = h_NH + first * H + rows[:, None] * H, a_NF + first * F + rows[:, None] * F
    left, right = halves(acc)
    left_up, right_up = halves(acc_up)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    _up_part(left, left_up, bias, h_rows, a_rows, row_ok, cols, F, HAS_BIAS, GATED, SAVE, FUNCTION)
    cols += BLOCK_N // 2
    _up_part(right, right_up, bias, h_rows, a_rows, row_ok, cols, F, HAS_BIAS, GATED, SAVE, FUNCTION)


@triton.jit
def down_kernel(
    a_NX, w_EXY, b_EY, gates_S, out_SY, order_N, tile_expert, tile_start, tile_end,
    X, Y, stride_wx, stride_wy,
    HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """gate * (a W + b), stored at the row's slot, or 0 in a tile of no expert. Nothing is added across programs."""
    expert = tl.load(tile_expert + tl.program_id(1))
    # int64 only in scalars: offsets within a tile are small, and wide ones would cost registers.
    first = tl.load(tile_start + tl.program_id(1))
    rows = tl.arange(0, BLOCK_M)
    row_ok = rows < tl.load(tile_end + tl.program_id(1)) - first
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_ok = cols < Y
    if expert < 0:
        slot = tl.load(order_N + first + rows, mask=row_ok, other=0)
        nothing = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        tl.store(out_SY + slot[:, None] * Y + cols[None, :], nothing, mask=row_ok[:, None] & col_ok[None, :])
        return
    weights = w_EXY + expert.to(tl.int64) * X * Y
    a_rows = a_NX + first * X + rows[:, None] * X
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, X, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_ok = (k < X) | EVEN
        a = tl.load(a_rows + k[None, :], mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        w = tl.load(
            weights + k[:, None] * stride_wx + cols[None, :] * stride_wy,
            mask=k_ok[:, None] & col_ok[None, :],
            other=0.0,
        )
        acc = dot(a, w, acc, PRECISION, UPCAST)
    slot = tl.load(order_N + first + rows, mask=row_ok, other=0)
    if HAS_BIAS:
        acc += tl.load(b_EY + expert * Y + cols, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    if HAS_GATE:
        acc *= tl.load(gates_S + slot, mask=row_ok, other=0.0)[:, None]
    tl.store(out_SY + slot[:, None] * Y + cols[None, :], acc, mask=row_ok[:, None] & col_ok[None, :])


@triton.jit
def _hidden_part(acc, gate, h_rows, dh_rows, a_rows, row_ok, cols, F, GATED: tl.constexpr, FUNCTION: tl.constexpr):
    """Some columns of dh and of gate * act(h), stored; returns their part of <g W2, act(h)>."""
    ok = row_ok[:, None] & (cols < F)[None, :]
    h = tl.load(h_rows + cols[None, :], mask=ok, other=0.0).to(tl.float32)
    a = activate(h, FUNCTION)
    dh = gate[:, None] * acc * slope(h, FUNCTION)
    if GATED:
        d_up = gate[:, None] * acc * a
        tl.store(dh_rows + F + cols[None, :], d_up.to(dh_rows.dtype.element_ty), mask=ok)
        up = tl.load(h_rows + F + cols[None, :], mask=ok, other=0.0).to(tl.float32)
        a *= up
        dh *= up
    tl.store(dh_rows + cols[None, :], dh.to(dh_rows.dtype.element_ty), mask=ok)
    # With its gate, so that the product for W2's gradient takes its operands as they lie in memory.
    tl.store(a_rows + cols[None, :], (gate[:, None] * a).to(a_rows.dtype.element_ty), mask=ok)
    # Both are 0 in columns past the last.
    return tl.sum(acc * a, axis=1)


@triton.jit
def hidden_gradient_kernel(
    grad_TD, w2_EDF, gates_S, h_NH, dh_NH, a_NF, dgate_NB, order_N, tile_expert, tile_start, tile_end,
    D, F, num_blocks,
    TOP_K: tl.constexpr, HAS_GATE: tl.constexpr, GATED: tl.constexpr, FUNCTION: tl.constexpr,
    INDEX: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dh = gate * (g W2) * act'(h), gate * act(h), and each column block's part of <g W2, act(h)>."""
    expert = tl.load(tile_expert + tl.program_id(1))
    if expert < 0:
        return
    # int64 only in scalars: offsets within a tile are small, and wide ones would cost registers.
    first = tl.load(tile_start + tl.program_id(1))
    rows = tl.arange(0, BLOCK_M)
    row_ok = rows < tl.load(tile_end + tl.program_id(1)) - first
    slot = tl.load(order_N + first + rows, mask=row_ok, other=0)
    g_rows = grad_TD + (token(slot, TOP_K, INDEX) * D)[:, None]
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_ok = cols < F
    H = 2 * F if GATED else F
    weights = w2_EDF + expert.to(tl.int64) * D * F
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_ok = (k < D) | EVEN
        g = tl.load(g_rows + k[None, :], mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        w = tl.load(weights + k[:, None] * F + cols[None, :], mask=k_ok[:, None] & col_ok[None, :], other=0.0)
        acc = dot(g, w, acc, PRECISION, UPCAST)
    gate = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
    if HAS_GATE:
        gate = tl.load(gates_S + slot, mask=row_ok, other=0.0)
    h_rows, dh_rows = h_NH + first * H + rows[:, None] * H, dh_NH + first * H + rows[:, None] * H
    a_rows = a_NF + first * F + rows[:, None] * F
    left, right = halves(acc)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    dgate = _hidden_part(left, gate, h_rows, dh_rows, a_rows, row_ok, cols, F, GATED, FUNCTION)
    dgate += _hidden_part(right, gate, h_rows, dh_rows, a_rows, row_ok, cols + BLOCK_N // 2, F, GATED, FUNCTION)
    if HAS_GATE:
        tl.store(dgate_NB + first * num_blocks + rows * num_blocks + tl.program_id(0), dgate, mask=row_ok)


@triton.jit
def weight_gradient_kernel(
    p_NP, q_TQ, gates_S, out_EPQ, sum_EX, order_N, ends_E,
    P, Q, stride_qt, stride_qq, stride_op, stride_oq,
    TOP_K: tl.constexpr, HAS_GATE: tl.constexpr, SUM: tl.constexpr,
    INDEX: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """p^T q over one expert's rows, q gathered by token; SUM "p": and the sum of p, "q": and that of gate * q."""
    expert = tl.program_id(2)
    start = tl.load(ends_E + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_E + expert)
    p_cols = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    q_cols = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    p_ok, q_ok = p_cols < P, q_cols < Q
    acc = tl.zeros((BLOCK_P, BLOCK_Q), dtype=tl.float32)
    rows = tl.arange(0, BLOCK_R)
    for first in range(start, end, BLOCK_R):
        row_ok = rows < end - first
        p = tl.load(
            p_NP + first * P + rows[None, :] * P + p_cols[:, None], mask=p_ok[:, None] & row_ok[None, :], other=0.0
        )
        slot = tl.load(order_N + first + rows, mask=row_ok, other=0)
        q = tl.load(
            q_TQ + (token(slot, TOP_K, INDEX) * stride_qt)[:, None] + q_cols[None, :] * stride_qq,
            mask=row_ok[:, None] & q_ok[None, :],
            other=0.0,
        )
        acc = dot(p, q, acc, PRECISION, UPCAST)
    out = out_EPQ + expert.to(tl.int64) * P * Q
    tl.store(
        out + p_cols[:, None] * stride_op + q_cols[None, :] * stride_oq,
        acc.to(out_EPQ.dtype.element_ty),
        mask=p_ok[:, None] & q_ok[None, :],
    )
    # A loop of its own, by one program of each column: a sum beside the product halved the product's rate on an H100.
    if SUM == "p":  # noqa: SIM102
        if tl.program_id(1) == 0:
            sums = tl.zeros((BLOCK_R, BLOCK_P), dtype=tl.float32)
            for first in range(start, end, BLOCK_R):
                ok = (rows < end - first)[:, None] & p_ok[None, :]
                p = tl.load(p_NP + first * P + rows[:, None] * P + p_cols[None, :], mask=ok, other=0.0)
                sums += p.to(tl.float32)
            tl.store(sum_EX + expert * P + p_cols, tl.sum(sums, axis=0).to(sum_EX.dtype.element_ty), mask=p_ok)
    if SUM == "q":  # noqa: SIM102
        if tl.program_id(0) == 0:
            sums = tl.zeros((BLOCK_R, BLOCK_Q), dtype=tl.float32)
            for first in range(start, end, BLOCK_R):
                row_ok = rows < end - first
                slot = tl.load(order_N + first + rows, mask=row_ok, other=0)
                q_rows = q_TQ + (token(slot, TOP_K, INDEX) * stride_qt)[:, None]
                q = tl.load(q_rows + q_cols[None, :] * stride_qq, mask=row_ok[:, None] & q_ok[None, :], other=0.0)
                q = q.to(tl.float32)
                if HAS_GATE:
                    q *= tl.load(gates_S + slot, mask=row_ok, other=0.0)[:, None]
                sums += q
            tl.store(sum_EX + expert * Q + q_cols, tl.sum(sums, axis=0).to(sum_EX.dtype.element_ty), mask=q_ok)
