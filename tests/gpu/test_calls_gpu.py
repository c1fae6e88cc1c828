"""Calls with anything in them on a GPU: each gives the bits of the plain call, or one error before any launch.

They are drawn as in tests/test_calls.py; CALLS=10000 is the full length (make soak).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from fused_vit import FusedViT
from tests.gpu.towers import DEVICE, flat
from tests.test_calls import (
    FEATURES,
    GRID,
    SHORT,
    VIEWS,
    any_grid,
    any_pixels,
    anything,
    floats,
    fuzz,
    nearly,
    shapes,
    tensors,
)
from tests.towers_hf import random_pixels, tiny_tower

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
FUZZ = int(os.environ.get("CALLS", SHORT))
BUCKETS = [(64, 4), (96, 8)]  # of what is drawn some is split, and some larger than either
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **VIEWS,
    "one row for all": lambda x: x[:1].expand_as(x),
    "one number for all": lambda x: x[:1, :1].expand_as(x),
}
NOT_OF_BYTES = {"patches with their dims", "with a gradient", "a parameter", "of a graph", "double", "a negative view"}
SPELLINGS: dict[str, Callable[[Any], Any]] = {
    "lists": lambda grid: grid,
    **{
        f"{dtype} on {place}": lambda grid, dtype=dtype, place=place: torch.tensor(grid, dtype=dtype, device=place)
        for dtype in (torch.int32, torch.int64)
        for place in ("cpu", DEVICE)
    },
}
CONTENTS = {"NaN": float("nan"), "Inf": float("inf"), "-Inf": float("-inf"), "zero": 0.0, "large": 6e4}

sides = st.sampled_from([2, 4, 10]), st.sampled_from([2, 6, 12])
grids = st.lists(st.tuples(st.integers(1, 3), *sides), min_size=1, max_size=4)
spellings, places = st.sampled_from(sorted(SPELLINGS)), st.sampled_from(["cpu", DEVICE])
contents = st.sampled_from(["numbers", *CONTENTS])
kinds = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


@pytest.fixture(scope="module")
def vit() -> FusedViT:
    tower = tiny_tower(seed=0, hidden_size=128, intermediate_size=256, out_hidden_size=32)
    return FusedViT.from_module(tower, device=DEVICE, dtype=torch.bfloat16, buckets=BUCKETS).warmup()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return random_pixels(GRID, FEATURES, 0).to(DEVICE)


@pytest.fixture(scope="module")
def want(vit: FusedViT, pixels: torch.Tensor) -> torch.Tensor:
    out = vit(pixels, GRID).pooler_output
    assert isinstance(out, torch.Tensor)
    return out


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Packs that ran."""
    packs: list[Any] = []
    run_pack = FusedViT._run_pack

    def watched(vit: FusedViT, pixels: torch.Tensor, pack: Any, outputs: Any) -> Any:
        packs.append(pack)
        return run_pack(vit, pixels, pack, outputs)

    monkeypatch.setattr(FusedViT, "_run_pack", watched)
    return packs


def alike(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    """The same bits, or both NaN."""
    pairs = list(zip(ours, theirs, strict=True))
    return all(torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def test_any_layout_of_anything_gives_the_bits_of_the_plain_call(vit: FusedViT, record_property: Any) -> None:
    """The first image has numbers that poison sums, and the plain call the encoder's own dtype."""

    def test(grid: list[tuple[int, int, int]], layout: str, dtype: torch.dtype, spelling: str, content: str) -> bool:
        drawn = random_pixels(grid, FEATURES, 1).to(DEVICE, dtype)
        t, h, w = grid[0]
        if content in CONTENTS:
            drawn[: t * h * w] = CONTENTS[content]
        given = LAYOUTS[layout](drawn)
        plain = given.detach().reshape(-1, FEATURES).to(vit.dtype).contiguous()
        return alike(flat(vit(given, SPELLINGS[spelling](grid))), flat(vit(plain, grid)))

    fuzz(
        record_property, lambda **drawn: test(**drawn) or pytest.fail(f"{drawn}"), FUZZ,
        grid=grids, layout=st.sampled_from(sorted(LAYOUTS)), dtype=kinds, spelling=spellings, content=contents,
    )  # fmt: skip
    assert vit.stats()["oversize_calls"] and all(b["replays"] for b in vit.stats()["buckets"].values())


def test_calls_of_one_grid_in_a_queue_keep_their_own_addresses(vit: FusedViT) -> None:
    """The grid's table, kept on the host, is written again by each while the device is still busy with others."""
    drawn = [random_pixels(GRID, FEATURES, seed).to(DEVICE, vit.dtype) for seed in range(32)]
    want = [flat(vit(pixels, GRID)) for pixels in drawn]
    busy = torch.randn(8192, 8192, device=DEVICE)
    for _ in range(4):
        busy @ busy  # some 20 ms each, in fp32
    got = [flat(vit(pixels, GRID)) for pixels in drawn]
    assert all(alike(a, b) for a, b in zip(got, want, strict=True))


def test_any_layout_of_bytes_gives_the_bits_of_the_plain_call(vit: FusedViT, record_property: Any) -> None:
    """In the tower that normalises."""
    of_bytes = vit.for_bytes((0.5, 0.4, 0.3), (0.5, 0.3, 0.2)).warmup()
    features = of_bytes.spec.patch.features
    generator = torch.Generator().manual_seed(0)

    def test(grid: list[tuple[int, int, int]], layout: str, spelling: str) -> bool:
        rows = sum(t * h * w for t, h, w in grid)
        given = LAYOUTS[layout](
            torch.randint(0, 256, (rows, features), generator=generator, dtype=torch.uint8).to(DEVICE)
        )
        return alike(flat(of_bytes(given, SPELLINGS[spelling](grid))), flat(of_bytes(given.contiguous(), grid)))

    fuzz(
        record_property, lambda **drawn: test(**drawn) or pytest.fail(f"{drawn}"), FUZZ,
        grid=grids, layout=st.sampled_from(sorted(LAYOUTS.keys() - NOT_OF_BYTES)), spelling=spellings,
    )  # fmt: skip


def test_any_grid_gives_a_result_or_one_error(
    vit: FusedViT, pixels: torch.Tensor, want: torch.Tensor, launched: list[Any], record_property: Any
) -> None:
    """On the CPU and on the GPU."""

    def test(grid: Any, place: str) -> bool:
        launched.clear()
        result = any_grid(vit, pixels, want, grid.to(place) if isinstance(grid, torch.Tensor) else grid)
        assert result or len(launched) == 1, "what is refused runs nothing, and the next call one pack"
        return result

    fuzz(record_property, test, FUZZ, grid=anything | nearly | tensors, place=places)


def test_any_pixels_give_a_result_or_one_error(
    vit: FusedViT, pixels: torch.Tensor, want: torch.Tensor, launched: list[Any], record_property: Any
) -> None:
    """On the CPU too, which is the wrong place."""

    def test(shape: list[int], dtype: torch.dtype, place: str) -> bool:
        launched.clear()
        result = any_pixels(vit, pixels, want, torch.ones(shape).to(place, dtype))
        assert len(launched) == 1 + result, "what is refused runs nothing, and the next call one pack"
        return result

    fuzz(record_property, test, FUZZ, shape=shapes, dtype=floats, place=places)
