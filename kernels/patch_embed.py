"""Patch embedding: x = pixels @ W.T + b + interpolated positions, and the row sums that the first norm needs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .address import Address, element, located, pointer
from .config import SUM_COLUMNS, device_arch, gemm_config, precision, wide
from .device import add_positions, matmul_tile, store_row_sums, tile_of


def row_sums_ref(x: torch.Tensor) -> torch.Tensor:
    """Sum and sum of squares of each row as [2, 1, rows]: what the next norm needs, in one part."""
    x = wide(x)
    return torch.stack([x.sum(1), (x * x).sum(1)])[:, None]


def positions_ref(positions: torch.Tensor, tap_index: torch.Tensor, tap_weight: torch.Tensor) -> torch.Tensor:
    """Interpolated positions [rows, width] from positions [table, width] and taps [rows, taps]."""
    return (wide(positions)[tap_index.long()] * tap_weight[:, :, None]).sum(1)


def patch_embed_ref(
    pixels: torch.Tensor,
    source: torch.Tensor | None,
    tap_index: torch.Tensor | None,
    tap_weight: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    positions: torch.Tensor | None,
    *,
    features: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, width] and row sums [2, 1, rows] from pixels [patches, features]; a row of source -1 has no pixels.

    Pixels and weight [width, features] may have more columns, for the sake of alignment, that do not count. Pixels may
    be bytes, which count from 128.
    """
    values = pixels[:, :features].to(wide(weight).dtype) - (128 if pixels.dtype == torch.uint8 else 0)
    x = F.linear(values, wide(weight[:, :features])) + bias
    if source is not None:
        x = torch.where(source[:, None] < 0, 0.0, x[source.long()])
    if positions is not None and tap_index is not None and tap_weight is not None:
        x = x + positions_ref(positions, tap_index, tap_weight)
    x = x.to(weight.dtype)
    return x, row_sums_ref(x)


def patch_embed(
    x: torch.Tensor,
    sums: torch.Tensor,
    pixels: torch.Tensor | Address,
    source: torch.Tensor | None,
    tap_index: torch.Tensor | None,
    tap_weight: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    positions: torch.Tensor | None,
    *,
    features: int,
    count: torch.Tensor,
) -> None:
    """Launch over the rows that count[0] holds. sums is [2, ceil(width / 64), rows]."""
    rows, (width, stride) = x.shape[0], weight.shape
    op = "bytes" if pixels.dtype == torch.uint8 else "patch_embed"
    c = gemm_config(op, rows, x.dtype, device_arch(x.device))
    patch_embed_kernel[(triton.cdiv(rows, c.block_m) * triton.cdiv(width, c.block_n),)](
        x, sums, pointer(pixels), source, tap_index, tap_weight, weight, bias, positions, count,
        width, features, stride, rows,
        TAPS=0 if tap_index is None else tap_index.shape[1],
        PARTS=sums.shape[1], SUM_COLUMNS=SUM_COLUMNS, EVEN_K=features % c.block_k == 0, PRECISION=precision(x.dtype),
        PIXEL=element(pixels),
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip


@triton.jit
def patch_embed_kernel(
    x_ptr, sums_ptr,                           # [capacity, N], fp32 [2, PARTS, capacity]
    pixels_ptr, source_ptr,                    # [capacity, stride] or bytes, int32 or None: row i has pixels source[i]
    tap_index_ptr, tap_weight_ptr,             # [capacity, TAPS] int32 and fp32
    weight_ptr, bias_ptr, positions_ptr,       # [N, stride], fp32 [N], [table, N]
    count_ptr,                                 # rows at [0]
    N, K, stride, capacity,
    TAPS: tl.constexpr, PARTS: tl.constexpr, SUM_COLUMNS: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    PIXEL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pixels_ptr = located(pixels_ptr, PIXEL)
    rows = tl.load(count_ptr)
    offs_m, offs_n = tile_of(rows, N, BLOCK_M, BLOCK_N)
    if tl.min(offs_m, 0) >= rows:
        return
    mask_m, mask_n = offs_m < rows, offs_n < N
    row, column = tl.where(mask_m, offs_m, 0), tl.where(mask_n, offs_n, 0)
    pixel = row if source_ptr is None else tl.load(source_ptr + row)
    patch = tl.maximum(pixel, 0)
    x = matmul_tile(
        pixels_ptr, weight_ptr, patch, column, 0, K, stride, stride, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
    )
    x += tl.load(bias_ptr + column)[None, :]
    if source_ptr is not None:
        x = tl.where(pixel[:, None] < 0, 0.0, x)
    mask = mask_m[:, None] & mask_n[None, :]
    x = add_positions(x, tap_index_ptr, tap_weight_ptr, positions_ptr, row, offs_n, mask, N, TAPS)
    x = x.to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :], x, mask=mask)
    x = tl.where(mask, x.to(tl.float32), 0.0)
    store_row_sums(sums_ptr, x, offs_m, mask_m, tl.min(offs_n, 0), N, capacity, PARTS, BLOCK_M, BLOCK_N, SUM_COLUMNS)
