"""Packing: from a grid of images to packs that fit a bucket, and to the small integer table that travels to the GPU.

The host does arithmetic per image only; everything per row (coordinates, segment bounds, attention tiles) is unfolded
on the device by kernels.unfold from this table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .buckets import Bucket
from .errors import InputError
from .spec import PoolSpec, TowerSpec

COUNTS, CELLS = 8, 16  # rows, merged rows, images, attention tiles, windows, 3 unused; addresses (kernels.address)
CELL = 4  # integers from one address to the next: 16 bytes
HEADER = COUNTS + CELLS * CELL
# of an image: frames t, height h, width w, first: row, patch, merged row; frames per segment, first window; and, of the
# image with the n-th longest segments in the n-th place: its first attention tile, its number
FIELDS = 10
ROWS, MERGED, IMAGES, TILES, WINDOWS = range(5)
MOST_PATCHES = 1 << 30  # of a call: the table's integers have 32 bits, and a class token may stand beside every patch


@dataclass(frozen=True, slots=True)
class Item:
    """Some frames of one image or clip that run together; h and w count patches.

    extra: rows of a frame beside its patches (a class token); windows: of a frame, 0 without windowed attention;
    patches: of a merged row; pooled: frames that share merged rows (1, or t where merged rows are means over a clip).
    """

    t: int
    h: int
    w: int
    frames_per_segment: int = 1
    extra: int = 0
    windows: int = 0
    patches: int = 4
    pooled: int = 1

    @property
    def frame_rows(self) -> int:
        return self.h * self.w + self.extra

    @property
    def segment_rows(self) -> int:
        """Rows that attend to each other, windows aside."""
        return self.frames_per_segment * self.frame_rows

    @property
    def rows(self) -> int:
        """Rows that run: patches and class tokens."""
        return self.t * self.frame_rows

    @property
    def pixel_rows(self) -> int:
        return self.t * self.h * self.w

    @property
    def merged(self) -> int:
        return self.pixel_rows // self.patches // self.pooled

    @property
    def segments(self) -> int:
        """Attention segments; of the smallest kind that the tower has."""
        return self.t // self.frames_per_segment * max(self.windows, 1)

    def pairs(self, windowed: bool, side: int = 0) -> int:
        """Query-key pairs of one head: a measure of attention's work."""
        if not windowed:
            return self.t * self.frames_per_segment * self.frame_rows**2
        high, wide = (
            sum(min(side, n - at) ** 2 for at in range(0, n, side)) for n in (self.h, self.w)
        )  # windows' sides, squared
        return self.t * high * wide


def items(spec: TowerSpec, grid: Sequence[Sequence[int]], rows: int) -> list[Item]:
    """Check a grid [images, 3] of (t, h, w) in patches against the rows of pixel_values.

    Raises InputError naming the image, what was got, and the remedy.
    """
    m = spec.merge
    if not len(grid):
        raise InputError("grid_thw is empty; expected [images, 3] with at least one image")
    frames = spec.position.frames if spec.position else 0
    for i, (t, h, w) in enumerate(grid):
        if t <= 0 or h <= 0 or w <= 0:
            raise InputError(f"image {i}: grid_thw is ({t}, {h}, {w}); expected positive frames, height and width")
        if h % m or w % m:
            raise InputError(
                f"image {i}: grid_thw is ({t}, {h}, {w}); height and width must be multiples of the merge size {m} "
                "(resize the image as the processor does)"
            )
        if frames and t > frames:
            raise InputError(
                f"image {i}: grid_thw is ({t}, {h}, {w}); clips of this tower have at most {frames} frames "
                "(cut longer videos into clips, as the processor does)"
            )
    total = sum(t * h * w for t, h, w in grid)
    if total != rows:
        raise InputError(
            f"pixel_values has {rows} rows but grid_thw describes {total} patches in {len(grid)} images; "
            "pass the pixel_values and the grid of the same processor call"
        )
    if total > MOST_PATCHES:
        raise InputError(
            f"grid_thw describes {total} patches; expected at most {MOST_PATCHES} in a call (send fewer images at once)"
        )
    clip, pool = spec.attention.segments == "clip", isinstance(spec.merger, PoolSpec)
    return [
        Item(t, h, w, t if clip else 1, int(spec.class_token), _windows(spec, h, w), spec.patches, t if pool else 1)
        for t, h, w in grid
    ]


def _windows(spec: TowerSpec, h: int, w: int) -> int:
    windows = spec.attention.windows
    return -(-h // windows.side) * -(-w // windows.side) if windows else 0


def split(all_items: Sequence[Item], largest: Bucket) -> list[list[Item]]:
    """Consecutive packs that fit the largest bucket, in order.

    A clip whose frames attend only within themselves is cut between frames where it would not fit.
    A single segment larger than the bucket becomes a pack of its own.
    """
    packs: list[list[Item]] = [[]]
    tokens = segments = 0
    for item in all_items:
        left = units = item.t // item.frames_per_segment  # what cannot be cut
        rows, parts = item.rows // units, item.segments // units
        while left:
            room = min((largest.tokens - tokens) // rows, (largest.segments - segments) // parts, left)
            if room <= 0 and packs[-1]:
                packs.append([])
                tokens = segments = 0
                continue
            take = max(room, 1)
            whole = take == units  # the usual case, and making an item costs 4 us
            packs[-1].append(item if whole else replace(item, t=take * item.frames_per_segment))
            tokens, segments, left = tokens + take * rows, segments + take * parts, left - take
    return packs


def table(pack: Sequence[Item], tile: int) -> list[int]:
    """The integers that the device needs: a header of counts and of cells for addresses, then FIELDS for each item.

    `tile` is in query rows. Attention tiles are in the order of their segments' lengths, the longest first: the last to
    run are the shortest.
    """
    fields: list[int] = []
    row = patch = merged = first_tile = window = 0
    order = sorted(range(len(pack)), key=lambda i: -pack[i].segment_rows)
    for item, number in zip(pack, order, strict=True):
        fields += [item.t, item.h, item.w, row, patch, merged, item.frames_per_segment, window, first_tile, number]
        row, patch, merged = row + item.rows, patch + item.pixel_rows, merged + item.merged
        window += item.t * item.windows
        ranked = pack[number]
        first_tile += ranked.t // ranked.frames_per_segment * -(-ranked.segment_rows // tile)
    return [row, merged, len(pack), first_tile, window, *[0] * (HEADER - 5), *fields]
