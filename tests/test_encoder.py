"""The encoder's public face on a CPU: loading real shards, outputs, bad input, buckets, closing."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import fused_vit
from fused_vit.buckets import Bucket, as_buckets, choose, ladder
from fused_vit.errors import InputError
from tests.towers_hf import random_pixels, tiny_tower

GRID = [[1, 4, 6], [2, 6, 4]]
FEATURES = 96  # 3 channels x 2 frames x 4 x 4


@pytest.fixture(scope="module")
def tower() -> torch.nn.Module:
    return tiny_tower(seed=0)


@pytest.fixture(scope="module")
def vit(tower: torch.nn.Module) -> fused_vit.FusedViT:
    return fused_vit.FusedViT.from_module(tower, device="cpu")


@pytest.fixture(scope="module")
def pixels(vit: fused_vit.FusedViT) -> torch.Tensor:
    return random_pixels(GRID, vit.spec.patch.features, 0)


@pytest.fixture
def checkpoint(tmp_path: Path, tower: torch.nn.Module) -> Path:
    """A folder with two shards and an index, the tower beside a language model's tensors."""
    state = {f"model.visual.{k}": v.clone() for k, v in tower.state_dict().items()}
    state["model.language_model.embed_tokens.weight"] = torch.zeros(8, 8)
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({k: state[k] for k in keys}, tmp_path / shard)
    weight_map = {k: shard for shard, keys in shards.items() for k in keys}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": "qwen3_vl", "vision_config": tower.config.to_dict()}  # type: ignore[operator,union-attr]
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_sharded_checkpoint_gives_the_same_numbers_as_the_module(checkpoint: Path, vit, pixels) -> None:  # type: ignore[no-untyped-def]
    loaded = fused_vit.load(checkpoint, device="cpu")
    assert loaded.spec == vit.spec and loaded.dtype == torch.float32
    ours, theirs = loaded(pixels, GRID), vit(pixels, GRID)
    for a, b in zip(ours.to_tuple()[:2], theirs.to_tuple()[:2], strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()  # not bitwise: folding sums in another order on unaligned file memory


def test_outputs_have_the_documented_shapes_and_split_per_image(vit, pixels) -> None:  # type: ignore[no-untyped-def]
    out = vit(pixels, torch.tensor(GRID))
    assert out.last_hidden_state.shape == (72, vit.spec.width)
    assert out.pooler_output.shape == (18, vit.spec.merger.out)
    assert [f.shape for f in out.deepstack_features] == [out.pooler_output.shape] * len(vit.spec.deepstack)
    parts = out.split()
    assert [len(p) for p in parts] == [6, 12] and torch.equal(torch.cat(parts), out.pooler_output)
    out.pooler_output = tuple(parts)  # Hugging Face's parent assigns it
    assert out["pooler_output"] is out[1] and list(dict(out.items()))[:2] == ["last_hidden_state", "pooler_output"]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
def test_any_integer_grid_and_any_float_pixels_are_accepted(vit, pixels, dtype) -> None:  # type: ignore[no-untyped-def]
    want = vit(pixels, GRID).pooler_output
    assert torch.equal(vit(pixels, torch.tensor(GRID, dtype=dtype)).pooler_output, want)
    assert torch.equal(vit(pixels.double(), [tuple(g) for g in GRID]).pooler_output, want)


def bad_calls(pixels: torch.Tensor) -> dict[str, tuple[object, object, str]]:
    return {
        "pixels are a list": ([[0.0]], GRID, "list"),
        "pixels 1-d": (pixels[0], GRID, "shape"),
        "pixels 3-d": (pixels[None], GRID, "shape"),
        "pixels too narrow": (pixels[:, :-1], GRID, str(FEATURES)),
        "pixels integer": (pixels.int(), GRID, "int32"),
        "pixels elsewhere": (pixels.to("meta"), GRID, "meta"),
        "pixels sparse": (pixels.to_sparse(), GRID, "sparse"),
        "pixels nested": (torch.nested.nested_tensor([pixels], layout=torch.jagged), GRID, "nested"),
        "grid sparse": (pixels, torch.tensor(GRID).to_sparse(), "dense"),
        "grid without values": (pixels, torch.tensor(GRID, device="meta"), "dense"),
        "grid of nothing": (pixels, [[None, 4, 6]], "grid_thw"),
        "grid empty list": (pixels, [], "shape"),
        "grid empty tensor": (pixels[:0], torch.zeros(0, 3, dtype=torch.int64), "empty"),
        "grid two columns": (pixels, [[6, 12]], "shape"),
        "grid ragged": (pixels, [[1, 4, 6], [2, 6]], "grid_thw"),
        "grid of words": (pixels, [["a", "b", "c"]], "grid_thw"),
        "grid none": (pixels, None, "grid_thw"),
        "grid 3-d": (pixels, torch.tensor([GRID]), "shape"),
        "grid float": (pixels, torch.tensor(GRID).float(), "integers"),
        "grid fractions": (pixels, [[1.0, 4.5, 6.0]], "integers"),
        "grid bool": (pixels, torch.ones(2, 3, dtype=torch.bool), "integers"),
        "zero frames": (pixels, [[1, 4, 6], [0, 6, 4]], "image 1"),
        "negative height": (pixels, [[1, -4, 6], [2, 6, 4]], "image 0"),
        "odd height": (pixels, [[1, 4, 6], [2, 3, 8]], "image 1.*multiples"),
        "odd width": (pixels, [[1, 8, 3], [2, 6, 4]], "image 0.*multiples"),
        "too few rows": (pixels[:-1], GRID, "71 rows.*72 patches"),
        "too many patches": (pixels, [*GRID, [1, 2, 2]], "72 rows.*76 patches"),
        "huge": (pixels, [[1 << 40, 1 << 20, 2]], "rows"),
    }


@pytest.mark.parametrize("name", bad_calls(torch.zeros(72, FEATURES)))
def test_a_bad_call_is_one_clear_value_error_and_costs_nothing(vit, pixels, name) -> None:  # type: ignore[no-untyped-def]
    bad, grid, message = bad_calls(pixels)[name]
    want = vit(pixels, GRID).pooler_output
    with pytest.raises(ValueError, match=message):
        vit(bad, grid)
    assert torch.equal(vit(pixels, GRID).pooler_output, want)


def test_nan_stays_in_its_own_image(vit, pixels) -> None:  # type: ignore[no-untyped-def]
    want = vit(pixels, GRID).split()
    poisoned = pixels.clone()
    poisoned[:24] = float("nan")
    got = vit(poisoned, GRID).split()
    assert torch.isnan(got[0]).all() and torch.equal(got[1], want[1])


def test_construction_refuses_what_it_cannot_run(tower) -> None:  # type: ignore[no-untyped-def]
    for arguments, message in (
        ({"dtype": torch.int8}, "int8"), ({"device": "meta"}, "meta"), ({"buckets": []}, "empty"),
        ({"buckets": [(0, 1)]}, "positive"), ({"max_tokens": 0}, "max_tokens"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            fused_vit.FusedViT.from_module(tower, **arguments)  # type: ignore[arg-type]


def test_stats_count_and_a_closed_encoder_says_so(tower, pixels) -> None:  # type: ignore[no-untyped-def]
    vit = fused_vit.FusedViT.from_module(tower, device="cpu").warmup()
    vit(pixels, GRID)
    stats = vit.stats()
    assert (stats["calls"], stats["images"], stats["rows"], vit.backend) == (1, 2, 72, "definition")
    vit.close()
    with pytest.raises(ValueError, match="closed"):
        vit(pixels, GRID)


def test_ladders_and_choices() -> None:
    assert [b.tokens for b in ladder(5000)] == [256, 512, 1024, 2048, 2560, 3072, 3584, 4096, 5000]
    assert [b.tokens for b in ladder(16384)][-8:] == [5120, 6144, 7168, 8192, 10240, 12288, 14336, 16384]
    assert [b.segments for b in ladder(3072)] == [16, 16, 16, 32, 40, 48]
    assert [b.segments for b in ladder(3072, windowed=True)] == [16, 16, 32, 64, 80, 96]
    buckets = as_buckets([4096, (256, 2), Bucket(1024, 8), 4096])
    assert buckets == (Bucket(256, 2), Bucket(1024, 8), Bucket(4096, 64))
    assert choose(buckets, 200, 2) == buckets[0] and choose(buckets, 200, 3) == buckets[1]
    assert choose(buckets, 4097, 1) is None and choose(buckets, 4, 65) is None


# --- calls with anything in them ---

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
anything = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner), max_leaves=12)
sides = st.integers(-2, 9)
nearly = st.lists(st.lists(sides, min_size=2, max_size=4), max_size=4)
valid = st.lists(
    st.tuples(st.integers(1, 3), st.sampled_from([2, 4, 6]), st.sampled_from([2, 4, 6])), min_size=1, max_size=4
)
integers = st.sampled_from([torch.uint8, torch.int8, torch.int32, torch.int64, torch.float32, torch.bool])
tensors = st.tuples(valid, integers).map(lambda pair: torch.tensor(pair[0]).to(pair[1]))
floats = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.complex64])
shapes = st.just([72, FEATURES]) | st.lists(st.sampled_from([0, 1, 2, 4, 24, 72, FEATURES]), max_size=3)


