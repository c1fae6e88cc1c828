"""The encoder's public face on a CPU: loading real shards, outputs, bad input, buckets, closing."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import os
import pickle
import re
import sys
import threading
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fused_vit
from fused_vit import source
from fused_vit.buckets import Bucket, as_buckets, choose, ladder
from fused_vit.devices import device_of
from fused_vit.encoder import GRIDS
from fused_vit.errors import InputError
from fused_vit.executor import define
from fused_vit.turns import Turns
from tests.towers_hf import random_pixels, tiny_tower

GRID = [[1, 4, 6], [2, 6, 4]]


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
    for attempt in (vit.warmup, lambda: vit(pixels, GRID)):
        with pytest.raises(ValueError, match="closed"):
            attempt()


@pytest.mark.parametrize("device", ["banana", "cuda:x", "mps", "cuda", "cuda:99", 1.5, ["cpu"]])
def test_a_device_that_is_not_there_is_one_error(tower, device: Any) -> None:  # type: ignore[no-untyped-def]
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("it is there")
    with pytest.raises(ValueError, match=f"device is .*{re.escape(str(device))}"):
        fused_vit.FusedViT.from_module(tower, device=device)


def test_a_gpu_that_the_kernels_do_not_run_on_is_one_error(tower, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    for name, value in (("is_available", True), ("device_count", 2), ("current_device", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (7, 5))
    with pytest.raises(InputError, match=r"cuda:1 has compute capability 7\.5; supported: 8\.0 and newer, or cpu"):
        device_of("cuda")
    for found in ((8, 0), (8, 9), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place, found=found: found)
        assert device_of("cuda") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.version, "hip", "7.2.1")
    with pytest.raises(InputError, match=r"torch is built for ROCm \(7\.2\.1\); supported: CUDA, or cpu"):
        fused_vit.FusedViT.from_module(tower, device="cuda:0")
    assert device_of("cpu").type == "cpu"


def test_closing_while_another_calls_leaves_its_result_right(tower, pixels, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    vit = fused_vit.FusedViT.from_module(tower, device="cpu")
    want = vit(pixels, GRID).pooler_output
    runs, closed = threading.Event(), threading.Event()

    def slow(*about: Any) -> Any:
        runs.set()
        assert closed.wait(60)
        return define(*about)

    monkeypatch.setattr(fused_vit.encoder, "define", slow)
    with ThreadPoolExecutor(1) as thread:
        call = thread.submit(vit, pixels, GRID)
        assert runs.wait(60)
        vit.close()
        closed.set()
        assert torch.equal(call.result().pooler_output, want)
    with pytest.raises(ValueError, match="closed"):
        vit(pixels, GRID)


def test_stats_count_photographs_as_bytes_too(vit) -> None:  # type: ignore[no-untyped-def]
    before, photo = vit.stats(), torch.zeros(24, vit.spec.patch.features // 2, dtype=torch.uint8)
    vit.for_bytes((0.5,) * 3, (0.5,) * 3)(photo, [[1, 4, 6]])
    found = {key: count - before[key] for key, count in vit.stats().items() if key in ("calls", "images", "rows")}
    assert found == {"calls": 1, "images": 1, "rows": 24}


def test_stats_may_be_asked_while_others_count(vit, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(vit, "_replays", Counter())
    stop, interval = threading.Event(), sys.getswitchinterval()

    def count() -> None:
        for tokens in itertools.count(1):
            if stop.is_set():
                return
            vit._replays[Bucket(tokens % 5000, 1)] += 1
            if tokens % 5000 == 0:
                vit._replays.clear()

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as thread:
            counting = thread.submit(count)
            for _ in range(300):
                vit.stats()
            stop.set()
            counting.result()
    finally:
        stop.set()
        sys.setswitchinterval(interval)


def test_closing_twice_is_closing(tower) -> None:  # type: ignore[no-untyped-def]
    vit = fused_vit.FusedViT.from_module(tower, device="cpu")
    vit.close()
    vit.close()


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda way: way.__name__)
def test_an_encoder_is_not_copied(vit, way) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TypeError, match="load it again where it is needed"):
        way(vit)


def test_a_forked_process_is_told_to_load_its_own(tower, pixels, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    vit, parent = fused_vit.FusedViT.from_module(tower, device="cpu"), os.getpid()
    want = vit(pixels, GRID).pooler_output
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    assert torch.equal(vit(pixels, GRID).pooler_output, want), "a CPU survives a fork"
    vit._turns.device = torch.device("cuda", 0)
    for attempt in (vit.warmup, lambda: vit(pixels, GRID)):
        with pytest.raises(ValueError, match=f"process {parent}.*spawn"):
            attempt()
    vit.close()
    assert vit.weights, "what is the parent's is not closed"


def test_too_little_memory_to_load_says_how_much_it_takes(tower, vit, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def short(*about: object, **more: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate a tensor")

    monkeypatch.setattr(source, "pack_tower", short)
    with pytest.raises(torch.OutOfMemoryError, match=r"take about .* bytes of cpu.*tried to allocate") as caught:
        fused_vit.FusedViT.from_module(tower, device="cpu")
    said = int(str(caught.value).split("about ")[1].split(" ")[0])
    assert 0.5 * vit.weight_bytes < said < vit.weight_bytes  # tiny: what pads its matrices is as large as they are


def test_memory_is_let_go_once_nothing_runs_in_it(tower, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """What is still there at every wait: of a slab that is outgrown, then of an encoder that nobody holds."""
    vit = fused_vit.FusedViT.from_module(tower, device="cpu")
    waits: list[tuple[bool, bool]] = []
    monkeypatch.setattr(Turns, "wait", lambda _: waits.append((slab() is not None, weight() is not None)))
    vit._grown(Bucket(64, 4))
    assert vit._oversize is not None
    slab, weight = weakref.ref(vit._oversize.slab), weakref.ref(vit.weights["patch_embed.weight"])
    vit._grown(Bucket(64, 2))
    assert slab() is not None and not waits, "it is large enough"
    vit._grown(Bucket(4096, 64))
    assert slab() is None and waits == [(True, True)]
    del vit
    assert weight() is None and waits == [(True, True), (False, True)]


def test_an_encoder_that_nobody_holds_is_freed_at_once(tower, pixels) -> None:  # type: ignore[no-untyped-def]
    """By its last reference, not by a garbage collection some time later: it holds gigabytes."""
    gc.disable()
    try:
        vit = fused_vit.FusedViT.from_module(tower, device="cpu")
        vit(pixels, GRID)
        alive = weakref.ref(vit)
        del vit
        assert alive() is None
    finally:
        gc.enable()


def test_calls_of_any_size_do_not_grow(vit, record_property) -> None:  # type: ignore[no-untyped-def]
    """Resident memory after a third of the calls and after all of them."""
    calls = int(os.environ.get("CALLS", "600"))
    random = torch.Generator().manual_seed(0)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    sizes = []
    for i in range(calls):
        grid = [[1, 2 * int(h), 2 * int(w)] for h, w in torch.randint(1, 9, (1 + i % 4, 2), generator=random)]
        vit(random_pixels(grid, 96, i), grid)
        if i in (calls // 3, calls - 1):
            gc.collect()
            sizes.append(resident())
    record_property("calls", calls)
    record_property("grown_mib", round((sizes[1] - sizes[0]) / 2**20, 1))
    assert sizes[1] - sizes[0] < 24 * 2**20, sizes
    assert vit._batch.cache_info().currsize <= GRIDS


def test_ladders_and_choices() -> None:
    assert [b.tokens for b in ladder(1100)] == [64, 128, 256, 512, 640, 768, 896, 1024, 1100]
    assert [b.tokens for b in ladder(16384)][-8:] == [5120, 6144, 7168, 8192, 10240, 12288, 14336, 16384]
    assert [b.segments for b in ladder(3072)][-4:] == [28, 32, 40, 48]
    assert [b.segments for b in ladder(3072, windowed=True)][-4:] == [56, 64, 80, 96]
    buckets = as_buckets([4096, (256, 2), Bucket(1024, 8), 4096])
    assert buckets == (Bucket(256, 2), Bucket(1024, 8), Bucket(4096, 64))
    assert choose(buckets, 200, 2) == buckets[0] and choose(buckets, 200, 3) == buckets[1]
    assert choose(buckets, 4097, 1) is None and choose(buckets, 4, 65) is None


@pytest.mark.parametrize(
    "buckets", [5, [], [0], [-4], [2.5], ["ab"], [(256,)], [(256, 4, 1)], [(2.5, 4)], [(256, 0)], [True], [None], [3]],
    ids=str,
)  # fmt: skip
def test_a_bad_bucket_is_one_error(tower, buckets: Any) -> None:  # type: ignore[no-untyped-def]
    """3 patches hold no image of this tower; with graphs, its rows would be written behind the buffers."""
    with pytest.raises(InputError, match="bucket"):
        fused_vit.FusedViT.from_module(tower, device="cpu", buckets=buckets)


@pytest.mark.parametrize("most", [0, -1, 100.5, "x", None])
def test_a_bad_largest_size_is_one_error(tower, most: Any) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="max_tokens is"):
        fused_vit.FusedViT.from_module(tower, device="cpu", max_tokens=most)


def test_grids_of_many_images_are_not_kept(vit) -> None:  # type: ignore[no-untyped-def]
    """1024 of 1024 images each took 190 MiB."""
    before = vit._batch.cache_info().currsize
    for images, kept in ((64, 1), (65, 1), (65, 1)):
        vit(torch.zeros(4 * images, 96), [[1, 2, 2]] * images)
        assert vit._batch.cache_info().currsize == before + kept
