"""Batch: a checked grid of images and the packs that it runs in: what a call knows before it looks at the pixels.

Images of a size ask for the same batch again and again, and building one costs 20 us, 60 where the processor has gone
cold, so an encoder keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .buckets import Bucket, choose
from .packing import Item, items, split, table
from .spec import TowerSpec


@dataclass(slots=True)
class Pack:
    """Images, or frames of one, that run together."""

    pixels: int  # rows of pixel_values
    sizes: dict[str, int]  # rows and merged rows
    segments: int
    bucket: Bucket | None  # None: a segment larger than any
    table: torch.Tensor  # int32, pinned: torch gives that memory to nobody else before the copies from it are done
    views: Views | None = None  # of the bucket's buffers, once it ran there


@dataclass(frozen=True, slots=True)
class Views:
    """Where in a bucket's buffers a pack goes, and its part of every output (None: the tower has none such)."""

    table: torch.Tensor
    pixels: torch.Tensor
    results: Sequence[torch.Tensor | None]

    def fill(self, pixels: torch.Tensor, pack: Pack) -> None:
        """Pixels first: the device copies them while the host asks for the rest."""
        self.pixels.copy_(pixels)
        self.table.copy_(pack.table, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Batch:
    """items: every image; packs: none where the definition runs it whole; sizes: of all of them."""

    items: tuple[Item, ...]
    rows: tuple[int, ...]
    merged: tuple[int, ...]
    sizes: dict[str, int]
    packs: tuple[Pack, ...]


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
    return Pack(
        sum(item.pixel_rows for item in pack), sizes, segments, choose(buckets, sizes["rows"], segments),
        torch.tensor(table(pack, tile), dtype=torch.int32, pin_memory=True),
    )  # fmt: skip


def _sizes(pack: Sequence[Item]) -> dict[str, int]:
    return {"rows": sum(item.rows for item in pack), "merged": sum(item.merged for item in pack)}