@pytest.fixture(scope="module")
def want(vit: fused_vit.FusedViT, pixels: torch.Tensor) -> torch.Tensor:
    out = vit(pixels, GRID).pooler_output
    assert isinstance(out, torch.Tensor)
    return out


@settings(max_examples=100, deadline=None)
@given(grid=valid)
def test_every_grid_of_whole_blocks_gives_its_rows(vit: fused_vit.FusedViT, grid: list[tuple[int, int, int]]) -> None:
    rows = sum(t * h * w for t, h, w in grid)
    out = vit(random_pixels(grid, FEATURES, 0), grid)
    assert len(out.last_hidden_state) == rows and 4 * len(out.pooler_output) == rows
    assert out.last_hidden_state.isfinite().all()


@settings(max_examples=400, deadline=None)
@given(grid=anything | nearly | tensors)
def test_any_grid_gives_a_result_or_one_error(vit, pixels, want, grid) -> None:  # type: ignore[no-untyped-def]
    rows = 72
    with contextlib.suppress(TypeError, ValueError, OverflowError):  # pixels that fit, where the grid is one
        rows = sum(int(t) * int(h) * int(w) for t, h, w in grid)
    try:
        out = vit(pixels[:1].expand(rows if 0 < rows < 1000 else 72, FEATURES), grid)
        assert len(out.last_hidden_state) == rows and 4 * len(out.pooler_output) == rows
    except InputError as error:
        assert "grid_thw" in str(error)
    assert torch.equal(vit(pixels, GRID).pooler_output, want)


@settings(max_examples=200, deadline=None)
@given(shape=shapes, dtype=floats)
def test_any_pixels_give_a_result_or_one_error(vit, pixels, want, shape, dtype) -> None:  # type: ignore[no-untyped-def]
    right = shape == [72, FEATURES] and dtype.is_floating_point
    try:
        out = vit(torch.ones(shape).to(dtype), GRID)
        assert right and len(out.last_hidden_state) == 72
    except InputError as error:
        assert not right and "pixel_values" in str(error)
    assert torch.equal(vit(pixels, GRID).pooler_output, want)
