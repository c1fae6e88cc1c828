"""Unfold: the per-image table into per-row angles and position taps, and into attention tiles. One launch a call.

The host sends a few integers per image; nothing per row is ever computed or copied by it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

HEADER = 8  # table: rows, merged rows, images, segments, tiles, 3 unused; then FIELDS integers per image
FIELDS = 8  # t, h, w, first row, first segment (unused by the kernel), frames per segment, first tile, 0
ROWS, MERGED, IMAGES, SEGMENTS, TILES = range(5)
BLOCK = 32


def unfold_ref(
    table: torch.Tensor, inv_freq: torch.Tensor, *, merge: int, raster: bool, interleaved: bool, side: int, tile: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """cos, sin [rows, head_dim / 2]; tap_index, tap_weight [rows, 4]; tiles [tiles, 4] of (q0, q1, k0, k1).

    Angles: 2-D rotary embedding of Qwen2-VL (arXiv 2409.12191); taps: bilinear, align_corners (Qwen3VLVisionModel).
    """
    angles, index, weight, tiles = [], [], [], []
    m = 1 if raster else merge
    for t, h, w, row, _, per_segment, _, _ in table[HEADER:].view(-1, FIELDS)[: int(table[IMAGES])].tolist():
        y, x = (torch.arange(n, device=table.device) for n in (h, w))
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)
        frame = grid.view(h // m, m, w // m, m, 2).transpose(1, 2).reshape(h * w, 2).repeat(t, 1)
        angle = frame[:, :, None].to(inv_freq.dtype) * inv_freq
        angles.append(angle.flip(1).transpose(1, 2).flatten(1) if interleaved else angle.flatten(1))
        taps, weights = zip(
            *(_axis_taps(frame[:, i], n, side, inv_freq.dtype) for i, n in ((0, h), (1, w))), strict=True
        )
        index.append((taps[0][:, :, None] * side + taps[1][:, None, :]).flatten(1))
        weight.append((weights[0][:, :, None] * weights[1][:, None, :]).flatten(1))
        length = per_segment * h * w
        for k0 in range(row, row + t * h * w, length):
            tiles += [(q0, min(q0 + tile, k0 + length), k0, k0 + length) for q0 in range(k0, k0 + length, tile)]
    angle = torch.cat(angles)
    tile_rows = torch.tensor(tiles, dtype=torch.int32, device=table.device)
    return angle.cos(), angle.sin(), torch.cat(index).int(), torch.cat(weight), tile_rows


def _axis_taps(i: torch.Tensor, size: int, side: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    source = i.to(dtype) * (side - 1) / max(size - 1, 1)
    low = source.floor()
    taps = torch.stack([low, low + 1], 1).clamp(max=side - 1).long()
    return taps, torch.stack([1 - (source - low), source - low], 1)


def unfold(
    cos: torch.Tensor,
    sin: torch.Tensor,
    tap_index: torch.Tensor,
    tap_weight: torch.Tensor,
    tiles: torch.Tensor,
    table: torch.Tensor,
    inv_freq: torch.Tensor,
    *,
    merge: int,
    raster: bool,
    interleaved: bool,
    side: int,
    tile: int,
) -> None:
    """Launch. cos, sin [rows, head_dim / 2] fp32; taps [rows, 4] int32 and fp32; tiles [tiles, 4] int32."""
    images = (table.numel() - HEADER) // FIELDS
    grid = (triton.cdiv(max(cos.shape[0], tiles.shape[0]), BLOCK),)
    unfold_kernel[grid](
        cos, sin, tap_index, tap_weight, tiles, table, inv_freq,
        SIDE=side, TILE=tile, MERGE=1 if raster else merge, INTERLEAVED=interleaved,
        FREQS=inv_freq.numel(), BLOCK_F=triton.next_power_of_2(inv_freq.numel()),
        SEARCH_STEPS=images.bit_length(), HEADER=HEADER, FIELDS=FIELDS, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


@triton.jit
def find_image(
    table_ptr, x, images, FIELD: tl.constexpr, STEPS: tl.constexpr, HEADER: tl.constexpr, FIELDS: tl.constexpr
):
    """The last image whose FIELD (a running start) is <= x, by binary search."""
    low = tl.zeros(x.shape, tl.int32)
    high = low + images
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        right = tl.load(table_ptr + HEADER + middle * FIELDS + FIELD, mask=middle < images, other=0) <= x
        low = tl.where(right & (middle < images), middle, low)
        high = tl.where(right, high, middle)
    return table_ptr + HEADER + low * FIELDS


@triton.jit
def axis_taps(i, size, SIDE: tl.constexpr):
    source = i.to(tl.float32) * (SIDE - 1) / tl.maximum(size - 1, 1).to(tl.float32)
    low = tl.floor(source)
    first = low.to(tl.int32)
    return first, tl.minimum(first + 1, SIDE - 1), source - low


@triton.jit
def unfold_kernel(
    cos_ptr, sin_ptr,                          # [rows, 2 * FREQS] fp32
    tap_index_ptr, tap_weight_ptr,             # [rows, 4] int32, fp32
    tiles_ptr,                                 # [tiles, 4] int32
    table_ptr, inv_freq_ptr,                   # int32, fp32 [FREQS]
    SIDE: tl.constexpr, TILE: tl.constexpr, MERGE: tl.constexpr, INTERLEAVED: tl.constexpr,
    FREQS: tl.constexpr, BLOCK_F: tl.constexpr, SEARCH_STEPS: tl.constexpr,
    HEADER: tl.constexpr, FIELDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows, images, tiles = tl.load(table_ptr), tl.load(table_ptr + 2), tl.load(table_ptr + 4)

    # rows: where in its frame is row i
    mask = i < rows
    image = find_image(table_ptr, i, images, 3, SEARCH_STEPS, HEADER, FIELDS)
    h, w = tl.load(image + 1), tl.load(image + 2)
    within = (i - tl.load(image + 3)) % (h * w)
    block, inner = within // (MERGE * MERGE), within % (MERGE * MERGE)
    y = block // (w // MERGE) * MERGE + inner // MERGE
    x = block % (w // MERGE) * MERGE + inner % MERGE

    offs_f = tl.arange(0, BLOCK_F)
    mask_f = mask[:, None] & (offs_f < FREQS)[None, :]
    freq = tl.load(inv_freq_ptr + offs_f, mask=offs_f < FREQS, other=0.0)
    angle_y, angle_x = y.to(tl.float32)[:, None] * freq[None, :], x.to(tl.float32)[:, None] * freq[None, :]
    if INTERLEAVED:  # x0 y0 x1 y1 ...
        at_y, at_x = 2 * offs_f + 1, 2 * offs_f
    else:  # y0 y1 ... x0 x1 ...
        at_y, at_x = offs_f, FREQS + offs_f
    row = i.to(tl.int64)[:, None] * (2 * FREQS)
    tl.store(cos_ptr + row + at_y[None, :], tl.cos(angle_y), mask=mask_f)
    tl.store(cos_ptr + row + at_x[None, :], tl.cos(angle_x), mask=mask_f)
    tl.store(sin_ptr + row + at_y[None, :], tl.sin(angle_y), mask=mask_f)
    tl.store(sin_ptr + row + at_x[None, :], tl.sin(angle_x), mask=mask_f)

    if SIDE > 0:
        y0, y1, fy = axis_taps(y, h, SIDE)
        x0, x1, fx = axis_taps(x, w, SIDE)
        tap = i.to(tl.int64) * 4
        tl.store(tap_index_ptr + tap, y0 * SIDE + x0, mask=mask)
        tl.store(tap_index_ptr + tap + 1, y0 * SIDE + x1, mask=mask)
        tl.store(tap_index_ptr + tap + 2, y1 * SIDE + x0, mask=mask)
        tl.store(tap_index_ptr + tap + 3, y1 * SIDE + x1, mask=mask)
        tl.store(tap_weight_ptr + tap, (1.0 - fy) * (1.0 - fx), mask=mask)
        tl.store(tap_weight_ptr + tap + 1, (1.0 - fy) * fx, mask=mask)
        tl.store(tap_weight_ptr + tap + 2, fy * (1.0 - fx), mask=mask)
        tl.store(tap_weight_ptr + tap + 3, fy * fx, mask=mask)

    # tiles: which query rows against which segment
    mask_t = i < tiles
    image = find_image(table_ptr, i, images, 6, SEARCH_STEPS, HEADER, FIELDS)
    length = tl.load(image + 1) * tl.load(image + 2) * tl.load(image + 5)
    per_segment = (length + TILE - 1) // TILE
    nth = i - tl.load(image + 6)
    k0 = tl.load(image + 3) + nth // per_segment * length
    q0 = k0 + nth % per_segment * TILE
    tl.store(tiles_ptr + i * 4, q0, mask=mask_t)
    tl.store(tiles_ptr + i * 4 + 1, tl.minimum(q0 + TILE, k0 + length), mask=mask_t)
    tl.store(tiles_ptr + i * 4 + 2, k0, mask=mask_t)
    tl.store(tiles_ptr + i * 4 + 3, k0 + length, mask=mask_t)
