"""Calls with anything in them: each is right, or one clear error that costs the next call nothing.

FUZZ=10000 is the full length of the fuzzed ones (make fuzz).
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.masked import masked_tensor

import fused_vit
from fused_vit.errors import InputError
from tests.towers_hf import random_pixels, tiny_tower

GRID = [[1, 4, 6], [2, 6, 4]]
ROWS, FEATURES = 72, 96  # 3 channels x 2 frames x 4 x 4
SHORT = 300  # calls of a fuzzed test, the same ones every time
FUZZ = int(os.environ.get("FUZZ", SHORT))


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


# --- bad ones ---

X = torch.zeros(ROWS, FEATURES)
G = torch.tensor(GRID)
with warnings.catch_warnings():  # of torch, that it will have neither for ever
    warnings.simplefilter("ignore")
    QUANTIZED = torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)
    QUANTIZED_GRID = torch.quantize_per_tensor(G.float(), 1.0, 0, torch.qint8)
    MASKED, MASKED_GRID = masked_tensor(X, X == 0), masked_tensor(G, G > 0)
with FakeTensorMode():
    FAKE, FAKE_GRID = torch.zeros(ROWS, FEATURES), torch.zeros(1, 3, dtype=torch.int64)
FREED, CUT = X.clone(), X.clone()
FREED.untyped_storage().resize_(0)  # as sharded training does with parameters
CUT.untyped_storage().resize_(ROWS * FEATURES * 4 - 1)
BAD_PIXELS: dict[str, tuple[Any, str]] = {
    "none": (None, "NoneType"),
    "a list": (X.tolist(), "list"),
    "an array": (X.numpy(), "ndarray"),
    "a number": (0.5, "float"),
    "a word": ("pixels", "str"),
    "bytes": (b"pixels", "bytes"),
    "a dict": ({"pixel_values": X}, "dict"),
    "a tuple of tensors": ((X, X), "tuple"),
    "no dims": (torch.tensor(0.5), r"shape \[\]"),
    "1-d": (X[0], r"shape \[96\]"),
    "3-d": (X[None], r"shape \[1, 72, 96\]"),
    "4-d": (X.view(1, 1, ROWS, FEATURES), "shape"),
    "transposed": (X.T, r"shape \[96, 72\]"),
    "too narrow": (X[:, :-1], r"shape \[72, 95\]; expected \[patches, 96\]"),
    "too wide": (torch.zeros(ROWS, FEATURES + 1), r"shape \[72, 97\]"),
    "no columns": (X[:, :0], r"shape \[72, 0\]"),
    "no rows": (X[:0], "0 rows.*72 patches"),
    "one row too few": (X[:-1], "71 rows.*72 patches"),
    "one row too many": (torch.zeros(ROWS + 1, FEATURES), "73 rows.*72 patches"),
    "twice the rows": (torch.zeros(2 * ROWS, FEATURES), "144 rows"),
    "patches whose dims are in another order": (X.view(ROWS, 2, 3, 4, 4), "shape"),
    "patches without frames": (torch.zeros(ROWS, 3, 4, 4), "shape"),
    "whole images": (torch.zeros(2, 3, 24, 24), "shape"),
    "int32": (X.int(), "int32.*floating point"),
    "int64": (X.long(), "int64"),
    "uint8": (X.byte(), "uint8.*normalised by the processor"),
    "bool": (X.bool(), "bool"),
    "complex": (X.to(torch.complex64), "complex64"),
    "four bits": (torch.zeros(ROWS, FEATURES // 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "float4"),
    "quantized": (QUANTIZED, "qint8"),
    "masked": (MASKED, "MaskedTensor"),
    "fake": (FAKE, "FakeTensor"),
    "on meta": (X.to("meta"), "meta"),
    "sparse": (X.to_sparse(), "sparse"),
    "sparse columns": (X.to_sparse(1), "sparse"),
    "nested": (torch.nested.nested_tensor([X], layout=torch.jagged), "nested"),
    "whose memory was freed": (FREED, "storage"),
    "whose memory was cut by a byte": (CUT, "storage"),
}
BAD_GRIDS: dict[str, tuple[Any, str]] = {
    "none": (None, "grid_thw"),
    "a number": (72, "grid_thw"),
    "a word": ("1x4x6", "grid_thw"),
    "a dict": ({"grid": GRID}, "grid_thw"),
    "of nothing": ([[None, 4, 6]], "grid_thw"),
    "of words": ([["a", "b", "c"]], "grid_thw"),
    "ragged": ([[1, 4, 6], [2, 6]], "grid_thw"),
    "flat": ([1, 4, 6], "grid_thw"),
    "empty list": ([], "shape"),
    "of empty lists": ([[], []], "shape"),
    "empty tensor": (torch.zeros(0, 3, dtype=torch.int64), "empty"),
    "one column": (G[:, :1], "shape"),
    "two columns": ([[6, 12]], "shape"),
    "four columns": (torch.ones(2, 4, dtype=torch.int64), "shape"),
    "1-d tensor": (G[0], "shape"),
    "3-d tensor": (G[None], "shape"),
    "no dims": (torch.tensor(3), "shape"),
    "float": (G.float(), "integers"),
    "half": (G.half(), "integers"),
    "bool": (torch.ones(2, 3, dtype=torch.bool), "integers"),
    "complex": (G.to(torch.complex64), "integers"),
    "complex in lists": ([[1 + 0j, 4, 6], [2, 6, 4]], "complex64; expected integers"),
    "quantized": (QUANTIZED_GRID, "qint8"),
    "seven bits": (G.to(torch.uint8).view(torch.uint7), "uint7"),
    "bits": (G.to(torch.uint8).view(torch.bits8), "bits8"),
    "masked": (MASKED_GRID, "MaskedTensor"),
    "fake": (FAKE_GRID, "FakeTensor"),
    "a million words": ([["x"] * 10**6], r"^.{,200}$"),
    "fractions": ([[1.0, 4.5, 6.0]], "integers"),
    "not a number": ([[1.0, float("nan"), 6.0]], "integers"),
    "on meta": (G.to("meta"), "dense"),
    "sparse": (G.to_sparse(), "dense"),
    "nested": (torch.nested.nested_tensor([G], layout=torch.jagged), "dense"),
    "zero frames": ([[1, 4, 6], [0, 6, 4]], "image 1"),
    "zero height": ([[1, 0, 6], [2, 6, 4]], "image 0"),
    "zero width": ([[1, 4, 0], [2, 6, 4]], "image 0"),
    "all zero": ([[0, 0, 0]], "image 0"),
    "negative height": ([[1, -4, 6], [2, 6, 4]], "image 0"),
    "two negatives": ([[1, -4, -6], [2, 6, 4]], "image 0"),
    "negative in a small integer": (torch.tensor([[1, -4, 6], [2, 6, 4]], dtype=torch.int8), "image 0"),
    "odd height": ([[1, 4, 6], [2, 3, 8]], "image 1.*multiples"),
    "odd width": ([[1, 8, 3], [2, 6, 4]], "image 0.*multiples"),
    "one patch": ([[1, 1, 1]], "image 0.*multiples"),
    "an image too many": ([*GRID, [1, 2, 2]], "72 rows.*76 patches"),
    "an image too few": (GRID[:1], "72 rows.*24 patches"),
    "an image twice": ([*GRID, GRID[1]], "72 rows.*120 patches in 3 images"),
    "a frame too many": ([[1, 4, 6], [3, 6, 4]], "72 rows.*96 patches"),
    "beyond 32 bits": ([[1 << 31, 2, 2]], "rows"),
    "a product beyond 64 bits": ([[1 << 40, 1 << 20, 1 << 20]], "rows"),
    "more rows than 32 bits count": ([[1 << 31, 2, 2]], "at most 1073741824"),
    "of sets, which have no order": ([{1, 4, 6}, [2, 6, 4]], "grid_thw"),
    "a set": ({(1, 4, 6), (2, 6, 4)}, "grid_thw"),
    "an integer beyond 64 bits": ([[1 << 70, 2, 2]], "grid_thw"),
}
CALLS = {
    **{f"pixels: {name}": (bad, GRID, says) for name, (bad, says) in BAD_PIXELS.items()},
    **{f"grid: {name}": (X, bad, says) for name, (bad, says) in BAD_GRIDS.items()},
}
CALLS["grid: more rows than 32 bits count"] = (
    X[:1].expand(1 << 33, FEATURES),
    *BAD_GRIDS["more rows than 32 bits count"],
)


@pytest.mark.parametrize("name", CALLS)
def test_a_bad_call_is_one_clear_value_error_and_costs_nothing(
    vit: fused_vit.FusedViT, pixels: torch.Tensor, want: torch.Tensor, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything runs."""
    bad, grid, message = CALLS[name]
    with monkeypatch.context() as patch, pytest.raises(InputError, match=message):
        patch.setattr(fused_vit.encoder, "define", lambda *_: pytest.fail("it ran"))
        vit(bad, grid)
    assert torch.equal(vit(pixels, GRID).pooler_output, want)


