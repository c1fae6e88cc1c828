"""Graphs: the plan's launches for one bucket, captured once over its buffers and replayed for every call that fits."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .buckets import Bucket
from .executor import launch
from .packing import items, table
from .plan import Plan
from .workspace import Workspace, beside


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
    side = torch.cuda.Stream() if beside(bucket) else None
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        launch(plan, weights, buffers, workspace.tile, side)
    return BucketGraph(bucket, buffers, graph, time.perf_counter() - start)
