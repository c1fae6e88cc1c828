"""Batch: a checked grid of images and the packs that it runs in: what a call knows before it looks at the pixels.

Images of a size ask for the same batch again and again, and building one costs 20 us, 60 where the processor has gone
cold, so an encoder keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .buckets import Bucket, choose
from .packing import CELL, COUNTS, HEADER, Item, items, split, table
from .spec import TowerSpec

KEPT_IMAGES = 64  # of a grid that is kept, 0.2 KB each; tables of larger ones, used once, are pinned
ALIGNED = 16  # bytes: what kernels load at once


@dataclass(slots=True)
class Pack:
    """Images, or frames of one, that run together."""

    pixels: int  # rows of pixel_values
    sizes: dict[str, int]  # rows and merged rows
    segments: int
    bucket: Bucket | None  # None: a segment larger than any
    table: torch.Tensor  # int32
    cells: memoryview  # the table's addresses, 64 bits each, to be set without a call of torch
    views: Views | None = None  # of the bucket's buffers, once it ran there


@dataclass(frozen=True, slots=True)
class Views:
    """Where in a bucket's buffers a pack goes; of every output its cell in the table, or its place in the buffers."""

    table: torch.Tensor
    pixels: torch.Tensor
    cells: Sequence[int]  # 0: none
    results: Sequence[torch.Tensor | None]

    def fill(self, pixels: torch.Tensor, outputs: Sequence[torch.Tensor | None], pack: Pack) -> None:
        """Send the table with the addresses of pixels and outputs. Pixels that kernels cannot read in place are copied.

        The driver reads a small table of pageable memory before the copy returns, so that the next call may write its
        own addresses while the device still works for this one: a test queues 32 of one grid.
        """
        like = pixels.dtype == self.pixels.dtype and pixels.stride() == self.pixels.stride()
        address = pixels.data_ptr() if like and not pixels.is_neg() else 0
        if not address or address % ALIGNED:
            self.pixels.copy_(pixels)
            address = self.pixels.data_ptr()
        cells = pack.cells
        cells[0] = address
        for cell, output in zip(self.cells, outputs, strict=True):
            if cell and output is not None:
                cells[cell] = output.data_ptr()
        self.table.copy_(pack.table, non_blocking=True)


@dataclass(slots=True)
class Batch:
    """items: every image; packs: none where the definition runs it whole; sizes: of all of them.

    outputs: something of the shape, dtype and device of each, once the first call made it.
    """

    items: tuple[Item, ...]
    rows: tuple[int, ...]
    merged: tuple[int, ...]
    sizes: dict[str, int]
    packs: tuple[Pack, ...]
    outputs: Sequence[torch.Tensor | None] | None = None


def make_batch(
    spec: TowerSpec, buckets: Sequence[Bucket], tile: int | None, grid: Sequence[Sequence[int]], pixels: int
) -> Batch:
    """A grid [images, 3] against `pixels` rows of pixel_values; tile: query rows of attention, None on a CPU.

    Raises InputError naming the image, what was got, and the remedy.
    """
    found = items(spec, grid, pixels)
    packs = () if tile is None else tuple(_pack(buckets, tile, pack) for pack in split(found, buckets[-1]))
    rows, merged = tuple(item.rows for item in found), tuple(item.merged for item in found)
    return Batch(tuple(found), rows, merged, _sizes(found), packs)


def _pack(buckets: Sequence[Bucket], tile: int, pack: Sequence[Item]) -> Pack:
    sizes, segments = _sizes(pack), sum(item.segments for item in pack)
    integers = torch.tensor(table(pack, tile), dtype=torch.int32, device="cpu", pin_memory=len(pack) > KEPT_IMAGES)
    cells = integers[COUNTS:HEADER].view(torch.int64)[:: CELL // 2].numpy().data
    bucket = choose(buckets, sizes["rows"], segments)
    return Pack(sum(item.pixel_rows for item in pack), sizes, segments, bucket, integers, cells)


def _sizes(pack: Sequence[Item]) -> dict[str, int]:
    return {"rows": sum(item.rows for item in pack), "merged": sum(item.merged for item in pack)}
