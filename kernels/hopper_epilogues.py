"""What the matmuls on Hopper do with their products: the epilogues of qkv, linear and residual, in Gluon.

Each takes fp32 [rows, 64] of a tile, what was fetched for it (residual's x), and the vectors of its rows and columns
that hopper_matmul put into shared memory.
Results are stored eight columns (16 bytes) a thread.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language import PropagateNan

ALL = gl.constexpr(PropagateNan.ALL)  # a NaN that is clamped stays one, as in torch's clamp


@gluon.jit
def row_vector(side, NTH: gl.constexpr, layout: gl.constexpr):
    """Of the piece's rows: 0 1/std, 1 -mean/std, 2 and 3 places."""
    vectors, first = side
    return gl.expand_dims(vectors.index(first + NTH).load(gl.SliceLayout(1, layout)), 1)


@gluon.jit
def column_vector(side, NTH: gl.constexpr, layout: gl.constexpr):
    """Of the piece's columns: 0 bias, 1 column sums, 2 and 3 frequencies."""
    vectors, first = side
    return gl.expand_dims(vectors.index(first + NTH).load(gl.SliceLayout(0, layout)), 0)


@gluon.jit
def normalise(y, row_side, column_side, NORMED: gl.constexpr, CENTRED: gl.constexpr):
    """As device.normalise, where a norm without a mean has no shift; without a norm, y + bias."""
    layout: gl.constexpr = y.type.layout
    bias = column_vector(column_side, 0, layout)
    if NORMED:
        y = gl.fma(y, row_vector(row_side, 0, layout), bias)
        if CENTRED:
            y = gl.fma(row_vector(row_side, 1, layout), column_vector(column_side, 1, layout), y)
    else:
        y += bias
    return y


@gluon.jit
def gelu(x):
    """As device.gelu."""
    t = gl.minimum(gl.abs(x), 5.5, propagate_nan=ALL)
    p = gl.fma(t, 6.57902774e-06, -3.70497663e-05)
    p = gl.fma(t, p, -0.000476996647)
    p = gl.fma(t, p, 0.00747432544)
    p = gl.fma(t, p, -0.0527510475)
    p = gl.fma(t, p, -0.459136607)
    p = gl.fma(t, p, -1.15111168)
    return gl.fma(-t, gl.exp2(gl.fma(t, p, -1.0)), gl.maximum(x, 0.0))


@gluon.jit
def activate(x, ACTIVATION: gl.constexpr):
    """As device.activate."""
    if ACTIVATION == "gelu_tanh":
        root = gl.rsqrt(1.0 + gl.exp2(x * gl.fma(-0.1029432395800235 * x, x, -2.302208198144325)))
        x = x * root * root
    elif ACTIVATION == "gelu":
        x = gelu(x)
    elif ACTIVATION == "quick_gelu":
        root = gl.rsqrt(1.0 + gl.exp2(-2.4554669595930157 * x))
        x = x * root * root
    elif ACTIVATION == "silu":
        root = gl.rsqrt(1.0 + gl.exp2(-1.4426950408889634 * x))
        x = x * root * root
    return x


