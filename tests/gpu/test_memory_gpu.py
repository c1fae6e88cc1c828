"""Device memory is planned and flat, and running out of it costs one call, not the encoder."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from fused_vit import FusedViT
from fused_vit.buckets import Bucket
from fused_vit.workspace import place
from tests.families import FAMILIES, build
from tests.gpu.towers import DEVICE, encoder, flat, pixels_of, same

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
MIB = 1 << 20
SMALL, LARGE = [[1, 16, 16]], [[1, 128, 128]]  # LARGE takes a workspace of 402 MiB and outputs of 100
ALONE = "PYTEST_XDIST_WORKER" not in os.environ  # else the device's free memory is other processes' business too


@triton.jit
def one_kernel(x_ptr):
    tl.store(x_ptr, 1.0)


def state() -> dict[str, int]:
    """Bytes that torch has given out and holds, that the device has used, and that this process has resident."""
    gc.collect()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "device": total - free,
        "host": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
    }


def predicted(vit: FusedViT, bucket: Bucket) -> int:
    return place(vit.plan().lean(), bucket, vit.dtype.itemsize, vit.tile)[1]


@contextmanager
def no_more_than(spare: int) -> Iterator[None]:
    """torch may take `spare` bytes of the device beyond what it holds; of an error too, nothing stays behind.

    What it holds is full: a segment stays whole as long as other tests' tensors lie in a part of it.
    """
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total, held = torch.cuda.mem_get_info()[1], torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(held / total)
    filled = list(_whatever_fits(held))
    torch.cuda.set_per_process_memory_fraction((held + spare) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        filled.clear()
        gc.collect()


def _whatever_fits(size: int) -> Iterator[torch.Tensor]:
    while size >= MIB:
        try:
            yield torch.empty(size, dtype=torch.uint8, device=DEVICE)
        except torch.OutOfMemoryError:
            size //= 2


def test_calls_of_any_size_do_not_grow(monkeypatch: pytest.MonkeyPatch, record_property: Any) -> None:
    """After a third of CALLS and after all of them: torch's memory, the device's, the host's; nothing was compiled.

    Allocated is equal to the byte; reserved, and the device's where no other process is on it, within 64 MiB, which is
    what outputs of other sizes may leave of one another; resident within 32 MiB, as the cached batches fill up. Fails
    where a call keeps a tensor, makes a graph of its own, or specializes a kernel by a size.
    """
    calls, draw = int(os.environ.get("CALLS", "300")), random.Random(0)
    vit = encoder(buckets=[256, 1024, 2304, (4096, 64)]).warmup()
    beyond = [[1, 68, 64]]
    pixels = pixels_of(vit, beyond)
    loaded: list[str] = []  # kernels, compiled or from a cache
    monkeypatch.setattr(triton.knobs.runtime, "kernel_load_end_hook", lambda _, __, name, *___: loaded.append(name))
    one_kernel[(1,)](torch.zeros(1, device=DEVICE))
    assert loaded.pop().startswith("one_kernel"), "else the hook sees nothing"
    vit(pixels, beyond)
    loaded.clear()  # plain launches of another size may be kernels of their own
    seen, graphs = [], vit.stats()["graphs"]
    for i in range(calls):
        sides = [(2 * draw.randint(1, 16), 2 * draw.randint(1, 16)) for _ in range(draw.randint(1, 4))]
        grid = [[1, h, w] for h, w in sides] if draw.random() < 0.98 else beyond
        vit(pixels[: sum(t * h * w for t, h, w in grid)], grid)
        if i in (calls // 3, calls - 1):
            seen.append(state())
    grown = {name: seen[1][name] - seen[0][name] for name in seen[0]}
    record_property("calls", calls)
    record_property("allocated_grown_bytes", grown["allocated"])
    for name in ("reserved", "host", *(["device"] if ALONE else [])):
        record_property(f"{name}_grown_mib", round(grown[name] / MIB, 1))
    record_property("kernels_loaded", len(loaded))
    assert not loaded and vit.stats()["graphs"] == graphs == 4
    assert grown["allocated"] == 0 and grown["reserved"] < 64 * MIB and grown["host"] < 32 * MIB, grown
    assert not ALONE or grown["device"] < 64 * MIB, grown


def test_the_workspace_takes_what_the_plan_says() -> None:
    """To the byte, for the buckets and beyond them; torch rounds it up by less than 2 MiB, and graphs add nothing."""
    vit = encoder(buckets=[256, (1024, 16), (4096, 64)])
    assert vit.workspace_bytes == 0
    torch.cuda.empty_cache()
    before, size = state()["allocated"], vit.predicted_bytes
    assert size == predicted(vit, Bucket(4096, 64))
    vit.warmup()
    assert vit.workspace_bytes == vit.stats()["workspace_bytes"] == size
    assert size <= state()["allocated"] - before < size + 2 * MIB
    vit(pixels_of(vit, [[1, 68, 64]]), [[1, 68, 64]])
    assert vit.workspace_bytes == size + predicted(vit, Bucket(68 * 64, 1))


def test_closing_frees_what_loading_and_calls_took() -> None:
    """All of it, but for what torch keeps for itself; the first round makes that."""
    left = []
    for _ in range(3):
        vit = encoder(buckets=[256, (1024, 16)]).warmup()
        vit(pixels_of(vit, SMALL), SMALL)
        vit(pixels_of(vit, [[1, 40, 40]]), [[1, 40, 40]])  # beyond the buckets
        held = state()["allocated"]
        assert held - (left[-1] if left else 0) > vit.weight_bytes
        vit.close()
        left.append(state()["allocated"])
    assert left[1] == left[2], left


def test_too_little_memory_to_load_says_how_much_and_leaves_nothing() -> None:
    """Fails where an error keeps half a tower, or names only the one tensor that did not fit."""
    family = next(family for family in FAMILIES if family.name == "Qwen3-VL")
    fields = {**family.real, "depth": 1, "deepstack_visual_indexes": [0]}
    tower = build(replace(family, real=fields), real=True)

    def load() -> FusedViT:
        return FusedViT.from_module(tower, device=DEVICE, dtype=torch.bfloat16, buckets=[256])

    vit = load()
    pixels, size = pixels_of(vit, SMALL), vit.weight_bytes
    want = flat(vit(pixels, SMALL))
    vit.close()
    before = state()["allocated"]
    with no_more_than(32 * MIB):
        with pytest.raises(torch.OutOfMemoryError, match="the tower's weights take about") as caught:
            load()
        said = int(str(caught.value).split("about ")[1].split(" ")[0])
        del caught
    assert state()["allocated"] == before and 0.9 * size < said < 1.1 * size
    assert same(flat(load()(pixels, SMALL)), want)


def test_too_little_memory_to_capture_says_how_much_and_leaves_nothing() -> None:
    """Fails where a workspace or a graph that could not be made is kept as if it had been."""
    vit = encoder(buckets=[(128 * 128, 64)])
    pixels = pixels_of(vit, SMALL)
    want = flat(encoder(buckets=[256])(pixels, SMALL))
    size, before = predicted(vit, vit.buckets[0]), state()["allocated"]
    with no_more_than(64 * MIB):
        for attempt in (vit.warmup, lambda: vit(pixels, SMALL)):
            with pytest.raises(torch.OutOfMemoryError, match=f"takes {size} bytes of cuda:0"):
                attempt()
        assert vit.stats()["graphs"] == vit.workspace_bytes == 0
    assert state()["allocated"] == before
    assert same(flat(vit(pixels, SMALL)), want) and vit.workspace_bytes == size


def test_too_little_memory_for_a_large_call_costs_only_that_call() -> None:
    """The buckets go on while there is none, and the call when there is. Fails where a slab is half let go."""
    vit = encoder(buckets=[256]).warmup()
    middle = [[1, 48, 48]]  # beyond the bucket, but not beyond what is left
    small, between, large = (pixels_of(vit, grid) for grid in (SMALL, middle, LARGE))
    reference = encoder(buckets=[(128 * 128, 64)])
    want = [flat(reference(p, g)) for p, g in ((small, SMALL), (between, middle), (large, LARGE))]
    reference.close()
    assert same(flat(vit(small, SMALL)), want[0]) and same(flat(vit(between, middle)), want[1])
    size = predicted(vit, Bucket(128 * 128, 1))
    with no_more_than(224 * MIB):  # enough for the outputs
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError, match=f"takes {size} bytes of cuda:0.*send fewer patches"):
                vit(large, LARGE)
            assert same(flat(vit(small, SMALL)), want[0]) and same(flat(vit(between, middle)), want[1])
    assert same(flat(vit(large, LARGE)), want[2]) and same(flat(vit(small, SMALL)), want[0])


def test_too_little_memory_for_the_outputs_costs_only_that_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where the end of a call that failed is not recorded, or its lock is kept."""
    vit = encoder(buckets=[(1024, 16)]).warmup()
    grid = [[1, 30, 32]]
    pixels = pixels_of(vit, grid)
    want = flat(vit(pixels, grid))

    def short(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory for an output")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", short)
        with pytest.raises(torch.OutOfMemoryError, match="for an output"):
            vit(pixels, grid)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert same(flat(vit(pixels, grid)), want)
