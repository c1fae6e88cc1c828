"""Linear: y = activation(norm(x) @ W.T + b) with the norm folded in: an MLP's first half, and both halves of a merger.

`merge` adjacent rows of x are read as one row (patches merge for free: their rows are neighbours). The norm is over
each of `groups` pieces of that row: groups == merge normalises every patch, 1 the merged row, 0 nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .config import device_arch, gemm_config, precision, wide
from .device import activate, matmul_tile, row_moments, tile_of
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
    weight: torch.Tensor,
    bias: torch.Tensor,
    colsum: torch.Tensor | None,
    *,
    merge: int,
    groups: int,
    eps: float,
    centred: bool,
    activation: str,
) -> torch.Tensor:
    """[rows / merge, columns] from x [rows, width], sums [2, parts, rows], weight [columns, merge * width]."""
    pieces, depth = max(groups, 1), weight.shape[1] // max(groups, 1)
    y = torch.einsum("mgk,ngk->mgn", wide(x).reshape(-1, pieces, depth), wide(weight).view(-1, pieces, depth))
    if sums is not None and colsum is not None:
        mean, rstd = (t.view(-1, pieces, 1) for t in moments_ref(sums, depth, eps, centred, merge // pieces))
        y = rstd * (y - mean * colsum)
    return activate_ref(y.sum(1) + bias, activation).to(x.dtype)


def linear(
    y: torch.Tensor,
    x: torch.Tensor,
    sums: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    colsum: torch.Tensor | None,
    *,
    merge: int,
    groups: int,
    eps: float,
    centred: bool,
    activation: str,
    count: torch.Tensor,
) -> None:
    """Launch over the rows of y that count[0] holds."""
    rows, (columns, depth) = y.shape[0], weight.shape
    c = gemm_config("merger" if merge > 1 else "linear", rows, x.dtype, device_arch(x.device))
    per_group = depth // max(groups, 1)
    linear_kernel[(triton.cdiv(rows, c.block_m) * triton.cdiv(columns, c.block_n),)](
        y, x, sums, weight, bias, colsum, count,
        columns, depth, per_group, x.shape[0], eps,
        MERGE=merge, GROUPS=groups, PARTS=0 if sums is None else sums.shape[1], CENTRED=centred, ACTIVATION=activation,
        EVEN_K=per_group % c.block_k == 0, PRECISION=precision(x.dtype),
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip


@triton.jit
def linear_kernel(
    y_ptr,                                     # [rows, N]
    x_ptr, sums_ptr,                           # [rows, K] (MERGE rows of the buffer in one), fp32 [2, PARTS, capacity]
    weight_ptr, bias_ptr, colsum_ptr,          # [N, K], fp32 [N], fp32 [GROUPS, N]
    count_ptr,                                 # rows at [0]
    N, K, per_group, capacity, eps,
    MERGE: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, CENTRED: tl.constexpr, ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.load(count_ptr)
    offs_m, offs_n = tile_of(rows, N, BLOCK_M, BLOCK_N)
    if tl.min(offs_m, 0) >= rows:
        return
    mask_m, mask_n = offs_m < rows, offs_n < N
    row, column = tl.where(mask_m, offs_m, 0), tl.where(mask_n, offs_n, 0)
    bias = tl.load(bias_ptr + column)[None, :]
    if GROUPS == 0:
        y = matmul_tile(x_ptr, weight_ptr, row, column, 0, K, K, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION)
    elif GROUPS == 1:
        mean, rstd = row_moments(sums_ptr, row * MERGE, capacity, K, eps, PARTS, MERGE, CENTRED)
        y = matmul_tile(x_ptr, weight_ptr, row, column, 0, K, K, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION)
        y = rstd[:, None] * (y - mean[:, None] * tl.load(colsum_ptr + column)[None, :])
    else:
        y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for group in range(GROUPS):
            piece = matmul_tile(
                x_ptr, weight_ptr, row, column, group * per_group, per_group, K, K,
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
            )  # fmt: skip
            first = row * MERGE + group * (MERGE // GROUPS)
            mean, rstd = row_moments(sums_ptr, first, capacity, per_group, eps, PARTS, MERGE // GROUPS, CENTRED)
            colsum = tl.load(colsum_ptr + group * N + column)[None, :]
            y += rstd[:, None] * (piece - mean[:, None] * colsum)
    y = activate(y + bias, ACTIVATION).to(y_ptr.dtype.element_ty)
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :], y, mask=mask)