@gluon.jit
def pairs(x):
    """Columns 2j and columns 2j + 1, which one thread holds."""
    return gl.split(gl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@gluon.jit
def store_linear(
    y, fetched, row, column, rows, N, row_side, column_side, operands, OPTIONS: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """activation(norm(x) @ W.T + b) into y [rows, N], or [rows, N / 2] if gated."""
    y_ptr, others = operands
    source_ptr = others[0]
    ACTIVATION: gl.constexpr = OPTIONS[0]
    GATED: gl.constexpr = OPTIONS[1]
    LIMIT: gl.constexpr = OPTIONS[2]
    SCATTER: gl.constexpr = OPTIONS[3]
    NORMED: gl.constexpr = OPTIONS[4]
    CENTRED: gl.constexpr = OPTIONS[5]
    y = normalise(y, row_side, column_side, NORMED, CENTRED)
    if GATED:
        gate, up = pairs(y)
        if LIMIT is not None:
            gate = gl.minimum(gate, LIMIT, propagate_nan=ALL)
            up = gl.minimum(gl.maximum(up, -LIMIT, propagate_nan=ALL), LIMIT, propagate_nan=ALL)
        y = activate(gate, ACTIVATION) * up
        column, N = column // 2, N // 2
    else:
        y = activate(y, ACTIVATION)
    ACROSS: gl.constexpr = 4 if GATED else 8  # threads along a row
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [WARPS, 1], [1, 0])
    y = gl.convert_layout(y.to(y_ptr.dtype.element_ty), layout)
    index = gl.arange(0, y.shape[0], layout=gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, y.shape[1], layout=gl.SliceLayout(0, layout))
    mask = gl.expand_dims(row + index < rows, 1) & gl.expand_dims(columns < N, 0)
    if source_ptr is None:
        at = gl.expand_dims(index * N, 1) + gl.expand_dims(columns, 0)
        gl.store(y_ptr + gl.cast(row, gl.int64) * N + at, y, mask=mask)
    else:
        place = gl.load(source_ptr + (row + index) * SCATTER, mask=row + index < rows, other=0) // SCATTER
        gl.store(y_ptr + gl.expand_dims(place.to(gl.int64) * N, 1) + gl.expand_dims(columns, 0), y, mask=mask)


@gluon.jit
def residual_at(row, column, rows, N, ROWS: gl.constexpr, WARPS: gl.constexpr):
    """Offsets of a piece in [rows, N] and which of them exist, 16 bytes a thread."""
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    index = gl.arange(0, ROWS, layout=gl.SliceLayout(1, STORE))
    columns = column + gl.arange(0, 64, layout=gl.SliceLayout(0, STORE))
    mask = gl.expand_dims(row + index < rows, 1) & gl.expand_dims(columns < N, 0)
    return gl.cast(row, gl.int64) * N + (gl.expand_dims(index * N, 1) + gl.expand_dims(columns, 0)), mask


@gluon.jit
def fetch_residual(row, column, rows, N, operands, ROWS: gl.constexpr, WARPS: gl.constexpr):
    """x of a piece."""
    _, others = operands
    _, x_ptr, _ = others
    at, mask = residual_at(row, column, rows, N, ROWS, WARPS)
    return gl.load(x_ptr + at, mask=mask, other=0.0)


@gluon.jit
def store_residual(
    y, fetched, row, column, rows, N, row_side, column_side, operands, OPTIONS: gl.constexpr, WARPS: gl.constexpr
):
    """x + a @ W.T + b into out [rows, N], and the sums of its row and of its squares over these 64 columns."""
    out_ptr, others = operands
    sums_ptr, _, capacity = others
    PARTS: gl.constexpr = OPTIONS[0]
    layout: gl.constexpr = y.type.layout
    x = gl.convert_layout(fetched, layout)
    own = column + gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    y = (y + (column_vector(column_side, 0, layout) + x.to(gl.float32))).to(out_ptr.dtype.element_ty)
    at, mask = residual_at(row, column, rows, N, y.shape[0], WARPS)
    gl.store(out_ptr + at, gl.convert_layout(y, fetched.type.layout), mask=mask)
    y = gl.where(gl.expand_dims(own < N, 0), y.to(gl.float32), 0.0)
    part = column // 64
    own_row = row + gl.arange(0, y.shape[0], layout=gl.SliceLayout(1, layout))
    inside = (own_row < rows) & (part < PARTS)
    sums = sums_ptr + part * capacity + own_row
    gl.store(sums, gl.sum(y, 1), mask=inside)
    gl.store(sums + PARTS * capacity, gl.sum(y * y, 1), mask=inside)


@gluon.jit
def rotate(y, row_side, column_side):
    """Columns 2j and 2j + 1 turned together, by an angle that a load would take longer to bring than it is computed.

    Whole turns are taken off first, so that the fast cosine errs by 2^-20 at most.
    """
    layout: gl.constexpr = y.type.layout
    high = row_vector(row_side, 2, layout) * column_vector(column_side, 2, layout)
    angle, _ = pairs(gl.fma(row_vector(row_side, 3, layout), column_vector(column_side, 3, layout), high))
    angle = gl.fma(gl.floor(gl.fma(angle, 0.15915494309189535, 0.5)), -6.283185307179586, angle)
    cos = gl.inline_asm_elementwise("cos.approx.f32 $0, $1;", "=f,f", [angle], gl.float32, is_pure=True, pack=1)
    sin = gl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [angle], gl.float32, is_pure=True, pack=1)
    even, odd = pairs(y)
    # fma by name: left to the compiler, which product is fused, and so the last bit, depends on the row in the tile
    turned = gl.join(gl.fma(even, cos, -(odd * sin)), gl.fma(odd, cos, even * sin))
    return gl.convert_layout(gl.reshape(turned, (y.shape[0], 64)), y.type.layout)


