"""Residual: x += a @ W.T + b, in place, and the row sums that the next norm needs: second half of attention and MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .address import Address, element, located, pointer
from .config import SUM_COLUMNS, device_arch, gemm_config, hopper_config, multiprocessors, precision, wide
from .device import matmul_tile, store_row_sums, tile_of
from .patch_embed import row_sums_ref


def residual_ref(
    x: torch.Tensor, a: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, width] and row sums [2, 1, rows] from a [rows, depth] and weight [width, depth]."""
    x = (wide(x) + F.linear(wide(a), wide(weight)) + bias).to(x.dtype)
    return x, row_sums_ref(x)


def residual(
    out: torch.Tensor | Address,
    sums: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    count: torch.Tensor,
) -> None:
    """Launch over the rows that count[0] holds. `out` may be `x`: a program reads and writes the same elements."""
    rows, (width, depth) = x.shape[0], weight.shape
    arch, programs = device_arch(x.device), multiprocessors(x.device)
    hopper = hopper_config("residual", rows, width, depth, x.dtype, arch, programs)
    if hopper:
        from .hopper_epilogues import fetch_residual, store_residual  # another triton may not have what it imports
        from .hopper_matmul import hopper_matmul

        hopper_matmul(
            a, weight, store_residual, out, (sums, x, rows), (sums.shape[1],), fetch=fetch_residual,
            columns=(bias, None, None, None), moments=(None, 0.0, True), config=hopper, programs=programs, count=count,
        )  # fmt: skip
        return
    c = gemm_config("residual", rows, x.dtype, arch)
    residual_kernel[(triton.cdiv(rows, c.block_m) * triton.cdiv(width, c.block_n),)](
        pointer(out), sums, x, a, weight, bias, count,
        width, depth, rows,
        PARTS=sums.shape[1], SUM_COLUMNS=SUM_COLUMNS, EVEN_K=depth % c.block_k == 0, PRECISION=precision(x.dtype),
        DTYPE=element(x),
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip


@triton.jit
def residual_kernel(
    out_ptr, sums_ptr,                         # [capacity, N], fp32 [2, PARTS, capacity]
    x_ptr, a_ptr, weight_ptr, bias_ptr,        # [capacity, N], [capacity, K], [N, K], fp32 [N]
    count_ptr,                                 # rows at [0]
    N, K, capacity,
    PARTS: tl.constexpr, SUM_COLUMNS: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    out_ptr = located(out_ptr, DTYPE)
    rows = tl.load(count_ptr)
    offs_m, offs_n = tile_of(rows, N, BLOCK_M, BLOCK_N)
    if tl.min(offs_m, 0) >= rows:
        return
    mask_m, mask_n = offs_m < rows, offs_n < N
    row, column = tl.where(mask_m, offs_m, 0), tl.where(mask_n, offs_n, 0)
    y = matmul_tile(a_ptr, weight_ptr, row, column, 0, K, K, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION)
    at = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    y += tl.load(bias_ptr + column)[None, :] + tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y = y.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, y, mask=mask)
    y = tl.where(mask, y.to(tl.float32), 0.0)
    store_row_sums(sums_ptr, y, offs_m, mask_m, tl.min(offs_n, 0), N, capacity, PARTS, BLOCK_M, BLOCK_N, SUM_COLUMNS)
