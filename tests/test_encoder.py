"""The encoder's public face on a CPU: loading real shards, outputs, bad input, buckets, closing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fused_vit
from fused_vit.buckets import Bucket, as_buckets, choose, ladder
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