def test_there_are_at_least_sixty() -> None:
    assert len(CALLS) >= 60


# --- unusual ones that are right ---


def unaligned(x: torch.Tensor) -> torch.Tensor:
    """The same numbers 17 elements into another storage."""
    storage = x.new_zeros(x.numel() + 17)
    storage[17:] = x.flatten()
    return storage[17:].view(x.shape)


def inference(x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return x.clone()


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda x: x,
    "columns first in memory": lambda x: x.T.contiguous().T,
    "every second row": lambda x: torch.stack([x, -x], 1).flatten(0, 1)[::2],
    "every second column": lambda x: torch.stack([x, -x], 2).flatten(1)[:, ::2],
    "part of wider rows": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
    "unaligned": unaligned,
    "patches with their dims": lambda x: x.view(-1, 3, 2, 4, 4),
    "with a gradient": lambda x: x.clone().requires_grad_(),
    "a parameter": lambda x: torch.nn.Parameter(x),
    "of a graph": lambda x: x.clone().requires_grad_() * 1,
    "of inference mode": inference,
    "double": lambda x: x.double(),
    "a negative view": lambda x: torch._neg_view(-x),
}


@pytest.mark.parametrize("name", VIEWS)
def test_any_view_of_the_same_numbers_gives_the_same_bits(
    vit: fused_vit.FusedViT, pixels: torch.Tensor, want: torch.Tensor, name: str
) -> None:
    out = vit(VIEWS[name](pixels), GRID).pooler_output
    assert torch.equal(out, want) and not out.requires_grad


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, torch.enable_grad, autocast], ids=lambda m: m.__name__
)
def test_modes_change_nothing(vit: fused_vit.FusedViT, pixels: torch.Tensor, want: torch.Tensor, mode: Any) -> None:
    with mode():
        assert torch.equal(vit(pixels, GRID).pooler_output, want)


