"""The two ways to run a plan: `define` in torch on any device, `launch` as Triton kernels over a workspace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from .packing import Item, table
from .plan import Plan, Step

Tensors = Mapping[str, torch.Tensor]
ASIDE = 24  # multiprocessors for steps aside: what blocks of 256 rows leave idle of an H100's 132
WHOLE_SEGMENT = 1 << 30  # attention tile of the definition: all queries of a segment at once


def trace(
    plan: Plan, weights: Tensors, pixels: torch.Tensor, pack: Sequence[Item]
) -> Iterator[tuple[Step, dict[str, torch.Tensor]]]:
    """Run the definition step by step, yielding each step with all buffers after it."""
    from .kernels.ops import OPS

    integers = torch.tensor(table(pack, WHOLE_SEGMENT), dtype=torch.int32, device=pixels.device)
    buffers = {"table": integers, "pixels": pixels}
    for step in plan.steps:
        options = dict(step.options)
        if step.op == "unfold":
            options |= {"tile": WHOLE_SEGMENT, "dtype": torch.promote_types(pixels.dtype, torch.float32)}
        written = OPS[step.op].ref(*_inputs(step, buffers, weights), **options)
        results = zip(step.writes, written if isinstance(written, tuple) else (written,), strict=True)
        buffers.update((name, tensor) for name, tensor in results if name)
        yield step, buffers


def define(plan: Plan, weights: Tensors, pixels: torch.Tensor, pack: Sequence[Item]) -> list[torch.Tensor | None]:
    """The plan's outputs by torch: pixels [rows, features] in the weights' dtype, on any device. None: has none."""
    buffers: dict[str, torch.Tensor] = {}
    for _, buffers in trace(plan, weights, pixels, pack):  # noqa: B007
        pass
    return [buffers.get(name) for name in plan.outputs]


def launch(
    plan: Plan,
    weights: Tensors,
    buffers: Tensors,
    tile: int,
    side: torch.cuda.Stream | None = None,
    elsewhere: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """The plan's kernels on the current stream. Allocates nothing, synchronises nothing: fit for capture.

    side: a stream for steps that are `aside`; without one they run in their turn. elsewhere: the pixels and those of
    plan.finals() that are not in the buffers, as tensors or kernels.address.Address.
    """
    running: set[str] = set()  # buffers of steps on the side stream
    finals = {step: name for name, step in plan.finals().items() if name in elsewhere}
    here: Mapping[str, Any] = {**buffers, "pixels": elsewhere["pixels"]} if "pixels" in elsewhere else buffers
    for i, step in enumerate(plan.steps):
        there = {**here, finals[i]: elsewhere[finals[i]]} if i in finals else here
        if side is not None and step.aside:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                launch_step(step, weights, here, tile, there, programs=ASIDE)
            running |= step.touched
        else:
            if side is not None and running & step.touched:
                torch.cuda.current_stream().wait_stream(side)
                running.clear()
            launch_step(step, weights, here, tile, there)
        here = there
    if side is not None and running:
        torch.cuda.current_stream().wait_stream(side)


def launch_step(
    step: Step, weights: Tensors, buffers: Tensors, tile: int, into: Tensors | None = None, **options: Any
) -> None:
    """One of them. into: the buffers that it writes, where not all of them are those that it reads."""
    from .kernels.ops import OPS

    options |= dict(step.options)
    if step.op == "unfold":
        options["tile"] = tile
    if step.count is not None:
        options["count"] = buffers["table"][step.count :]
    written = [(into or buffers)[name] if name else None for name in step.writes]
    OPS[step.op].launch(*written, *_inputs(step, buffers, weights), **options)


def _inputs(step: Step, buffers: Tensors, weights: Tensors) -> list[torch.Tensor | None]:
    """A step's arguments: an absent buffer or weight is None."""
    return [buffers[name] if name else None for name in step.reads] + [
        weights[name] if name else None for name in step.weights
    ]
