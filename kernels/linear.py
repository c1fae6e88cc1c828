"""Linear: y = activation(norm(x) @ W.T + b) with the norm folded in: an MLP's first half, and the linears of a merger.

A gated MLP has the rows of W in pairs (gate, up), and y = activation(gate) * up is half as wide.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .address import Address, element, located, pointer
from .config import device_arch, gemm_config, hopper_config, multiprocessors, precision, wide
from .device import activate, glu, matmul_tile, normalise, row_moments, tile_of
from .qkv import moments_ref


def activate_ref(x: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if activation == "silu":
        return F.silu(x)
    if activation == "none":
        return x
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def linear_ref(
    x: torch.Tensor,
    sums: torch.Tensor | None,
    source: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    colsum: torch.Tensor | None,
    *,
    eps: float,
    centred: bool,
    activation: str,
    gated: bool,
    limit: float | None,
    scatter: int = 1,
) -> torch.Tensor:
    """[rows, columns] from x [rows, depth], weight [columns, depth]; through a norm if there are sums [2, parts, rows].

    With a source, row i is stored at source[i * scatter] / scatter: `scatter` rows of the tower became one of y.
    """
    y = F.linear(wide(x), wide(weight))
    if sums is not None and colsum is not None:
        mean, rstd = moments_ref(sums, x.shape[1], eps, centred)
        y = rstd[:, None] * (y - mean[:, None] * colsum)
    y = y + bias
    if gated:
        gate, up = y.unflatten(1, (-1, 2)).unbind(-1)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        y = activate_ref(gate, activation) * up
    else:
        y = activate_ref(y, activation)
    y = y.to(x.dtype)
    return y if source is None else torch.empty_like(y).index_copy_(0, source[::scatter].long() // scatter, y)


def linear(
    y: torch.Tensor | Address,
    x: torch.Tensor,
    sums: torch.Tensor | None,
    source: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    colsum: torch.Tensor | None,
    *,
    eps: float,
    centred: bool,
    activation: str,
    gated: bool,
    limit: float | None,
    scatter: int = 1,
    count: torch.Tensor,
    programs: int | None = None,
) -> None:
    """Launch over the rows of y that count[0] holds. programs: of the form for Hopper, default one a multiprocessor."""
    rows, (columns, depth) = y.shape[0], weight.shape
    op = "gated" if gated else "linear"
    arch, programs = device_arch(x.device), programs or multiprocessors(x.device)
    hopper = hopper_config(op, rows, columns, depth, x.dtype, arch, programs)
    if hopper:
        from .hopper_epilogues import store_linear  # another triton may not have what it imports
        from .hopper_matmul import hopper_matmul

        hopper_matmul(
            x, weight, store_linear, y, (source,), (activation, gated, limit, scatter, sums is not None, centred),
            columns=(bias, colsum, None, None), moments=(sums, eps, centred),
            config=hopper, programs=programs, count=count,
        )  # fmt: skip
        return
    c = gemm_config(op, rows, x.dtype, arch)
    linear_kernel[(triton.cdiv(rows, c.block_m) * triton.cdiv(columns, c.block_n),)](
        pointer(y), x, sums, source, weight, bias, colsum, count,
        columns, depth, 0 if sums is None else sums.shape[2], eps,
        PARTS=0 if sums is None else sums.shape[1], CENTRED=centred, ACTIVATION=activation,
        GATED=gated, LIMIT=limit, SCATTER=scatter, EVEN_K=depth % c.block_k == 0, PRECISION=precision(x.dtype),
        DTYPE=element(x),
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip


@triton.jit
def linear_kernel(
    y_ptr,                                     # [rows, N], or [rows, N / 2] if GATED
    x_ptr, sums_ptr,                           # [rows, K], fp32 [2, PARTS, capacity] or None
    source_ptr,                                # int32, or None: row i is stored at source[i * SCATTER] / SCATTER
    weight_ptr, bias_ptr, colsum_ptr,          # [N, K], fp32 [N], fp32 [N] or None
    count_ptr,                                 # rows at [0]
    N, K, capacity, eps,
    PARTS: tl.constexpr, CENTRED: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, LIMIT: tl.constexpr, SCATTER: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    y_ptr = located(y_ptr, DTYPE)
    rows = tl.load(count_ptr)
    offs_m, offs_n = tile_of(rows, N, BLOCK_M, BLOCK_N)
    if tl.min(offs_m, 0) >= rows:
        return
    mask_m, mask_n = offs_m < rows, offs_n < N
    row, column = tl.where(mask_m, offs_m, 0), tl.where(mask_n, offs_n, 0)
    bias = tl.load(bias_ptr + column)
    y = matmul_tile(x_ptr, weight_ptr, row, column, 0, K, K, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION)
    if PARTS > 0:
        rstd, shift = row_moments(sums_ptr, row, capacity, K, eps, PARTS, CENTRED)
        y = normalise(y, rstd, shift, tl.load(colsum_ptr + column), bias)
    else:
        y += bias[None, :]
    if GATED:
        y = glu(y, ACTIVATION, LIMIT, BLOCK_M, BLOCK_N)
        offs_n, width = tl.min(offs_n, 0) // 2 + tl.arange(0, BLOCK_N // 2), N // 2
    else:
        y, width = activate(y, ACTIVATION), N
    place = offs_m if source_ptr is None else tl.load(source_ptr + row * SCATTER) // SCATTER
    mask = mask_m[:, None] & (offs_n < width)[None, :]
    tl.store(y_ptr + place.to(tl.int64)[:, None] * width + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