GRIDS: dict[str, Any] = {
    "tuples": tuple(map(tuple, GRID)),
    "an array": np.array(GRID),
    "tensors": list(torch.tensor(GRID)),
    "whole floats in lists": GRID,
    "columns first in memory": torch.tensor(GRID).T.contiguous().T,
    "every second row": torch.tensor([[1, 4, 6], [9, 9, 9], [2, 6, 4]])[::2],
    **{str(dtype): torch.tensor(GRID, dtype=dtype) for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32)},
}


@pytest.mark.parametrize("name", GRIDS)
def test_any_grid_of_the_same_integers_gives_the_same_bits(
    vit: fused_vit.FusedViT, pixels: torch.Tensor, want: torch.Tensor, name: str
) -> None:
    assert torch.equal(vit(pixels, GRIDS[name]).pooler_output, want)


def test_inputs_may_be_overwritten_after_the_call(vit: fused_vit.FusedViT, pixels: torch.Tensor) -> None:
    x, grid = pixels.clone(), torch.tensor(GRID)
    out = vit(x, grid)
    before = [t.clone() for t in (out.last_hidden_state, out.pooler_output, *out.deepstack_features)]
    x.fill_(float("nan"))
    grid.fill_(-1)
    vit(pixels.flip(0), GRID)
    after = [out.last_hidden_state, out.pooler_output, *out.deepstack_features]
    assert all(map(torch.equal, before, after))


