"""Forks, other devices, and coming and going: what an encoder leaves behind is nothing."""

from __future__ import annotations

import gc
import multiprocessing
import os
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

import fused_vit
from fused_vit import FusedViT, InputError
from tests.gpu.towers import GRID, done, encoder, flat, pixels_of, python, same
from tests.towers_hf import random_pixels, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
MIB = 1 << 20
ALONE = "PYTEST_XDIST_WORKER" not in os.environ  # else the device's free memory is other processes' business too


def refusals(vit: FusedViT, pixels: torch.Tensor) -> list[str]:
    """What a forked child is told, by a call and by a warm-up; closing there is allowed, and closes nothing."""
    told = []
    for attempt in (lambda: vit(pixels, GRID), vit.warmup):
        try:
            attempt()
        except InputError as error:
            told.append(str(error))
    vit.close()
    return told


def test_importing_creates_no_context() -> None:
    code = (
        "import torch, fused_vit.adapters.hf, fused_vit.cli, fused_vit.encoder, fused_vit.kernels.ops, fused_vit.vllm"
    )
    assert done(python(f"{code}; print(torch.cuda.is_initialized())")) == "False"


def forks() -> None:
    """os.fork and multiprocessing's fork, both after CUDA: prints what the children were told."""
    vit = encoder(buckets=[(256, 16), (2304, 32)])
    pixels = pixels_of(vit, GRID)
    want = flat(vit(pixels, GRID))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(writing, "\n".join(refusals(vit, pixels)).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading) as pipe:
        print(pipe.read())
    assert os.waitpid(child, 0)[1] == 0

    def report(end: Connection) -> None:
        end.send(refusals(vit, pixels))

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=report, args=(theirs,))
    process.start()
    assert ours.poll(60), "the child hangs"
    print("\n".join(ours.recv()))
    process.join(60)
    assert process.exitcode == 0
    loader = torch.utils.data.DataLoader(range(8), num_workers=2, multiprocessing_context="fork")
    assert sorted(int(i) for i in loader) == list(range(8)), "workers that do not use the encoder may be forks"
    assert same(flat(vit(pixels, GRID)), want)
    print("the parent goes on")


def test_a_forked_process_is_told_to_load_its_own() -> None:
    """Real forks of a process that ran on the device. Fails, by its time limit, where the child touches CUDA."""
    *told, last = done(python("from tests.gpu.test_lifecycle_gpu import forks; forks()")).splitlines()
    assert last == "the parent goes on" and len(told) == 4
    for line in told:
        assert "this encoder belongs to process" in line and "CUDA does not survive a fork" in line


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one() -> None:
    """Two encoders take turns, whichever device is current, and leave it as it was.

    Fails where a launch, a stream, an event or a capture is on the current device instead of the encoder's.
    """
    vits = [encoder(device=f"cuda:{i}", buckets=[(256, 16), (2304, 32)]) for i in (0, 1)]
    beyond = [[1, 50, 50]]
    truth: list[list[torch.Tensor]] = []
    for current in (0, 1, 0):
        with torch.cuda.device(current):
            for vit in (*vits, vits[0]):
                for i, grid in enumerate((GRID, beyond)):
                    out = flat(vit(pixels_of(vit, grid), grid))
                    assert all(t.device == vit.device for t in out) and torch.cuda.current_device() == current
                    truth += [[t.cpu() for t in out]] if len(truth) <= i else []
                    assert same([t.cpu() for t in out], truth[i]), (current, vit.device)
    vits[1].close()
    assert torch.cuda.current_device() == 0


def test_attaching_and_detaching_leaves_nothing_behind(record_property: Any) -> None:
    """A hundred times, with a graph each: not a byte of torch's memory, and 64 MiB of the device at the most.

    Fails where a detached encoder stays referenced, or a parked parameter comes back twice.
    """
    model = tiny_model(seed=0).cuda()
    grid = torch.tensor([[1, 8, 12], [1, 4, 4]])
    pixels = random_pixels(grid.tolist(), 96).cuda()
    kept = []
    for i in range(101):
        fused_vit.attach(model, buckets=[256])
        model.model.visual(pixels, grid_thw=grid)
        fused_vit.detach(model)
        if i in (0, 100):
            gc.collect()
            torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info()
            kept.append((torch.cuda.memory_allocated(), total - free))
    record_property("attached", 100)
    record_property("allocated_grown_bytes", kept[1][0] - kept[0][0])
    assert kept[1][0] == kept[0][0], kept
    assert not ALONE or kept[1][1] - kept[0][1] < 64 * MIB, kept
