"""Threads with streams of their own share one encoder, and nobody else's memory is written."""

from __future__ import annotations

import os
import random
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from fused_vit import FusedViT
from tests.gpu.towers import encoder, flat, pixels_of, same

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
THREADS, KEPT = 8, 5
# of every bucket, one that is split into packs, and two beyond the largest, for which a slab is made and made larger
GRIDS = [
    [[1, 2, 2]], [[1, 16, 16], [1, 6, 10]], [[4, 10, 14], [1, 2, 2]], [[1, 36, 36], [1, 14, 30]],
    [[1, 30, 40], [1, 30, 42]], [[1, 50, 54]], [[1, 2, 2], [1, 60, 58]],
]  # fmt: skip
CYCLES = 200_000_000  # of a busy stream: a tenth of a second


def load_kernels(*calls: Callable[[], object]) -> None:
    """Run them once and wait: a kernel's first launch takes longer than a busy stream is busy."""
    for call in calls:
        call()
    torch.full((1 << 20,), 7, dtype=torch.uint8, device="cuda")
    torch.cuda._sleep(1)
    torch.cuda.synchronize()


def test_a_first_call_on_another_stream_waits_for_the_weights() -> None:
    """Of a size beyond the graphs, since making one waits for the whole device."""
    first = encoder(buckets=[64])
    case = pixels_of(first, [[1, 16, 16]]), [[1, 16, 16]]
    want = flat(first(*case))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10 * CYCLES)
        vit = encoder(buckets=[64])
    assert same(flat(vit(*case)), want)


def test_eight_threads_get_their_own_answers(record_property: Any) -> None:
    """Each result is checked when five later calls of its thread are done, and not before.

    Fails without the event between two calls' streams, or where a result is a view of the workspace.
    """
    seconds = float(os.environ.get("SOAK_SECONDS", "5"))
    vit = encoder(buckets=[(256, 16), (1024, 32), (2304, 32)]).warmup()
    cases = [(pixels_of(vit, grid, seed=i), grid) for i, grid in enumerate(GRIDS)]
    reference = encoder(buckets=[(4096, 32)])
    truth = [flat(reference(*case)) for case in cases]
    torch.cuda.synchronize()
    end = time.monotonic() + seconds

    def hammer(seed: int) -> tuple[int, int]:
        draw, kept, calls, wrong = random.Random(seed), deque[tuple[int, list[torch.Tensor]]](), 0, 0
        with torch.cuda.stream(torch.cuda.Stream()):
            while calls < 2 * len(cases) or time.monotonic() < end:
                number = draw.randrange(len(cases))
                kept.append((number, flat(vit(*cases[number]))))
                calls += 1
                if len(kept) > KEPT:
                    number, outputs = kept.popleft()
                    wrong += not same(outputs, truth[number])
            wrong += sum(not same(outputs, truth[number]) for number, outputs in kept)
        return calls, wrong

    with ThreadPoolExecutor(THREADS) as threads:
        found = list(threads.map(hammer, range(THREADS)))
    record_property("seconds", seconds)
    record_property("calls", sum(calls for calls, _ in found))
    record_property("wrong", sum(wrong for _, wrong in found))
    assert not any(wrong for _, wrong in found), found
    assert vit.stats()["oversize_calls"] and vit.stats()["calls"] == sum(calls for calls, _ in found)


def test_a_slab_that_is_outgrown_is_not_given_away_while_it_is_used() -> None:
    """One stream made it, a second uses it, a third outgrows it: the first gets its memory only after the second.

    Fails without the wait in `_grown`.
    """
    vit = encoder(buckets=[(64, 4)]).warmup()
    small, large = [[1, 32, 32]], [[1, 60, 60]]
    pixels, more = pixels_of(vit, small), pixels_of(vit, large)
    other = encoder(buckets=[(64, 4)])
    load_kernels(lambda: other(pixels, small), lambda: other(more, large))
    other.close()
    first, second, third = (torch.cuda.Stream() for _ in range(3))
    with torch.cuda.stream(first):
        truth = flat(vit(pixels, small))
    torch.cuda.synchronize()
    assert vit._oversize is not None
    place, size = vit._oversize.slab.data_ptr(), vit._oversize.slab.numel()
    with torch.cuda.stream(second):
        torch.cuda._sleep(CYCLES)
        got = flat(vit(pixels, small))
    with torch.cuda.stream(third):
        vit(more, large)
    with torch.cuda.stream(first):
        mine = [torch.full((size,), 7, dtype=torch.uint8, device="cuda") for _ in range(4)]
    torch.cuda.synchronize()
    assert place in {t.data_ptr() for t in mine}, "else the allocator gave other memory, and nothing was tried"
    assert all(bool((t == 7).all()) for t in mine) and same(got, truth)


def dropped(vit: FusedViT) -> None:
    """Its caller holds no other reference."""


@pytest.mark.parametrize("way", [FusedViT.close, dropped], ids=["closed", "dropped"])
def test_memory_of_an_encoder_is_not_given_away_while_it_runs(way: Callable[[FusedViT], None]) -> None:
    """On a stream that its weights did not come from. Fails where its end waits for nothing."""
    owner = [encoder(buckets=[(1024, 16)]).warmup()]
    grid = [[1, 30, 32]]
    pixels = pixels_of(owner[0], grid)
    truth = flat(owner[0](pixels, grid))
    sizes = [w.nbytes for w in owner[0].weights.values()]
    places = {w.data_ptr() for w in owner[0].weights.values()}
    load_kernels()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(CYCLES)
        got = flat(owner[0](pixels, grid))
    way(owner.pop())
    mine = [torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda") for size in 2 * sizes]
    torch.cuda.synchronize()
    assert places & {t.data_ptr() for t in mine}, "else the allocator gave other memory, and nothing was tried"
    assert same(got, truth)
