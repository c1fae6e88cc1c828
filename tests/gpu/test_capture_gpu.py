"""Captures that fail, or that happen while other threads use the device: no half graph, and the next call is right."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fused_vit import FusedViT, executor
from fused_vit.errors import InputError
from tests.gpu.towers import DEVICE, GRID, done, encoder, flat, pixels_of, python, same

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BUCKETS = [(256, 16), (1024, 16), (2304, 32)]


@pytest.fixture(scope="module")
def truth() -> list[torch.Tensor]:
    vit = encoder(buckets=[(4096, 32)])
    return flat(vit(pixels_of(vit, GRID), GRID))


@contextmanager
def during_capture(at: int, happens: Callable[[], Any]) -> Iterator[list[int]]:
    """Something else happens before the step of that number is captured; how often it did."""
    count, launch_step = [0, 0], executor.launch_step

    def watched(*arguments: Any) -> None:
        if torch.cuda.is_current_stream_capturing():
            count[0] += 1
            if count[0] == at + 1:
                count[1] += 1
                happens()
        launch_step(*arguments)

    executor.launch_step = watched
    try:
        yield count
    finally:
        executor.launch_step = launch_step


def test_a_call_within_a_capture_of_ones_own_is_refused(truth: list[torch.Tensor]) -> None:
    """Before anything happens that would end the capture."""
    vit = encoder(buckets=BUCKETS)
    pixels, count, grid = pixels_of(vit, GRID), torch.zeros(1, device=DEVICE), torch.tensor(GRID, device=DEVICE)
    calls = (lambda: vit(pixels, GRID), lambda: vit(pixels, grid), vit.warmup)
    for number in (1, 2):  # before and after this encoder's own captures
        torch.cuda.synchronize()
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
            count += 1
            for call in calls:
                with pytest.raises(InputError, match="being captured into a CUDA graph; call the encoder before or"):
                    call()
        assert same(flat(vit(pixels, GRID)), truth)
        graph.replay()
        assert count.item() == number


def refuse() -> None:
    raise RuntimeError("a step that fails")


@pytest.mark.parametrize("at", [0, 5, -1], ids=["first step", "middle", "last step"])
def test_a_capture_that_fails_leaves_nothing_behind(truth: list[torch.Tensor], at: int) -> None:
    """The error is the step's own. Fails where half a graph is kept, or the stream or the lock is not let go."""
    vit = encoder(buckets=BUCKETS)
    pixels, stream = pixels_of(vit, GRID), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for attempt in (vit.warmup, lambda: vit(pixels, GRID)):
            with during_capture(at % len(vit.plan().steps), refuse) as count:
                with pytest.raises(RuntimeError, match="a step that fails"):
                    attempt()
                assert count[1] == 1
            assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
            assert vit.stats()["graphs"] == 0 and gc.isenabled()
        assert same(flat(vit(pixels, GRID)), truth)
        assert vit.warmup().stats()["graphs"] == len(BUCKETS) and same(flat(vit(pixels, GRID)), truth)


def broken() -> None:
    """A capture that CUDA itself gives up, as a synchronisation inside it makes it do, in a process of its own."""
    vit = encoder(buckets=BUCKETS)
    pixels, reference = pixels_of(vit, GRID), encoder(buckets=[(4096, 32)])
    want, stream = flat(reference(pixels, GRID)), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        with during_capture(3, lambda: torch.cuda.current_stream().synchronize()) as count:
            try:
                vit(pixels, GRID)
            except RuntimeError as error:
                print("raised:", str(error).splitlines()[0])
        assert count[1] == 1 and torch.cuda.current_stream() == stream and vit.stats()["graphs"] == 0
        assert same(flat(vit(pixels, GRID)), want) and same(flat(vit(pixels, GRID)), want)
        assert vit.warmup().stats()["graphs"] == len(BUCKETS)
    print("right afterwards")


def test_a_capture_that_cuda_gives_up_leaves_nothing_behind() -> None:
    """Fails where torch's capture stream stays the current one."""
    out = done(python("from tests.gpu.test_capture_gpu import broken; broken()"))
    assert "raised:" in out and out.endswith("right afterwards"), out


def in_a_cycle(vit: FusedViT) -> weakref.ref[FusedViT]:
    """Garbage that only a collection frees, with its graphs."""
    vit.myself = vit  # type: ignore[attr-defined]
    return weakref.ref(vit)


def test_no_garbage_is_collected_while_a_graph_is_captured(truth: list[torch.Tensor]) -> None:
    """However often Python would: it might free another graph, which is illegal then. Fails without gc.disable."""
    garbage = [encoder(buckets=BUCKETS[:1]).warmup()]
    vit, alive = encoder(buckets=BUCKETS), in_a_cycle(garbage[0])
    pixels, thresholds, seen = pixels_of(vit, GRID), gc.get_threshold(), []

    def litter() -> None:
        garbage.clear()
        gc.set_threshold(1, 1, 1)

    def look() -> None:
        seen.append(alive() is not None)

    try:
        with during_capture(0, litter), during_capture(len(vit.plan().steps) - 1, look):
            got = flat(vit(pixels, GRID))
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    assert seen == [True] and alive() is None, "collected, but not during the capture"
    assert same(got, truth)


def test_other_threads_use_the_device_during_captures(truth: list[torch.Tensor]) -> None:
    """Allocating, multiplying, waiting for a stream of their own, pinning memory, and freeing old encoders' graphs.

    Fails where a capture forbids others what it forbids itself (capture_error_mode "global").
    """
    stop, rounds, collected = threading.Event(), [0, 0], []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            a = torch.arange(512 * 512, device=DEVICE).view(512, 512).sin()  # torch.randn refuses during any capture
            want = a @ a
            while not stop.is_set():
                extra = [torch.empty(n << 20, dtype=torch.uint8, device=DEVICE) for n in (1, 9, 30)]
                pinned = torch.ones(1000).pin_memory().to(DEVICE, non_blocking=True)
                right = torch.equal(a @ a, want) and bool((pinned == 1).all())
                torch.cuda.current_stream().synchronize()
                assert right
                rounds[0] += 1
                del extra

    def collect() -> None:
        while not stop.is_set():
            gc.collect()
            rounds[1] += 1
            stop.wait(0.001)

    with ThreadPoolExecutor(2) as threads:
        others = [threads.submit(work), threads.submit(collect)]
        try:
            for _ in range(8):
                vit = encoder(buckets=BUCKETS)
                pixels, before = pixels_of(vit, GRID), rounds[0]
                vit.warmup()
                assert same(flat(vit(pixels, GRID)), truth)
                while rounds[0] == before and not others[0].done():
                    stop.wait(0.001)
                collected.append(in_a_cycle(vit))
                del vit
        finally:
            stop.set()
        for other in others:
            other.result()
    gc.collect()
    assert min(rounds) >= 8 and not any(alive() for alive in collected)


def test_encoders_may_be_captured_at_once(truth: list[torch.Tensor]) -> None:
    """By a thread each, on streams of their own. Fails where two captures overlap."""
    together = threading.Barrier(4)

    def load(_: int) -> bool:
        vit = encoder(buckets=BUCKETS)
        pixels = pixels_of(vit, GRID)
        torch.cuda.synchronize()
        together.wait()
        with torch.cuda.stream(torch.cuda.Stream()):
            return same(flat(vit.warmup()(pixels, GRID)), truth)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(load, range(4)))
