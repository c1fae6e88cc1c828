"""Packing: from a grid of images to packs that fit a bucket, and to the small integer table that travels to the GPU.

The host does arithmetic per image only; everything per row (coordinates, segment bounds, attention tiles) is unfolded
on the device by kernels.unfold from this table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .buckets import Bucket
from .errors import InputError
from .spec import TowerSpec

HEADER = 8  # rows, merged rows, images, segments, attention tiles, 3 unused
FIELDS = 8  # frames t, height h, width w, first row, first segment, frames per segment, first tile, 1 unused


@dataclass(frozen=True, slots=True)
class Item:
    """Some frames of one image or clip that run together. `rows` counts patches."""

    t: int
    h: int
    w: int
    frames_per_segment: int

    @property
    def rows(self) -> int:
        return self.t * self.h * self.w

    @property
    def segments(self) -> int:
        return self.t // self.frames_per_segment


def items(spec: TowerSpec, grid: Sequence[Sequence[int]], rows: int) -> list[Item]:
    """Check a grid [images, 3] of (t, h, w) in patches against the rows of pixel_values.

    Raises InputError naming the image, what was got, and the remedy.
    """
    m = spec.merger.size
    if not len(grid):
        raise InputError("grid_thw is empty; expected [images, 3] with at least one image")
    for i, (t, h, w) in enumerate(grid):
        if t <= 0 or h <= 0 or w <= 0:
            raise InputError(f"image {i}: grid_thw is ({t}, {h}, {w}); expected positive frames, height and width")
        if h % m or w % m:
            raise InputError(
                f"image {i}: grid_thw is ({t}, {h}, {w}); height and width must be multiples of the merge size {m} "
                "(resize the image as the processor does)"
            )
    total = sum(t * h * w for t, h, w in grid)
    if total != rows:
        raise InputError(
            f"pixel_values has {rows} rows but grid_thw describes {total} patches in {len(grid)} images; "
            "pass the pixel_values and the grid of the same processor call"
        )
    clip = spec.attention.segments == "clip"
    return [Item(t, h, w, t if clip else 1) for t, h, w in grid]


def split(all_items: Sequence[Item], largest: Bucket) -> list[list[Item]]:
    """Consecutive packs that fit the largest bucket, in order.

    A clip whose frames attend only within themselves is cut between frames where it would not fit.
    A single segment larger than the bucket becomes a pack of its own.
    """
    packs: list[list[Item]] = [[]]
    tokens = segments = 0
    for item in all_items:
        frame, left = item.frames_per_segment * item.h * item.w, item.segments
        while left:
            room = min((largest.tokens - tokens) // frame, largest.segments - segments, left)
            if room <= 0 and packs[-1]:
                packs.append([])
                tokens = segments = 0
                continue
            take = max(room, 1)
            packs[-1].append(Item(take * item.frames_per_segment, item.h, item.w, item.frames_per_segment))
            tokens, segments, left = tokens + take * frame, segments + take, left - take
    return packs


def table(pack: Sequence[Item], merge: int, tile: int) -> list[int]:
    """The integers that the device needs: a header of counts, then FIELDS for each item. `tile` is in query rows."""
    fields: list[int] = []
    row = segment = first_tile = 0
    for item in pack:
        fields += [item.t, item.h, item.w, row, segment, item.frames_per_segment, first_tile, 0]
        row, segment = row + item.rows, segment + item.segments
        first_tile += item.segments * -(-item.frames_per_segment * item.h * item.w // tile)
    return [row, row // (merge * merge), len(pack), segment, first_tile, 0, 0, 0, *fields]
