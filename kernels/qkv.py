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
from .device import matmul_tile, row_moments, tile_of


def moments_ref(
    sums: torch.Tensor, width: int, eps: float, centred: bool, rows: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1/std [T / rows] of `rows` adjacent rows taken as one of `width` numbers, from sums [2, parts, T]."""
    total, square = sums.sum(1).unflatten(1, (-1, rows)).sum(-1) / width
    mean = total if centred else torch.zeros_like(total)
    return mean, torch.rsqrt((square - mean * mean).clamp(min=0) + eps)


def qkv_ref(
    x: torch.Tensor,
    sums: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    colsum: torch.Tensor,
    gain: torch.Tensor | None,
    *,
    head_dim: int,
    rotated: int,
    normed: int,
    head_eps: float,
    eps: float,
    centred: bool,
) -> torch.Tensor:
    """[heads, rows, head_dim]: the first `normed` heads (queries, keys) through an RMSNorm of their own, times gain,

    the first `rotated` heads through the rotary embedding (arXiv 2104.09864).
    """
    mean, rstd = moments_ref(sums, x.shape[1], eps, centred)
    y = rstd[:, None] * (F.linear(wide(x), wide(weight)) - mean[:, None] * colsum) + bias
    y = y.view(len(x), -1, head_dim)
    if gain is not None:
        heads = y[:, :normed]
        heads = heads * torch.rsqrt((heads * heads).mean(-1, keepdim=True) + head_eps) * gain.view(-1, head_dim)
        y = torch.cat([heads, y[:, normed:]], 1)
    if cos is not None and sin is not None:
        even, odd = y[:, :rotated].unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cos[:, None], sin[:, None]
        turned = torch.stack([even * c - odd * s, odd * c + even * s], -1).flatten(2)
        y = torch.cat([turned, y[:, rotated:]], 1)
    return y.transpose(0, 1).to(x.dtype).contiguous()


def qkv(
    y: torch.Tensor,
    x: torch.Tensor,
    sums: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    colsum: torch.Tensor,
    gain: torch.Tensor | None,
    *,
    head_dim: int,
    rotated: int,
    normed: int,
    head_eps: float,
    eps: float,
    centred: bool,
    count: torch.Tensor,
) -> None:
    """Launch over the rows that count[0] holds. y is [heads, rows, head_dim]."""
    rows, (columns, width) = x.shape[0], weight.shape
    hopper = hopper_config("qkv", rows, x.dtype, device_arch(x.device)) if gain is None else None
    if hopper:
        from .hopper_epilogues import store_qkv  # another triton may not have what it imports
        from .hopper_matmul import hopper_matmul

        hopper_matmul(
            x, weight, store_qkv, (y, cos, sin, bias, colsum, rows), (head_dim, rotated * head_dim),
            moments=(sums, eps, 1, centred), config=hopper, programs=multiprocessors(x.device), count=count,
        )  # fmt: skip
        return
    c = gemm_config("qkv", rows, x.dtype, device_arch(x.device))
    qkv_kernel[(triton.cdiv(rows, c.block_m) * triton.cdiv(columns, c.block_n),)](
        y, x, sums, cos, sin, weight, bias, colsum, gain, count,
        columns, width, rows, eps, head_eps,
        HEAD_DIM=head_dim, ROTATED=rotated * head_dim, NORMED=normed * head_dim, PARTS=sums.shape[1], CENTRED=centred,
        EVEN_K=width % c.block_k == 0, PRECISION=precision(x.dtype),
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip


@triton.jit
def qkv_kernel(
    y_ptr,                                     # [heads, capacity, HEAD_DIM]
    x_ptr, sums_ptr, cos_ptr, sin_ptr,         # [capacity, K], fp32 [2, PARTS, capacity], fp32 [capacity, HEAD_DIM / 2]
    weight_ptr, bias_ptr, colsum_ptr,          # [N, K], fp32 [N]
    gain_ptr,                                  # fp32 [NORMED]
    count_ptr,                                 # rows at [0]
    N, K, capacity, eps, head_eps,
    HEAD_DIM: tl.constexpr, ROTATED: tl.constexpr, NORMED: tl.constexpr, PARTS: tl.constexpr, CENTRED: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.load(count_ptr)
    offs_m, offs_n = tile_of(rows, N, BLOCK_M, BLOCK_N)
    if tl.min(offs_m, 0) >= rows:
        return
    mask_m, mask_n = offs_m < rows, offs_n < N
    row, column = tl.where(mask_m, offs_m, 0), tl.where(mask_n, offs_n, 0)
    mean, rstd = row_moments(sums_ptr, row, capacity, K, eps, PARTS, 1, CENTRED)
    y = matmul_tile(x_ptr, weight_ptr, row, column, 0, K, K, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION)
    y = (
        rstd[:, None] * (y - mean[:, None] * tl.load(colsum_ptr + column)[None, :])
        + tl.load(bias_ptr + column)[None, :]
    )

    if NORMED > 0:  # a tile holds whole heads
        heads = tl.reshape(y, (BLOCK_M, BLOCK_N // HEAD_DIM, HEAD_DIM))
        square = tl.sum(heads * heads, 2) / HEAD_DIM
        heads = tl.reshape(heads * tl.rsqrt(square + head_eps)[:, :, None], (BLOCK_M, BLOCK_N))
        gain = tl.load(gain_ptr + offs_n, mask=offs_n < NORMED, other=0.0)
        y = tl.where((offs_n < NORMED)[None, :], heads * gain[None, :], y)

    if ROTATED > 0:  # columns 2j and 2j + 1 rotate together; values pass through with cos 1, sin 0
        pair = tl.min(offs_n, 0) // 2 + tl.arange(0, BLOCK_N // 2)
        within = tl.max_contiguous(tl.multiple_of(pair % (HEAD_DIM // 2), 4), 4)
        angle = row.to(tl.int64)[:, None] * (HEAD_DIM // 2) + within[None, :]
        turns = (pair < ROTATED // 2)[None, :] & mask_m[:, None]
        cos = tl.load(cos_ptr + angle, mask=turns, other=1.0)
        sin = tl.load(sin_ptr + angle, mask=turns, other=0.0)
        even, odd = tl.split(tl.reshape(y, (BLOCK_M, BLOCK_N // 2, 2)))
        # fma by name: which product the compiler fuses, and so the last bit, must not depend on the row in the tile
        turned = tl.join(tl.fma(even, cos, -(odd * sin)), tl.fma(odd, cos, even * sin))
        y = tl.reshape(turned, (BLOCK_M, BLOCK_N))

    # head dims are multiples of 8: runs of 8 columns stay together, so stores are 16 bytes wide instead of 2
    at = offs_n // HEAD_DIM * (capacity * HEAD_DIM).to(tl.int64) + offs_n % HEAD_DIM
    at = tl.max_contiguous(tl.multiple_of(at, 8), 8)
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(y_ptr + offs_m.to(tl.int64)[:, None] * HEAD_DIM + at[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
