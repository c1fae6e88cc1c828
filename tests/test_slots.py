"""Memory that a process shares with its workers."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch

from fused_vit.slots import Slots


def fill(slots: Slots, jobs: Any, done: Any) -> None:
    while (job := jobs.get()) is not None:
        done.put(slots.write(*job))


def made(count: int, size: int) -> Slots:
    return Slots.make(count, size) or pytest.skip("no memory without a name here")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_another_process_fills_them_and_views_keep_what_it_wrote(dtype: torch.dtype) -> None:
    context, slots = multiprocessing.get_context("spawn"), made(3, 4096)
    jobs, done = context.Queue(), context.Queue()
    worker = context.Process(target=fill, args=(slots, jobs, done))
    worker.start()
    pixels = [torch.arange(60).reshape(5, 12).add(i).to(dtype) for i in range(5)]
    held = []
    for one in pixels:
        slot = slots.take()
        if slot is None:  # all three are held
            del held[:2]
            slot = slots.take()
        assert slot is not None
        jobs.put((slot, one))
        assert done.get(timeout=60)
        whole = slots.read(slot, (5, 12), dtype)
        held.append(whole[3:])  # a part of it is enough
    jobs.put(None)
    worker.join(60)
    for one, kept in zip(pixels[2:], held, strict=True):
        assert torch.equal(kept, one[3:])
    assert slots.take() is None
    held.clear()
    del whole, kept
    assert {slots.take(), slots.take(), slots.take()} == {0, 1, 2} and slots.take() is None


def test_what_does_not_fit_is_not_written() -> None:
    slots = made(2, 64)
    assert not slots.write(0, torch.zeros(65, dtype=torch.uint8)) and not slots.write(0, torch.zeros(0, 8))
    assert slots.write(1, torch.ones(16)) and slots.read(1, (2, 8), torch.float32).eq(1).all()
    assert slots.read(0, (8, 8), torch.uint8).eq(0).all()


def test_without_such_memory_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr("os.ftruncate", refuse)
    assert Slots.make(2, 64) is None
