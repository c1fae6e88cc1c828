"""Unfold: the per-image table into what kernels need per row (place, position taps, source) and per attention tile.

The host sends a few integers per image; nothing per row is ever computed or copied by it. One launch a call.

Rows run frame by frame: a class token if the tower has one, then blocks of merge x merge patches, the blocks window by
window (or, without windows, row by row). `source` says where a row is in pixel_values; -1 is a class token.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

# table: rows, merged rows, images, attention tiles, windows, 3 unused; 16 addresses; then FIELDS integers per image
HEADER = 8 + 16 * 4
# t, h, w, first row, first patch, first merged row, frames per segment, first window; then, in the n-th image's place,
# the first tile and the number of the image with the n-th longest segments
FIELDS = 10
IMAGES = 2
BLOCK = 32


def unfold_ref(
    table: torch.Tensor,
    *,
    merge: int,
    raster: bool,
    class_token: bool,
    window: int,
    side: int,
    align_corners: bool,
    taps: int,
    tile: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor | None, ...]:
    """places [2, rows] (y, x); tap_index, tap_weight [rows, taps]; source [rows]; tiles, windows [n, 4].

    A tile or window is (q0, q1, k0, k1). Windows: Qwen2.5-VL (arXiv 2502.13923). Taps: as
    torch.nn.functional.interpolate; a class token and the frames of a clip have rows of their own behind the table's
    side * side.
    """
    frames, sources, tiles, windows, row, patch = [], [], [], [], 0, 0
    images = table[HEADER:].view(-1, FIELDS)[: int(table[IMAGES])].tolist()
    for t, h, w, _, _, _, per_segment, *_ in images:
        own: list[tuple[int, int, int, int]] = []
        tiles.append(own)
        grid = torch.arange(h * w, device=table.device).view(h, w)
        blocks = grid.view(h // merge, merge, w // merge, merge).transpose(1, 2).flatten(2)
        place = torch.empty_like(grid).flatten()  # where pixel_values has the patch at (y, x)
        place[grid.flatten() if raster else blocks.flatten()] = grid.flatten()
        span = window // merge if window else max(h, w)
        cut = [b.flatten() for band in blocks.split(span, 0) for b in band.split(span, 1)] if window else [blocks]
        order = torch.cat([b.flatten() for b in cut])
        for frame in range(t):
            y, x = (F.pad(i, (int(class_token), 0)) for i in (order // w, order % w))
            frames.append((y, x, h, w, frame if t > 1 else -1))
            sources.append(F.pad(patch + frame * h * w + place[order], (int(class_token), 0), value=-1))
            ends = torch.tensor([row, *(b.numel() for b in cut)]).cumsum(0).tolist()
            windows += [(a, b, a, b) for a, b in itertools.pairwise(ends)]
            if frame % per_segment == 0:
                end = row + per_segment * (h * w + class_token)
                own += [(q0, min(q0 + tile, end), row, end) for q0 in range(row, end, tile)]
            row += h * w + class_token
        patch += t * h * w

    places = torch.stack([torch.cat([y for y, *_ in frames]), torch.cat([x for _, x, *_ in frames])]).to(dtype)
    index = weight = None
    if taps:
        pairs = [_taps(*frame, side, align_corners, taps, class_token, dtype) for frame in frames]
        index, weight = (torch.cat(column) for column in zip(*pairs, strict=True))
    ranked = [span for *_, number in images for span in tiles[number]]
    spans = [torch.tensor(s, dtype=torch.int32, device=table.device) for s in (ranked, windows)]
    return places, None if index is None else index.int(), weight, torch.cat(sources).int(), *spans


def _taps(
    y: torch.Tensor, x: torch.Tensor, h: int, w: int, frame: int,
    side: int, align_corners: bool, taps: int, class_token: bool, dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Indices and weights [rows of a frame, taps] into the position table."""
    n = 4 if taps >= 16 else 2
    (rows, high), (columns, wide) = (_axis_taps(i, s, side, align_corners, n, dtype) for i, s in ((y, h), (x, w)))
    index = (rows[:, :, None] * side + columns[:, None, :]).flatten(1)
    weight = (high[:, :, None] * wide[:, None, :]).flatten(1)
    if taps > n * n:  # the frame's own row; weight 0 in a clip of one frame
        index = torch.cat([index, torch.full_like(index[:, :1], side * side + max(frame, 0))], 1)
        weight = torch.cat([weight, torch.full_like(weight[:, :1], float(frame >= 0))], 1)
    if class_token:  # the row behind the grid, alone
        index[0], weight[0] = 0, 0
        index[0, 0], weight[0, 0] = side * side, 1
    return index, weight