# --- fuzzed ones ---

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.text(max_size=3)
anything = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner), max_leaves=12)
sides = st.integers(-2, 9)
nearly = st.lists(st.lists(sides, min_size=2, max_size=4), max_size=4)
valid = st.lists(
    st.tuples(st.integers(1, 3), st.sampled_from([2, 4, 6]), st.sampled_from([2, 4, 6])), min_size=1, max_size=4
)
integers = st.sampled_from([torch.uint8, torch.int8, torch.int32, torch.int64, torch.float32, torch.bool])
tensors = st.tuples(valid, integers).map(lambda pair: torch.tensor(pair[0]).to(pair[1]))
floats = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.complex64])
shapes = st.just([ROWS, FEATURES]) | st.lists(st.sampled_from([ROWS, FEATURES]) | st.integers(0, 130), max_size=3)
layouts = st.sampled_from(sorted(VIEWS))


def fuzz(record: Callable[[str, Any], None], test: Callable[..., bool], count: int = FUZZ, **strategies: Any) -> None:
    """test(**drawn) `count` times; how many were results and how many errors goes into the report."""
    found: Counter[str] = Counter()

    @settings(max_examples=count, deadline=None, database=None, derandomize=count == SHORT)
    @given(**strategies)
    def one(**drawn: Any) -> None:
        found["results" if test(**drawn) else "errors"] += 1

    one()
    assert sum(found.values()) >= count, f"only {found} are different"
    for kind, times in found.items():
        record(kind, times)


def any_grid(vit: fused_vit.FusedViT, pixels: torch.Tensor, want: torch.Tensor, grid: Any) -> bool:
    """Whether it gives a result: with as many rows as it says, or one error; and the next call is right."""
    rows = ROWS
    with contextlib.suppress(TypeError, ValueError, OverflowError):  # pixels that fit, where the grid is one
        rows = sum(int(t) * int(h) * int(w) for t, h, w in grid)
    try:
        out = vit(pixels[:1].expand(rows if 0 < rows < 1000 else ROWS, FEATURES), grid)
        assert len(out.last_hidden_state) == rows and 4 * len(out.pooler_output) == rows
        return True
    except InputError as error:
        assert "grid_thw" in str(error)
        return False
    finally:
        assert torch.equal(vit(pixels, GRID).pooler_output, want)


def any_pixels(vit: fused_vit.FusedViT, pixels: torch.Tensor, want: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether they give a result, as those do that fit GRID; the others one error; and the next call is right."""
    right = list(given.shape) == [ROWS, FEATURES] and given.is_floating_point() and given.device == vit.device
    try:
        out = vit(given, GRID)
        assert right and len(out.last_hidden_state) == ROWS
    except InputError as error:
        assert not right and "pixel_values" in str(error)
    assert torch.equal(vit(pixels, GRID).pooler_output, want)
    return right


def test_every_grid_of_whole_blocks_gives_its_rows(vit: fused_vit.FusedViT, record_property: Any) -> None:
    def test(grid: list[tuple[int, int, int]]) -> bool:
        rows = sum(t * h * w for t, h, w in grid)
        out = vit(random_pixels(grid, FEATURES, 0), grid)
        assert len(out.last_hidden_state) == rows and 4 * len(out.pooler_output) == rows
        return bool(out.last_hidden_state.isfinite().all())

    fuzz(record_property, test, grid=valid)


def test_any_grid_gives_a_result_or_one_error(
    vit: fused_vit.FusedViT, pixels: torch.Tensor, want: torch.Tensor, record_property: Any
) -> None:
    fuzz(record_property, lambda grid: any_grid(vit, pixels, want, grid), grid=anything | nearly | tensors)


def test_any_pixels_give_a_result_or_one_error(
    vit: fused_vit.FusedViT, pixels: torch.Tensor, want: torch.Tensor, record_property: Any
) -> None:
    def test(shape: list[int], dtype: torch.dtype) -> bool:
        return any_pixels(vit, pixels, want, torch.ones(shape).to(dtype))

    fuzz(record_property, test, shape=shapes, dtype=floats)


def test_any_grid_in_any_layout_gives_the_bits_of_the_plain_one(vit: fused_vit.FusedViT, record_property: Any) -> None:
    def test(grid: list[tuple[int, int, int]], layout: str) -> bool:
        plain = random_pixels(grid, FEATURES, 1)
        ours, theirs = vit(VIEWS[layout](plain), torch.tensor(grid)), vit(plain, grid)
        return torch.equal(ours.pooler_output, theirs.pooler_output)

    fuzz(record_property, lambda **drawn: test(**drawn) or pytest.fail(f"{drawn}"), grid=valid, layout=layouts)
