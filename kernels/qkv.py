"""Queries, keys and values: rope(norm(x) @ W.T + b), heads first, with the norm folded into the matmul.

Norm: y = rstd * (x @ W'.T - mean * colsum(W')) + b', W' = gamma * W (weights.fold). Rotation pairs are adjacent
columns, so one thread holds both; the softmax scale and log2(e) are already in the query rows of W'.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .config import device_arch, gemm_config, hopper_config, multiprocessors, precision, wide
from .device import cos_sin, matmul_tile, normalise, row_moments, tile_of


def moments_ref(sums: torch.Tensor, width: int, eps: float, centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1/std [rows] of rows of `width` numbers, from sums [2, parts, rows]."""
    total, square = sums.sum(1) / width
    mean = total if centred else torch.zeros_like(total)
    return mean, torch.rsqrt((square - mean * mean).clamp(min=0) + eps)


def qkv_ref(
    x: torch.Tensor,
    sums: torch.Tensor,
    places: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    colsum: torch.Tensor,
    gain: torch.Tensor | None,
    frequencies: torch.Tensor | None,
    *,
    head_dim: int,
    rotated: int,
    normed: int,
    head_eps: float,
    eps: float,
    centred: bool,
) -> torch.Tensor:
    """[heads, rows, stride]: the first `normed` heads (queries, keys) through an RMSNorm of their own, times gain,

    the first `rotated` heads through the 2-D rotary embedding of Qwen2-VL (arXiv 2409.12191): the angle of a pair of
    columns is places[0] * frequencies[0] + places[1] * frequencies[1], of [2, rows] and [2, columns]. stride is
    head_dim rounded up to 16; where that leaves columns, they hold a one, then zeros: attention's sum of weights in a
    column of its product.
    """
    mean, rstd = moments_ref(sums, x.shape[1], eps, centred)
    y = rstd[:, None] * (F.linear(wide(x), wide(weight)) - mean[:, None] * colsum) + bias
    y = y.view(len(x), -1, head_dim)
    if gain is not None:
        heads = y[:, :normed]
        heads = heads * torch.rsqrt((heads * heads).mean(-1, keepdim=True) + head_eps) * gain.view(-1, head_dim)
        y = torch.cat([heads, y[:, normed:]], 1)
    if places is not None and frequencies is not None:
        even, odd = y[:, :rotated].unflatten(-1, (-1, 2)).unbind(-1)
        angle = torch.einsum("am,aj->mj", places, frequencies[:, : rotated * head_dim : 2])
        angle = angle.unflatten(1, (rotated, -1))
        c, s = angle.cos(), angle.sin()
        turned = torch.stack([even * c - odd * s, odd * c + even * s], -1).flatten(2)
        y = torch.cat([turned, y[:, rotated:]], 1)
    stride = -(-head_dim // 16) * 16
    pad = torch.eye(1, stride - head_dim, dtype=y.dtype, device=y.device).expand(*y.shape[:2], -1)
    return torch.cat([y, pad], 2).transpose(0, 1).to(x.dtype).contiguous()


def qkv(
    y: torch.Tensor,
    x: torch.Tensor,
    sums: torch.Tensor,
    places: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    colsum: torch.Tensor,
    gain: torch.Tensor | None,
    frequencies: torch.Tensor | None,
    *,
    head_dim: int,
    rotated: int,
    normed: int,
    head_eps: float,
    eps: float,
    centred: bool,
    count: torch.Tensor,
) -> None:
    """Launch over the rows that count[0] holds. y is [heads, rows, stride]."""
    rows, (columns, width) = x.shape[0], weight.shape
    arch, programs = device_arch(x.device), multiprocessors(x.device)
    hopper = hopper_config("qkv", rows, columns, width, x.dtype, arch, programs)
    if hopper and (gain is None or head_dim == 64):  # there, what an epilogue has at a time is a head
        from .hopper_epilogues import store_qkv  # another triton may not have what it imports
        from .hopper_matmul import hopper_matmul

        hopper_matmul(
            x, weight, store_qkv, y, (rows, gain, head_eps),
            (head_dim, y.shape[2], rotated * head_dim, centred, normed * head_dim),
            columns=(bias, colsum, *(frequencies if frequencies is not None else (None, None))), places=places,
            moments=(sums, eps, centred), config=hopper, programs=programs, count=count,
        )  # fmt: skip
        return
    c = gemm_config("qkv", rows, x.dtype, arch)
    qkv_kernel[(triton.cdiv(rows, c.block_m) * triton.cdiv(columns, c.block_n),)](
        y, x, sums, places, weight, bias, colsum, gain, frequencies, count,
        columns, width, rows, eps, head_eps,
        HEAD_DIM=head_dim, STRIDE=y.shape[2], ROTATED=rotated * head_dim, NORMED=normed * head_dim,
        PARTS=sums.shape[1], CENTRED=centred, EVEN_K=width % c.block_k == 0, PRECISION=precision(x.dtype),
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip


@triton.jit
def qkv_kernel(
    y_ptr,                                     # [heads, capacity, STRIDE]
    x_ptr, sums_ptr, places_ptr,               # [capacity, K], fp32 [2, PARTS, capacity], fp32 [2, capacity]
    weight_ptr, bias_ptr, colsum_ptr,          # [N, K], fp32 [N]
    gain_ptr, frequencies_ptr,                 # fp32 [NORMED], [2, N]
    count_ptr,                                 # rows at [0]
    N, K, capacity, eps, head_eps,
    HEAD_DIM: tl.constexpr, STRIDE: tl.constexpr, ROTATED: tl.constexpr, NORMED: tl.constexpr,
    PARTS: tl.constexpr, CENTRED: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.load(count_ptr)
    offs_m, offs_n = tile_of(rows, N, BLOCK_M, BLOCK_N)
    if tl.min(offs_m, 0) >= rows:
        return
    mask_m, mask_n = offs_m < rows, offs_n < N
    row, column = tl.where(mask_m, offs_m, 0), tl.where(mask_n, offs_n, 0)
    rstd, shift = row_moments(sums_ptr, row, capacity, K, eps, PARTS, CENTRED)
    y = matmul_tile(x_ptr, weight_ptr, row, column, 0, K, K, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION)
    y = normalise(y, rstd, shift, tl.load(colsum_ptr + column), tl.load(bias_ptr + column))

    if NORMED > 0:  # a tile holds whole heads
        heads = tl.reshape(y, (BLOCK_M, BLOCK_N // HEAD_DIM, HEAD_DIM))
        square = tl.sum(heads * heads, 2) / HEAD_DIM
        heads = tl.reshape(heads * tl.rsqrt(square + head_eps)[:, :, None], (BLOCK_M, BLOCK_N))
        gain = tl.load(gain_ptr + offs_n, mask=offs_n < NORMED, other=0.0)
        y = tl.where((offs_n < NORMED)[None, :], heads * gain[None, :], y)

    if ROTATED > 0:  # columns 2j and 2j + 1 rotate together; values have frequencies of zero
        pair = tl.min(offs_n, 0) + 2 * tl.arange(0, BLOCK_N // 2)
        high = tl.load(frequencies_ptr + pair, mask=pair < ROTATED, other=0.0)
        wide = tl.load(frequencies_ptr + N + pair, mask=pair < ROTATED, other=0.0)
        angle_y = tl.load(places_ptr + row)[:, None] * high[None, :]
        angle = tl.fma(tl.load(places_ptr + capacity + row)[:, None], wide[None, :], angle_y)
        cos, sin = cos_sin(angle)
        even, odd = tl.split(tl.reshape(y, (BLOCK_M, BLOCK_N // 2, 2)))
        # fma by name: which product the compiler fuses, and so the last bit, must not depend on the row in the tile
        turned = tl.join(tl.fma(even, cos, -(odd * sin)), tl.fma(odd, cos, even * sin))
        y = tl.reshape(turned, (BLOCK_M, BLOCK_N))

    # head dims are multiples of 8: runs of 8 columns stay together, so stores are 16 bytes wide instead of 2
    at = offs_n // HEAD_DIM * (capacity * STRIDE).to(tl.int64) + offs_n % HEAD_DIM
    at = tl.max_contiguous(tl.multiple_of(at, 8), 8)
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * STRIDE + at[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)
    if STRIDE > HEAD_DIM:  # the last columns of a head are followed by 1, 0, 0 ...
        within = offs_n % HEAD_DIM - (2 * HEAD_DIM - STRIDE)
        pad = tl.where(within == 0, 1.0, 0.0)[None, :] + tl.zeros((BLOCK_M, 1), tl.float32)
        tl.store(y_ptrs + (STRIDE - HEAD_DIM), pad.to(y_ptr.dtype.element_ty), mask=mask & (within >= 0)[None, :])
