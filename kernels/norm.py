"""Norm: y = activation(norm(x) * gamma + beta) + positions, row by row: wherever a norm does not fold into a matmul.

That is a norm before positions (with the row sums that the next norm needs), before an activation, of an output (whose
rows may be stored in another order), and of what a merger merges: of each patch of a merged row, or of the whole row.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .address import Address, element, located, pointer
from .config import SUM_COLUMNS, wide
from .device import activate, add_positions, store_row_sums
from .linear import activate_ref
from .patch_embed import positions_ref, row_sums_ref


def norm_ref(
    x: torch.Tensor,
    source: torch.Tensor | None,
    tap_index: torch.Tensor | None,
    tap_weight: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    positions: torch.Tensor | None,
    *,
    eps: float,
    centred: bool,
    activation: str,
    merge: int = 1,
    groups: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [rows, width], row i stored at source[i], and the row sums [2, 1, rows] of y in the order of x.

    `merge` rows of x are one of y, and each of its `groups` pieces is normalised.
    """
    y = wide(x).reshape(-1, x.shape[-1] * merge // groups)
    if centred:
        y = y - y.mean(1, keepdim=True)
    y = y * torch.rsqrt((y * y).mean(1, keepdim=True) + eps)
    if gamma is not None:
        y = y * gamma
    y = activate_ref(y if beta is None else y + beta, activation)
    if positions is not None and tap_index is not None and tap_weight is not None:
        y = y + positions_ref(positions, tap_index, tap_weight)
    y = y.to(x.dtype).reshape(-1, x.shape[-1] * merge)
    return y if source is None else torch.empty_like(y).index_copy_(0, source.long(), y), row_sums_ref(y)


def norm(
    y: torch.Tensor | Address,
    sums: torch.Tensor | None,
    x: torch.Tensor | Address,
    source: torch.Tensor | None,
    tap_index: torch.Tensor | None,
    tap_weight: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    positions: torch.Tensor | None,
    *,
    eps: float,
    centred: bool,
    activation: str,
    merge: int = 1,
    groups: int = 1,
    count: torch.Tensor,
) -> None:
    """Launch over the rows of y that count[0] holds; y may be x where source is None. gamma and beta are fp32."""
    width = x.shape[-1] * merge // groups
    norm_kernel[(math.prod(x.shape) // width,)](
        pointer(y), sums, pointer(x), source, tap_index, tap_weight, gamma, beta, positions, count,
        width, 0 if sums is None else sums.shape[2], eps,
        GROUPS=groups, CENTRED=centred, ACTIVATION=activation, TAPS=0 if tap_index is None else tap_index.shape[1],
        PARTS=0 if sums is None else sums.shape[1], SUM_COLUMNS=SUM_COLUMNS,
        DTYPE=element(x), BLOCK_N=max(SUM_COLUMNS, triton.next_power_of_2(width)), num_warps=4 if width <= 2048 else 8,
    )  # fmt: skip


@triton.jit
def norm_kernel(
    y_ptr, sums_ptr,                           # [capacity, N], fp32 [2, PARTS, capacity] or None
    x_ptr, source_ptr,                         # [capacity, N], int32 [capacity] or None: where row i is stored
    tap_index_ptr, tap_weight_ptr,             # [capacity, TAPS] int32 and fp32
    gamma_ptr, beta_ptr, positions_ptr,        # fp32 [N] or None, [table, N]
    count_ptr,                                 # rows / GROUPS at [0]
    N, capacity, eps,
    GROUPS: tl.constexpr, CENTRED: tl.constexpr, ACTIVATION: tl.constexpr, TAPS: tl.constexpr, PARTS: tl.constexpr,
    SUM_COLUMNS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    y_ptr, x_ptr = located(y_ptr, DTYPE), located(x_ptr, DTYPE)
    rows = tl.load(count_ptr) * GROUPS
    row = tl.program_id(0) + tl.arange(0, 1)
    mask_m = row < rows
    if tl.program_id(0) >= rows:
        return
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask = mask_n[None, :]
    y = tl.load(x_ptr + row.to(tl.int64)[:, None] * N + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    if CENTRED:
        y = tl.where(mask, y - (tl.sum(y, 1) / N)[:, None], 0.0)
    y *= tl.rsqrt(tl.sum(y * y, 1) / N + eps)[:, None]
    if gamma_ptr is not None:
        y *= tl.load(gamma_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    if beta_ptr is not None:
        y += tl.load(beta_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    y = activate(y, ACTIVATION)
    y = add_positions(y, tap_index_ptr, tap_weight_ptr, positions_ptr, row, offs_n, mask, N, TAPS)
    y = y.to(y_ptr.dtype.element_ty)
    place = row if source_ptr is None else tl.load(source_ptr + row)
    tl.store(y_ptr + place.to(tl.int64)[:, None] * N + offs_n[None, :], y, mask=mask)
    if sums_ptr is not None:
        y = tl.where(mask, y.to(tl.float32), 0.0)
        store_row_sums(sums_ptr, y, row, mask_m, 0, N, capacity, PARTS, 1, BLOCK_N, SUM_COLUMNS)