@gluon.jit
def norm_head(y, gain_ptr, eps):
    """A head of 64 columns through an RMSNorm of its own."""
    layout: gl.constexpr = y.type.layout
    gain = gl.expand_dims(gl.load(gain_ptr + gl.arange(0, 64, layout=gl.SliceLayout(0, layout))), 0)
    # fma by name: left to the compiler, which square is fused with a sum depends on the row in the tile
    square = gl.sum(gl.fma(y, y, gl.zeros([y.shape[0], 64], gl.float32, layout)), 1)
    return y * gl.expand_dims(gl.rsqrt(square * (1 / 64) + eps), 1) * gain


@gluon.jit
def store_qkv(
    y, fetched, row, column, rows, N, row_side, column_side, operands, OPTIONS: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """rope(norm(x) @ W.T + b), heads first: y [heads, capacity, STRIDE], a one and zeros behind a head.

    Where queries and keys have norms, a head is a piece.
    """
    y_ptr, others = operands
    capacity, gain_ptr, head_eps = others
    HEAD_DIM: gl.constexpr = OPTIONS[0]
    STRIDE: gl.constexpr = OPTIONS[1]
    ROTATED: gl.constexpr = OPTIONS[2]
    CENTRED: gl.constexpr = OPTIONS[3]
    NORMED: gl.constexpr = OPTIONS[4]
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    y = normalise(y, row_side, column_side, True, CENTRED)
    if NORMED > 0:  # noqa: SIM102 -- one condition would compile the branch without a gain
        if column < NORMED:
            y = norm_head(y, gain_ptr + column, head_eps)
    if column < ROTATED:
        y = rotate(y, row_side, column_side)
    stored = gl.convert_layout(y.to(dtype), STORE)
    index = gl.arange(0, y.shape[0], layout=gl.SliceLayout(1, STORE))
    columns = column + gl.arange(0, 64, layout=gl.SliceLayout(0, STORE))
    head = column // HEAD_DIM  # in 32 bits relative to it: a piece touches few heads
    plane = capacity * STRIDE
    at = gl.max_contiguous(gl.multiple_of((columns // HEAD_DIM - head) * plane + columns % HEAD_DIM, 8), 8)
    y_ptrs = y_ptr + gl.cast(head, gl.int64) * plane + gl.cast(row, gl.int64) * STRIDE
    y_ptrs += gl.expand_dims(index * STRIDE, 1) + gl.expand_dims(at, 0)
    mask = gl.expand_dims(row + index < rows, 1) & gl.expand_dims(columns < N, 0)
    gl.store(y_ptrs, stored, mask=mask)
    if STRIDE > HEAD_DIM:
        within = columns % HEAD_DIM - (2 * HEAD_DIM - STRIDE)
        pad = gl.expand_dims(gl.where(within == 0, 1.0, 0.0), 0) + gl.zeros([y.shape[0], 64], gl.float32, STORE)
        gl.store(y_ptrs + (STRIDE - HEAD_DIM), pad.to(dtype), mask=mask & gl.expand_dims(within >= 0, 0))
