"""Packing: every row once, in order, in packs that fit; the table adds up."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fused_vit.buckets import Bucket
from fused_vit.packing import FIELDS, HEADER, Item, split, table

KINDS = ("frame", "clip", "class token", "windows")


def item(kind: str, t: int, h: int, w: int) -> Item:
    h, w = 2 * h, 2 * w
    if kind == "clip":
        return Item(t, h, w, t, pooled=t)
    windows = -(-h // 8) * -(-w // 8) if kind == "windows" else 0
    return Item(t, h, w, extra=int(kind == "class token"), windows=windows)


ITEMS = st.lists(
    st.builds(item, st.sampled_from(KINDS), st.integers(1, 9), st.integers(1, 12), st.integers(1, 12)),
    min_size=1, max_size=12,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(ITEMS, st.integers(4, 900), st.integers(1, 20))
def test_packs_hold_every_frame_once_in_order_and_fit(all_items: list[Item], tokens: int, segments: int) -> None:
    packs = split(all_items, Bucket(tokens, segments))
    frames = [(i.h, i.w) for pack in packs for i in pack for _ in range(i.t)]
    assert frames == [(i.h, i.w) for i in all_items for _ in range(i.t)]
    for pack in packs:
        rows, count = sum(i.rows for i in pack), sum(i.segments for i in pack)
        assert pack and all(i.t % i.frames_per_segment == 0 for i in pack)
        whole = len(pack) == 1 and pack[0].t == pack[0].frames_per_segment
        assert (rows <= tokens and count <= segments) or whole


@settings(max_examples=300, deadline=None)
@given(ITEMS, st.sampled_from([32, 64, 128, 1 << 30]))
def test_the_table_adds_up(pack: list[Item], tile: int) -> None:
    values = table(pack, tile)
    rows, merged, images, tiles, windows, *_ = values
    fields = [values[HEADER + i * FIELDS :][:FIELDS] for i in range(images)]
    assert len(values) == HEADER + FIELDS * len(pack) and images == len(pack)
    assert rows == sum(i.rows for i in pack) and merged == sum(i.h * i.w * i.t // i.pooled // 4 for i in pack)
    lengths = [i.frames_per_segment * i.frame_rows for i in pack for _ in range(i.t // i.frames_per_segment)]
    assert sum(lengths) == rows and tiles == sum(-(-n // tile) for n in lengths) <= rows // tile + len(lengths)
    assert windows == sum(i.t * i.windows for i in pack) <= sum(i.segments for i in pack)
    row = patch = pooled = window = 0
    for i, field in zip(pack, fields, strict=True):
        assert field[:8] == [i.t, i.h, i.w, row, patch, pooled, i.frames_per_segment, window]
        row, patch, pooled = row + i.t * (i.h * i.w + i.extra), patch + i.t * i.h * i.w, pooled + i.merged
        window += i.t * i.windows
    assert sorted(number for *_, number in fields) == list(range(len(pack)))
    first_tile, longest = 0, 1 << 30
    for *_, start, number in fields:  # the longest segments first
        i = pack[number]
        length = i.frames_per_segment * i.frame_rows
        assert start == first_tile and length <= longest
        first_tile, longest = first_tile + i.t // i.frames_per_segment * -(-length // tile), length
    assert first_tile == tiles


@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from([2, 4, 8]))
def test_windowed_pairs_are_the_sum_over_windows(h: int, w: int, side: int) -> None:
    sizes = [min(side, h - y) * min(side, w - x) for y in range(0, h, side) for x in range(0, w, side)]
    assert sum(sizes) == h * w and Item(3, h, w).pairs(True, side) == 3 * sum(n * n for n in sizes)
    assert Item(3, h, w).pairs(False) == 3 * (h * w) ** 2 and Item(3, h, w, 3).pairs(False) == (3 * h * w) ** 2


def test_the_host_and_the_kernel_agree_on_the_tables_layout() -> None:
    from fused_vit import packing, plan
    from fused_vit.kernels import config, unfold
    from fused_vit.weights import pack

    assert (unfold.HEADER, unfold.FIELDS) == (packing.HEADER, packing.FIELDS)
    assert unfold.IMAGES == packing.IMAGES
    assert (config.SUM_COLUMNS, pack.PAD, pack.ALIGN) == (plan.SUM_COLUMNS, plan.PAD, plan.ALIGN)
