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
from .workspace import Workspace

ASIDE = 256  # tokens of the largest bucket whose graph runs steps aside: others leave no multiprocessors idle
_ONE_AT_A_TIME = threading.Lock()  # torch captures no two graphs of a process at once


@dataclass(slots=True)
class BucketGraph:
    """A captured bucket. replay() runs it on the current stream over whatever the buffers hold."""

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
    merge = plan.spec.merge
    pack = items(plan.spec, [[1, merge, merge]], merge * merge)
    smallest = torch.tensor(table(pack, workspace.tile), dtype=torch.int32)
    buffers["table"][: len(smallest)].copy_(smallest)
    buffers["pixels"][: merge * merge].zero_()
    launch(plan, weights, buffers, workspace.tile)
    torch.cuda.current_stream().synchronize()
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream() if bucket.tokens <= ASIDE else None
    with _capturing(graph, workspace.slab.device):
        launch(plan, weights, buffers, workspace.tile, side)
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
