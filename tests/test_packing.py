"""Packing: every row once, in order, in packs that fit; the table adds up."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fused_vit.buckets import Bucket
from fused_vit.packing import FIELDS, HEADER, Item, split, table

ITEMS = st.lists(
    st.builds(
        lambda t, h, w, clip: Item(t, 2 * h, 2 * w, t if clip else 1),
        st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.booleans(),
    ),
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
        assert (rows <= tokens and count <= segments) or (len(pack) == 1 and count == 1)


@settings(max_examples=300, deadline=None)
@given(ITEMS, st.sampled_from([32, 64, 128, 1 << 30]))
def test_the_table_adds_up(pack: list[Item], tile: int) -> None:
    values = table(pack, 2, tile)
    rows, merged, images, segments, tiles, *_ = values
    fields = [values[HEADER + i * FIELDS :][:FIELDS] for i in range(images)]
    assert len(values) == HEADER + FIELDS * len(pack) and images == len(pack)
    assert rows == sum(i.rows for i in pack) == 4 * merged and segments == sum(i.segments for i in pack)
    lengths = [i.rows // i.segments for i in pack for _ in range(i.segments)]
    assert tiles == sum(-(-n // tile) for n in lengths) <= rows // tile + segments
    row = segment = first_tile = 0
    for item, field in zip(pack, fields, strict=True):
        assert field == [item.t, item.h, item.w, row, segment, item.frames_per_segment, first_tile, 0]
        row, segment = row + item.rows, segment + item.segments
        first_tile += item.segments * -(-(item.rows // item.segments) // tile)


def test_the_host_and_the_kernel_agree_on_the_tables_layout() -> None:
    from fused_vit import packing, plan
    from fused_vit.kernels import config, unfold
    from fused_vit.weights import pack

    assert (unfold.HEADER, unfold.FIELDS) == (packing.HEADER, packing.FIELDS)
    assert (unfold.ROWS, unfold.MERGED, unfold.TILES) == (plan.ROWS, plan.MERGED, plan.TILES)
    assert (config.SUM_COLUMNS, pack.PAD) == (plan.SUM_COLUMNS, plan.PAD)
