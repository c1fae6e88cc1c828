"""Calls with anything in them: a result of the right shape or one InputError, and the next call is right again."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_vit
from fused_vit.errors import InputError
from tests.towers_hf import random_pixels, tiny_tower

GRID = [[1, 4, 6], [2, 6, 4]]
FEATURES = 96  # 3 channels x 2 frames x 4 x 4

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
anything = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner), max_leaves=12)
sides = st.integers(-2, 9)
nearly = st.lists(st.lists(sides, min_size=2, max_size=4), max_size=4)
valid = st.lists(st.tuples(st.integers(1, 3), st.sampled_from([2, 4, 6]), st.sampled_from([2, 4, 6])), max_size=4)
integers = st.sampled_from([torch.uint8, torch.int8, torch.int32, torch.int64, torch.float32, torch.bool])
tensors = st.tuples(valid, integers).map(lambda pair: torch.tensor(pair[0]).to(pair[1]))
floats = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.complex64])
shapes = st.lists(st.sampled_from([0, 1, 2, 4, 24, 72, FEATURES]), max_size=3)


@pytest.fixture(scope="module")
def vit() -> fused_vit.FusedViT:
    return fused_vit.FusedViT.from_module(tiny_tower(seed=0), device="cpu")


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return random_pixels(GRID, FEATURES, 0)


@pytest.fixture(scope="module")
def want(vit: fused_vit.FusedViT, pixels: torch.Tensor) -> torch.Tensor:
    out = vit(pixels, GRID).pooler_output
    assert isinstance(out, torch.Tensor)
    return out


@settings(max_examples=400, deadline=None)
@given(grid=anything | nearly | valid | tensors)
def test_any_grid(vit: fused_vit.FusedViT, pixels: torch.Tensor, want: torch.Tensor, grid: object) -> None:
    rows = 72
    with contextlib.suppress(TypeError, ValueError, OverflowError):  # pixels that fit, where the grid is one
        rows = sum(int(t) * int(h) * int(w) for t, h, w in grid)  # type: ignore[attr-defined]
    own = pixels[:1].expand(rows if 0 < rows < 1000 else 72, FEATURES)
    try:
        out = vit(own, grid)  # type: ignore[arg-type]
        assert len(out.last_hidden_state) == rows and 4 * len(out.pooler_output) == rows
    except InputError as error:
        assert str(error)
    assert torch.equal(vit(pixels, GRID).pooler_output, want)


@settings(max_examples=200, deadline=None)
@given(shape=shapes, dtype=floats)
def test_any_pixels(
    vit: fused_vit.FusedViT, pixels: torch.Tensor, want: torch.Tensor, shape: list[int], dtype: torch.dtype
) -> None:
    try:
        out = vit(torch.ones(shape).to(dtype), GRID)
        assert len(out.last_hidden_state) == 72 and dtype.is_floating_point
    except InputError as error:
        assert str(error)
    assert torch.equal(vit(pixels, GRID).pooler_output, want)
