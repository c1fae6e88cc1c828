"""Pool: the mean of a clip's frames, patch by patch, grouped for merging (Kimi-K2.5's temporal pooling)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .address import Address, element, located, pointer
from .config import wide
from .unfold import FIELDS, HEADER, IMAGES, find_image


def pool_ref(x: torch.Tensor, source: torch.Tensor | None, table: torch.Tensor, *, patches: int) -> torch.Tensor:
    """[merged, patches, width] from x [rows, width], whose row i is stored at source[i]."""
    ordered = wide(x if source is None else x[source.long()])
    clips = table[HEADER:].view(-1, FIELDS)[: int(table[IMAGES])].tolist()
    parts = ordered.split([t * h * w for t, h, w, *_ in clips])
    means = [part.unflatten(0, (c[0], -1)).mean(0) for part, c in zip(parts, clips, strict=True)]
    return torch.cat(means).to(x.dtype).view(-1, patches, x.shape[1])


def pool(
    y: torch.Tensor | Address,
    x: torch.Tensor | Address,
    source: torch.Tensor | None,
    table: torch.Tensor,
    *,
    patches: int,
    count: torch.Tensor,
) -> None:
    """Launch over count[0] merged rows. y is [merged, patches, width]."""
    images, width = (table.numel() - HEADER) // FIELDS, x.shape[1]
    pool_kernel[(y.shape[0] * patches,)](
        pointer(y), pointer(x), source, table, count, width,
        PATCHES=patches, SEARCH_STEPS=images.bit_length(), HEADER=HEADER, FIELDS=FIELDS,
        DTYPE=element(x), BLOCK_N=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip


@triton.jit
def pool_kernel(
    y_ptr,                                     # [merged, PATCHES, N]
    x_ptr, source_ptr,                         # [capacity, N], int32 [capacity] or None: where row i is stored
    table_ptr, count_ptr,                      # int32; merged rows at count[0]
    N, PATCHES: tl.constexpr, SEARCH_STEPS: tl.constexpr, HEADER: tl.constexpr, FIELDS: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    y_ptr, x_ptr = located(y_ptr, DTYPE), located(x_ptr, DTYPE)
    merged = tl.program_id(0) // PATCHES
    if merged >= tl.load(count_ptr):
        return
    image = find_image(table_ptr, merged, tl.load(table_ptr + 2), 5, SEARCH_STEPS, HEADER, FIELDS)
    frames, frame = tl.load(image), tl.load(image + 1) * tl.load(image + 2)
    row = tl.load(image + 3) + tl.program_id(0) - tl.load(image + 5) * PATCHES
    offs_n = tl.arange(0, BLOCK_N)
    mask = offs_n < N
    total = tl.zeros((BLOCK_N,), tl.float32)
    for _ in range(frames):
        place = row if source_ptr is None else tl.load(source_ptr + row)
        total += tl.load(x_ptr + place.to(tl.int64) * N + offs_n, mask=mask, other=0.0).to(tl.float32)
        row += frame
    y = (total / frames).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + tl.program_id(0).to(tl.int64) * N + offs_n, y, mask=mask)
