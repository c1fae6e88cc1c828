"""What the matmuls on Hopper do with their products: the epilogues of qkv, linear and residual, in Gluon.

Each takes fp32 [rows, 64] of a tile. Results are stored eight columns (16 bytes) a thread.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

STORE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
STORE_HALF = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0]))


@gluon.jit
def normalise(y, column, N, mean, rstd, bias_ptr, colsum_ptr):
    """rstd * (y - mean * colsum) + bias; without a norm, y + bias."""
    layout: gl.constexpr = y.type.layout
    columns = column + gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    bias = gl.load(bias_ptr + columns, mask=columns < N, other=0.0)
    if colsum_ptr is not None:
        colsum = gl.load(colsum_ptr + columns, mask=columns < N, other=0.0)
        mean = gl.convert_layout(mean, gl.SliceLayout(1, layout))
        rstd = gl.convert_layout(rstd, gl.SliceLayout(1, layout))
        y = gl.expand_dims(rstd, 1) * (y - gl.expand_dims(mean, 1) * gl.expand_dims(colsum, 0))
    return y + gl.expand_dims(bias, 0)


@gluon.jit
def activate(x, ACTIVATION: gl.constexpr):
    """As device.activate."""
    if ACTIVATION == "gelu_tanh":
        u = x * (1.5957691216057308 + 0.07135481627159 * x * x)
        x = x / (1.0 + gl.exp2(-1.4426950408889634 * u))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + gl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "quick_gelu":
        x = x / (1.0 + gl.exp2(-1.4426950408889634 * 1.702 * x))
    elif ACTIVATION == "silu":
        x = x / (1.0 + gl.exp2(-1.4426950408889634 * x))
    return x


@gluon.jit
def pairs(x):
    """Columns 2j and columns 2j + 1, which one thread holds."""
    return gl.split(gl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@gluon.jit
def store_linear(y, row, column, rows, N, mean, rstd, operands, OPTIONS: gl.constexpr):
    """activation(norm(x) @ W.T + b) into y [rows, N], or [rows, N / 2] if gated."""
    y_ptr, bias_ptr, colsum_ptr, source_ptr = operands
    ACTIVATION: gl.constexpr = OPTIONS[0]
    GATED: gl.constexpr = OPTIONS[1]
    LIMIT: gl.constexpr = OPTIONS[2]
    SCATTER: gl.constexpr = OPTIONS[3]
    y = normalise(y, column, N, mean, rstd, bias_ptr, colsum_ptr)
    if GATED:
        gate, up = pairs(y)
        if LIMIT is not None:
            gate, up = gl.minimum(gate, LIMIT), gl.minimum(gl.maximum(up, -LIMIT), LIMIT)
        y = activate(gate, ACTIVATION) * up
        column, N = column // 2, N // 2
    else:
        y = activate(y, ACTIVATION)
    layout: gl.constexpr = STORE_HALF if GATED else STORE
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
def store_residual(y, row, column, rows, N, mean, rstd, operands, OPTIONS: gl.constexpr):
    """x + a @ W.T + b into out [rows, N], and the sums of its row and of its squares over these 64 columns."""
    out_ptr, sums_ptr, x_ptr, bias_ptr, capacity = operands
    PARTS: gl.constexpr = OPTIONS[0]
    layout: gl.constexpr = y.type.layout
    index = gl.arange(0, y.shape[0], layout=gl.SliceLayout(1, STORE))
    columns = column + gl.arange(0, 64, layout=gl.SliceLayout(0, STORE))
    mask = gl.expand_dims(row + index < rows, 1) & gl.expand_dims(columns < N, 0)
    at = gl.cast(row, gl.int64) * N + (gl.expand_dims(index * N, 1) + gl.expand_dims(columns, 0))
    x = gl.convert_layout(gl.load(x_ptr + at, mask=mask, other=0.0), layout)
    own = column + gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    bias = gl.load(bias_ptr + own, mask=own < N, other=0.0)
    y = (y + (gl.expand_dims(bias, 0) + x.to(gl.float32))).to(out_ptr.dtype.element_ty)
    gl.store(out_ptr + at, gl.convert_layout(y, STORE), mask=mask)
    y = gl.where(gl.expand_dims(own < N, 0), y.to(gl.float32), 0.0)
    part = column // 64
    own_row = row + gl.arange(0, y.shape[0], layout=gl.SliceLayout(1, layout))
    inside = (own_row < rows) & (part < PARTS)
    sums = sums_ptr + part * capacity + own_row
    gl.store(sums, gl.sum(y, 1), mask=inside)
    gl.store(sums + PARTS * capacity, gl.sum(y * y, 1), mask=inside)


@gluon.jit
def rotate(y, row, column, rows, cos_ptr, sin_ptr, HEAD_DIM: gl.constexpr, ROTATED: gl.constexpr):
    """Columns 2j and 2j + 1 turned together, in the layout of stores: four angles are one load of 16 bytes."""
    y = gl.convert_layout(y, STORE)
    even, odd = pairs(y)
    half: gl.constexpr = even.type.layout
    index = gl.arange(0, y.shape[0], layout=gl.SliceLayout(1, half))
    pair = column // 2 + gl.arange(0, 32, layout=gl.SliceLayout(0, half))
    within = gl.max_contiguous(gl.multiple_of(pair % (HEAD_DIM // 2), 4), 4)
    angle = gl.expand_dims(index * (HEAD_DIM // 2), 1) + gl.expand_dims(within, 0)
    angle += gl.cast(row, gl.int64) * (HEAD_DIM // 2)
    turns = gl.expand_dims(row + index < rows, 1) & gl.expand_dims(pair < ROTATED // 2, 0)
    cos = gl.load(cos_ptr + angle, mask=turns, other=1.0)
    sin = gl.load(sin_ptr + angle, mask=turns, other=0.0)
    # fma by name: left to the compiler, which product is fused, and so the last bit, depends on the row in the tile
    turned = gl.join(gl.fma(even, cos, -(odd * sin)), gl.fma(odd, cos, even * sin))
    return gl.convert_layout(gl.reshape(turned, (y.shape[0], 64)), STORE)


@gluon.jit
def store_qkv(y, row, column, rows, N, mean, rstd, operands, OPTIONS: gl.constexpr):
    """rope(norm(x) @ W.T + b), heads first: y [heads, capacity, HEAD_DIM]."""
    y_ptr, cos_ptr, sin_ptr, bias_ptr, colsum_ptr, capacity = operands
    HEAD_DIM: gl.constexpr = OPTIONS[0]
    ROTATED: gl.constexpr = OPTIONS[1]
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    y = normalise(y, column, N, mean, rstd, bias_ptr, colsum_ptr)
    if ROTATED > 0:
        if column < ROTATED:
            stored = rotate(y, row, column, rows, cos_ptr, sin_ptr, HEAD_DIM, ROTATED).to(dtype)
        else:  # half as much to move between threads
            stored = gl.convert_layout(y.to(dtype), STORE)
    else:
        stored = gl.convert_layout(y.to(dtype), STORE)
    index = gl.arange(0, y.shape[0], layout=gl.SliceLayout(1, STORE))
    columns = column + gl.arange(0, 64, layout=gl.SliceLayout(0, STORE))
    head = column // HEAD_DIM  # in 32 bits relative to it: a piece touches few heads
    plane = capacity * HEAD_DIM
    at = gl.max_contiguous(gl.multiple_of((columns // HEAD_DIM - head) * plane + columns % HEAD_DIM, 8), 8)
    base = y_ptr + gl.cast(head, gl.int64) * plane + gl.cast(row, gl.int64) * HEAD_DIM
    mask = gl.expand_dims(row + index < rows, 1) & gl.expand_dims(columns < N, 0)
    gl.store(base + (gl.expand_dims(index * HEAD_DIM, 1) + gl.expand_dims(at, 0)), stored, mask=mask)
