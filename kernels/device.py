"""Device functions that the kernels share: the matmul main loop, row sums and moments, positions, activations."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's row and column offsets, columns first, so that the programs past the last row come last."""
    tiles_n = tl.cdiv(columns, BLOCK_N)
    offs_m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    return offs_m, offs_n


@triton.jit
def matmul_tile(
    x_ptr, w_ptr,                                                # [rows, ld_x], [columns, ld_w], depth innermost
    offs_m, offs_n, begin, depth, ld_x, ld_w,                    # all offsets in bounds; depth columns from `begin`
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_M, BLOCK_N] = x[offs_m, begin:begin+depth] @ w[offs_n, begin:begin+depth].T, summed in order of k.

    Bytes of x count from 128, so that 16 bits hold them exactly.
    """
    offs_k = begin + tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * ld_x + offs_k[None, :]
    w_ptrs = w_ptr + offs_n.to(tl.int64)[None, :] * ld_w + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(depth // BLOCK_K):
        w = tl.load(w_ptrs)
        acc = tl.dot(operand(tl.load(x_ptrs), w), w, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    if not EVEN_K:  # only the last step is masked
        mask_k = tl.arange(0, BLOCK_K) < depth % BLOCK_K
        x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_k[:, None], other=0.0)
        acc = tl.dot(operand(x, w), w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def operand(x, w):
    """x as the tensor cores take it beside w."""
    return (x.to(tl.float32) - 128.0).to(w.dtype) if x.dtype == tl.uint8 else x


@triton.jit
def row_moments(sums_ptr, offs_row, capacity, width, eps, PARTS: tl.constexpr, CENTRED: tl.constexpr):
    """1/std and -mean/std of rows, from partial sums [2, PARTS, capacity], in a fixed order."""
    total = tl.zeros(offs_row.shape, tl.float32)
    square = tl.zeros(offs_row.shape, tl.float32)
    ptrs = sums_ptr + offs_row
    for _ in tl.static_range(PARTS):  # unrolled: all loads are in flight at once, the order of the sums stays fixed
        total += tl.load(ptrs)
        square += tl.load(ptrs + PARTS * capacity)
        ptrs += capacity
    mean = total / width
    if not CENTRED:
        mean = tl.zeros(offs_row.shape, tl.float32)
    rstd = tl.rsqrt(tl.maximum(square / width - mean * mean, 0.0) + eps)
    return rstd, -(mean * rstd)


@triton.jit
def store_row_sums(
    sums_ptr, x, offs_m, mask_m, first_column, columns, capacity,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Partial sums of x and x*x per SUM_COLUMNS columns into sums [2, PARTS, capacity]; x is 0 past the last column."""
    pieces = tl.reshape(x, (BLOCK_M, BLOCK_N // SUM_COLUMNS, SUM_COLUMNS))
    parts = first_column // SUM_COLUMNS + tl.arange(0, BLOCK_N // SUM_COLUMNS)
    ptrs = sums_ptr + parts.to(tl.int64)[None, :] * capacity + offs_m[:, None]
    mask = mask_m[:, None] & (parts < PARTS)[None, :]
    tl.store(ptrs, tl.sum(pieces, 2), mask=mask)
    tl.store(ptrs + PARTS * capacity, tl.sum(pieces * pieces, 2), mask=mask)


@triton.jit
def add_positions(
    x, tap_index_ptr, tap_weight_ptr, positions_ptr,            # fp32 [rows, columns], [capacity, TAPS], [table, width]
    row, offs_n, mask, width, TAPS: tl.constexpr,
):  # fmt: skip
    """x plus each row's TAPS weighted rows of the position table, summed first and in order."""
    if TAPS > 0:
        position = tl.zeros(x.shape, tl.float32)
        for tap in range(TAPS):
            index = tl.load(tap_index_ptr + row * TAPS + tap)
            weight = tl.load(tap_weight_ptr + row * TAPS + tap)
            value = tl.load(positions_ptr + index[:, None] * width + offs_n[None, :], mask=mask, other=0.0)
            position += value.to(tl.float32) * weight[:, None]
        x += position
    return x


@triton.jit
def normalise(y, rstd, shift, colsum, bias):
    """norm(x) @ W.T + b [rows, columns] from y = x @ W'.T: two instructions an element, fused by name."""
    return tl.fma(shift[:, None], colsum[None, :], tl.fma(y, rstd[:, None], bias[None, :]))


@triton.jit
def gelu(x):
    """x Phi(x) = max(x, 0) - |x| Phi(-|x|), to 1.5e-7 of max(1, |x|), where 0.5 x (1 + erf(x / sqrt(2))) is.

    log2(Phi(-t)) is smooth: a polynomial of degree 7, fitted to t Phi(-t) on [0, 5.5]. libdevice's erf has a branch.
    """
    t = tl.minimum(tl.abs(x), 5.5, propagate_nan=tl.PropagateNan.ALL)
    p = tl.fma(t, 6.57902774e-06, -3.70497663e-05)
    p = tl.fma(t, p, -0.000476996647)
    p = tl.fma(t, p, 0.00747432544)
    p = tl.fma(t, p, -0.0527510475)
    p = tl.fma(t, p, -0.459136607)
    p = tl.fma(t, p, -1.15111168)
    return tl.fma(-t, tl.exp2(tl.fma(t, p, -1.0)), tl.maximum(x, 0.0))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of an MLP in fp32. A sigmoid, 1 / (1 + 2^t), has a root of one instruction; a division is five."""
    if ACTIVATION == "gelu_tanh":  # 0.5 x (1 + tanh(u)) == x * sigmoid(2u)
        root = tl.rsqrt(1.0 + tl.exp2(x * tl.fma(-0.1029432395800235 * x, x, -2.302208198144325)))
        x = x * root * root
    elif ACTIVATION == "gelu":
        x = gelu(x)
    elif ACTIVATION == "quick_gelu":
        root = tl.rsqrt(1.0 + tl.exp2(-2.4554669595930157 * x))
        x = x * root * root
    elif ACTIVATION == "silu":
        root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * x))
        x = x * root * root
    return x


@triton.jit
def glu(y, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """activation(gate) * up [BLOCK_M, BLOCK_N / 2] of adjacent columns (gate, up), clamped to LIMIT if it is not None.

    A thread holds both columns of a pair, so nothing moves between threads. A NaN stays one, as in torch's clamp.
    """
    ALL: tl.constexpr = tl.PropagateNan.ALL
    gate, up = tl.split(tl.reshape(y, (BLOCK_M, BLOCK_N // 2, 2)))
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT, propagate_nan=ALL)
        up = tl.minimum(tl.maximum(up, -LIMIT, propagate_nan=ALL), LIMIT, propagate_nan=ALL)
    return activate(gate, ACTIVATION) * up


@triton.jit
def cos_sin(x):
    """Both to an ulp or two, for |x| < 10^4: quarter turns taken off in three parts, then Cephes' polynomials.

    libdevice's pair, made for any x, spilled 1 KB a thread in qkv on sm_80.
    """
    quarters = tl.floor(x * 0.6366197723675814 + 0.5)
    r = x - quarters * 1.5703125
    r = r - quarters * 4.837512969970703125e-4
    r = r - quarters * 7.54978995489188216e-8
    z = r * r
    sin = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cos = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (2.443315711809948e-5 * z - 1.388731625493765e-3))
    n = quarters.to(tl.int32)
    odd = n % 2 != 0
    sin, cos = tl.where(odd, cos, sin), tl.where(odd, sin, cos)
    return tl.where((n + 1) & 2 != 0, -cos, cos), tl.where(n & 2 != 0, -sin, sin)
