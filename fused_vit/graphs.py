"""Graphs: the plan's launches for one bucket, captured once over its buffers and replayed for every call that fits."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

from .buckets import Bucket
from .executor import launch
from .packing import items, table
from .plan import Plan
from .workspace import Workspace, addresses

ASIDE = 256  # tokens of the largest bucket whose graph runs steps aside: others leave no multiprocessors idle
_ONE_AT_A_TIME = threading.Lock()  # torch captures no two graphs of a process at once


@dataclass(slots=True)
class BucketGraph:
    """A captured bucket. replay() runs it on the current stream over whatever the buffers hold.

    It reads pixels from where the table says, and writes there: what the last call named must still be memory.
    """

    bucket: Bucket
    buffers: dict[str, torch.Tensor]
    graph: torch.cuda.CUDAGraph
    capture_seconds: float

    def replay(self) -> None:
        self.graph.replay()


def capture(plan: Plan, weights: Mapping[str, torch.Tensor], workspace: Workspace, bucket: Bucket) -> BucketGraph:
    """Compile by one eager run over a minimal image, then capture. Must run while nobody else uses the workspace.

    Capture is thread-local, so that other threads of the process may go on using CUDA.
    """
    start = time.perf_counter()
    buffers = workspace.buffers(bucket)
    elsewhere = addresses(plan, bucket, workspace.dtype, workspace.tile, buffers["table"])
    merge = plan.spec.merge
    pack = items(plan.spec, [[1, merge, merge]], merge * merge)
    smallest = torch.tensor(table(pack, workspace.tile), dtype=torch.int32)
    buffers["table"][: len(smallest)].copy_(smallest)
    rows = sum(item.rows for item in pack)
    places = [torch.zeros(rows, *at.shape[1:], dtype=at.dtype, device=at.cell.device) for at in elsewhere.values()]
    for at, tensor in zip(elsewhere.values(), places, strict=True):
        at.cell.fill_(tensor.data_ptr())
    launch(plan, weights, buffers, workspace.tile, elsewhere=elsewhere)
    torch.cuda.current_stream().synchronize()
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream() if bucket.tokens <= ASIDE else None
    with _capturing(graph, workspace.slab.device):
        launch(plan, weights, buffers, workspace.tile, side, elsewhere)
    return BucketGraph(bucket, buffers, graph, time.perf_counter() - start)


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """What is launched becomes the graph. Of a failure nothing stays: the caller's stream is current again.

    torch leaves its own current where the capture is beyond ending. Nobody's garbage is collected in between: freeing
    another graph would be an illegal part of this one.
    """
    with _ONE_AT_A_TIME:
        collects = gc.isenabled()
        gc.disable()
        try:
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, stream=_capture_stream(device), capture_error_mode="thread_local"),
            ):
                yield
        finally:
            if collects:
                gc.enable()


@lru_cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Where a device's graphs are captured. torch's own such stream is on whatever device captured first."""
    return torch.cuda.Stream(device)