def _axis_taps(
    i: torch.Tensor, size: int, side: int, align_corners: bool, n: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """n = 2: linear; n = 4: Keys' cubic kernel with a = -0.75."""
    i = i.to(dtype)
    source = i * (side - 1) / max(size - 1, 1) if align_corners else (i + 0.5) * side / size - 0.5
    if n == 2 and not align_corners:
        source = source.clamp(min=0)
    low = source.floor()
    u = source - low
    if n == 2:
        weights = [1 - u, u]
    else:
        a = -0.75
        near = [((a + 2) * d - (a + 3)) * d * d + 1 for d in (u, 1 - u)]
        far = [((a * d - 5 * a) * d + 8 * a) * d - 4 * a for d in (u + 1, 2 - u)]
        weights = [far[0], *near, far[1]]
    taps = low[:, None] + torch.arange(n, device=i.device) - n // 4
    return taps.clamp(0, side - 1).long(), torch.stack(weights, 1)


def unfold(
    places: torch.Tensor | None,
    tap_index: torch.Tensor | None,
    tap_weight: torch.Tensor | None,
    source: torch.Tensor | None,
    tiles: torch.Tensor,
    windows: torch.Tensor | None,
    table: torch.Tensor,
    *,
    merge: int,
    raster: bool,
    class_token: bool,
    window: int,
    side: int,
    align_corners: bool,
    taps: int,
    tile: int,
) -> None:
    """Launch. places [2, rows] fp32; taps [rows, taps] int32 and fp32; source int32; tiles [tiles, 4]."""
    images = (table.numel() - HEADER) // FIELDS
    capacity = 0 if places is None else places.shape[1]
    most = max(capacity, *(len(t) for t in (tap_index, source, tiles, windows) if t is not None))
    unfold_kernel[(triton.cdiv(most, BLOCK),)](
        places, tap_index, tap_weight, source, tiles, windows, table, capacity,
        MERGE=merge, RASTER=raster, CLASS=int(class_token), WINDOW=window // merge,
        SIDE=side, ALIGN_CORNERS=align_corners, TAPS=taps, TILE=tile,
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
def window_bounds(n, h, w, SPAN: tl.constexpr):
    """First block of the n-th window of a frame of h x w blocks, its size, and where it is: windows of SPAN x SPAN."""
    across = (w + SPAN - 1) // SPAN
    band, column = n // across, n % across
    high, wide = tl.minimum(SPAN, h - band * SPAN), tl.minimum(SPAN, w - column * SPAN)
    return band * SPAN * w + column * SPAN * high, high, wide


@triton.jit
def block_place(block, h, w, SPAN: tl.constexpr):
    """Row and column of the block that runs as number `block` in a frame of h x w blocks. SPAN 0: row by row."""
    if SPAN == 0:
        y, x = block // w, block % w
    else:
        band = block // (SPAN * w)
        high = tl.minimum(SPAN, h - band * SPAN)
        within = block - band * SPAN * w
        column = within // (high * SPAN)
        wide = tl.minimum(SPAN, w - column * SPAN)
        within -= column * high * SPAN
        y, x = band * SPAN + within // wide, column * SPAN + within % wide
    return y, x


@triton.jit
def axis_source(i, size, SIDE: tl.constexpr, ALIGN_CORNERS: tl.constexpr, CUBIC: tl.constexpr):
    """Where in a table of SIDE entries place i of `size` lies."""
    if ALIGN_CORNERS:
        place = i.to(tl.float32) * (SIDE - 1) / tl.maximum(size - 1, 1).to(tl.float32)
    else:
        place = (i.to(tl.float32) + 0.5) * SIDE / size.to(tl.float32) - 0.5
        if not CUBIC:
            place = tl.maximum(place, 0.0)
    return place


@triton.jit
def tap_weight(u, TAP: tl.constexpr, CUBIC: tl.constexpr):
    """Weight of one axis's tap at distance u behind the first whole place: linear, or Keys' cubic with a = -0.75."""
    d = tl.abs(u + (1 - TAP))
    if not CUBIC:
        weight = u if TAP == 1 else 1.0 - u
    elif TAP == 1 or TAP == 2:
        weight = (1.25 * d - 2.25) * d * d + 1.0
    else:
        weight = ((-0.75 * d + 3.75) * d - 6.0) * d + 3.0
    return weight


@triton.jit
def unfold_kernel(
    places_ptr,                                # [2, capacity] fp32, or None
    tap_index_ptr, tap_weight_ptr,             # [rows, TAPS] int32, fp32, or None
    source_ptr,                                # [rows] int32, or None
    tiles_ptr, windows_ptr,                    # [tiles, 4] int32; None without windows
    table_ptr, capacity,                       # int32
    MERGE: tl.constexpr, RASTER: tl.constexpr, CLASS: tl.constexpr, WINDOW: tl.constexpr,
    SIDE: tl.constexpr, ALIGN_CORNERS: tl.constexpr, TAPS: tl.constexpr, TILE: tl.constexpr, SEARCH_STEPS: tl.constexpr,
    HEADER: tl.constexpr, FIELDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows, images, tiles, windows = (
        tl.load(table_ptr), tl.load(table_ptr + 2), tl.load(table_ptr + 3), tl.load(table_ptr + 4)
    )  # fmt: skip

    # rows: which frame, and where in it
    mask = i < rows
    image = find_image(table_ptr, i, images, 3, SEARCH_STEPS, HEADER, FIELDS)
    t, h, w = tl.load(image), tl.load(image + 1), tl.load(image + 2)
    frame, within = (i - tl.load(image + 3)) // (h * w + CLASS), (i - tl.load(image + 3)) % (h * w + CLASS) - CLASS
    patch = tl.maximum(within, 0)
    block, inner = patch // (MERGE * MERGE), patch % (MERGE * MERGE)
    block_y, block_x = block_place(block, h // MERGE, w // MERGE, WINDOW)
    y, x = block_y * MERGE + inner // MERGE, block_x * MERGE + inner % MERGE

    if source_ptr is not None:
        place = y * w + x if RASTER else (block_y * (w // MERGE) + block_x) * (MERGE * MERGE) + inner
        source = tl.load(image + 4) + frame * h * w + place
        tl.store(source_ptr + i, tl.where(within < 0, -1, source), mask=mask)

    if places_ptr is not None:
        tl.store(places_ptr + i, y.to(tl.float32), mask=mask)
        tl.store(places_ptr + capacity + i, x.to(tl.float32), mask=mask)

    if TAPS > 0:
        CUBIC: tl.constexpr = TAPS >= 16
        N: tl.constexpr = 4 if CUBIC else 2
        source_y, source_x = (
            axis_source(y, h, SIDE, ALIGN_CORNERS, CUBIC),
            axis_source(x, w, SIDE, ALIGN_CORNERS, CUBIC),
        )
        low_y, low_x = tl.floor(source_y), tl.floor(source_x)
        tap = i.to(tl.int64) * TAPS
        for a in tl.static_range(N):
            for b in tl.static_range(N):
                high = tl.minimum(tl.maximum(low_y.to(tl.int32) + (a - N // 4), 0), SIDE - 1)
                wide = tl.minimum(tl.maximum(low_x.to(tl.int32) + (b - N // 4), 0), SIDE - 1)
                index = high * SIDE + wide
                weight = tap_weight(source_y - low_y, a, CUBIC) * tap_weight(source_x - low_x, b, CUBIC)
                if CLASS:  # a class token has the row behind the grid
                    alone = 1.0 if a + b == 0 else 0.0
                    index = tl.where(within < 0, SIDE * SIDE if a + b == 0 else 0, index)
                    weight = tl.where(within < 0, alone, weight)
                tl.store(tap_index_ptr + tap + a * N + b, index, mask=mask)
                tl.store(tap_weight_ptr + tap + a * N + b, weight, mask=mask)
        if TAPS > N * N:  # the rows behind the grid are the frames of a clip
            tl.store(tap_index_ptr + tap + N * N, SIDE * SIDE + frame, mask=mask)
            tl.store(tap_weight_ptr + tap + N * N, tl.where(t > 1, 1.0, 0.0), mask=mask)

    # tiles: which query rows against which segment
    mask_t = i < tiles
    rank = find_image(table_ptr, i, images, 8, SEARCH_STEPS, HEADER, FIELDS)
    image = table_ptr + HEADER + tl.load(rank + 9) * FIELDS
    length = (tl.load(image + 1) * tl.load(image + 2) + CLASS) * tl.load(image + 6)
    per_segment = (length + TILE - 1) // TILE
    nth = i - tl.load(rank + 8)
    k0 = tl.load(image + 3) + nth // per_segment * length
    q0 = k0 + nth % per_segment * TILE
    store_tile(tiles_ptr, i, q0, tl.minimum(q0 + TILE, k0 + length), k0, k0 + length, mask_t)

    if windows_ptr is not None:
        mask_w = i < windows
        image = find_image(table_ptr, i, images, 7, SEARCH_STEPS, HEADER, FIELDS)
        h, w = tl.load(image + 1) // MERGE, tl.load(image + 2) // MERGE
        per_frame = (h + WINDOW - 1) // WINDOW * ((w + WINDOW - 1) // WINDOW)
        nth = i - tl.load(image + 7)
        first, high, wide = window_bounds(nth % per_frame, h, w, WINDOW)
        k0 = tl.load(image + 3) + (nth // per_frame * h * w + first) * (MERGE * MERGE)
        k1 = k0 + high * wide * (MERGE * MERGE)
        store_tile(windows_ptr, i, k0, k1, k0, k1, mask_w)


@triton.jit
def store_tile(ptr, i, q0, q1, k0, k1, mask):
    tl.store(ptr + i * 4, q0, mask=mask)
    tl.store(ptr + i * 4 + 1, q1, mask=mask)
    tl.store(ptr + i * 4 + 2, k0, mask=mask)
    tl.store(ptr + i * 4 + 3, k1, mask=mask)
