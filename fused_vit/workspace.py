"""Workspace: one slab of device memory in which every bucket places its buffers: they never run at once, so they share.

A launch allocates nothing, memory does not grow with the number of buckets, and stale contents are harmless.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from .buckets import Bucket
from .packing import CELL, COUNTS, FIELDS, HEADER
from .plan import Buffer, Plan

if TYPE_CHECKING:
    from .kernels.address import Address

ALIGNMENT = 256  # bytes
_DTYPES = {"float32": torch.float32, "int32": torch.int32, "uint8": torch.uint8}


def shapes(plan: Plan, bucket: Bucket, tile: int) -> dict[str, tuple[int, ...]]:
    """The shape of each buffer in a bucket. A segment adds at most one attention tile that is not full."""
    sizes: Mapping[str, int] = {
        "rows": bucket.tokens,
        "merged": bucket.tokens // plan.spec.patches,
        "tiles": bucket.tokens // tile + bucket.segments,
        "windows": bucket.segments,
        "table": HEADER + FIELDS * bucket.segments,
    }
    return {b.name: tuple(d if isinstance(d, int) else sizes[d] for d in b.shape) for b in plan.buffers}


def addresses(plan: Plan, bucket: Bucket, dtype: torch.dtype, tile: int, table: torch.Tensor) -> dict[str, Address]:
    """Of pixels and finals: matrices of a bucket's size, with their cells in its table."""
    from .kernels.address import Address

    shape, dtypes = shapes(plan, bucket, tile), {b.name: _DTYPES.get(b.dtype, dtype) for b in plan.buffers}
    return {
        name: Address(table[COUNTS + i * CELL :][:2].view(torch.int64), shape[name], dtypes[name])
        for i, name in enumerate(("pixels", *plan.finals()))
    }


def _lifetimes(plan: Plan) -> dict[str, tuple[int, int]]:
    """First and last step that touch a buffer; inputs live from the start, outputs to the end.

    A step aside runs until another touches what it does, or to the end, so that its buffers live as long: the last
    that touches one is not aside, or it is an output.
    """
    spans: dict[str, tuple[int, int]] = {"table": (0, len(plan.steps)), "pixels": (0, 0)}
    for i, step in enumerate(plan.steps):
        for name in step.touched:
            spans[name] = (spans.get(name, (i, i))[0], max(i, spans.get(name, (i, i))[1]))
    return spans | {name: (spans[name][0], len(plan.steps)) for name in plan.outputs if name}


def place(plan: Plan, bucket: Bucket, itemsize: int, tile: int) -> tuple[dict[str, int], int]:
    """Byte offset of each buffer and the slab's size: largest first, each at the lowest place free during its life."""
    shape = shapes(plan, bucket, tile)
    sizes = {
        b.name: math.prod(shape[b.name]) * (_DTYPES[b.dtype].itemsize if b.dtype in _DTYPES else itemsize)
        for b in plan.buffers
    }
    spans = _lifetimes(plan)
    offsets: dict[str, int] = {}
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        offset = 0
        for other in sorted(offsets, key=offsets.__getitem__):
            overlaps = spans[name][0] <= spans[other][1] and spans[other][0] <= spans[name][1]
            if overlaps and offset < offsets[other] + sizes[other] and offsets[other] < offset + sizes[name]:
                offset = -(-(offsets[other] + sizes[other]) // ALIGNMENT) * ALIGNMENT
        offsets[name] = offset
    return offsets, max(offsets[name] + sizes[name] for name in sizes)


def needed(plan: Plan, buckets: Sequence[Bucket], itemsize: int, tile: int) -> tuple[int, Bucket]:
    """Bytes of a slab in which each of these buckets fits, and the bucket that takes them."""
    return max((place(plan, bucket, itemsize, tile)[1], bucket) for bucket in buckets)


class Workspace:
    """A slab on a device and the views of each bucket into it.

    Made outside inference mode even if the caller is in it: a later call outside could not write to them.
    Raises torch.OutOfMemoryError saying how much is needed.
    """

    def __init__(
        self, plan: Plan, buckets: Sequence[Bucket], dtype: torch.dtype, device: torch.device, tile: int
    ) -> None:
        self.plan, self.dtype, self.tile = plan, dtype, tile
        size, largest = needed(plan, buckets, dtype.itemsize, tile)
        try:
            with torch.inference_mode(False):
                self.slab = torch.empty(size, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"a workspace of {largest.tokens} tokens, {largest.segments} segments, takes {size} bytes of {device}: "
                f"give smaller buckets or max_tokens, or send fewer patches at once ({error})"
            ) from error

    def buffers(self, bucket: Bucket) -> dict[str, torch.Tensor]:
        """Views of the slab for a bucket. Raises ValueError when the slab is too small for it."""
        offsets, size = place(self.plan, bucket, self.dtype.itemsize, self.tile)
        if size > self.slab.numel():
            raise ValueError(f"{bucket} needs {size} bytes; the slab holds {self.slab.numel()}")
        shape = shapes(self.plan, bucket, self.tile)
        with torch.inference_mode(False):
            return {b.name: self._view(b, offsets[b.name], shape[b.name]) for b in self.plan.buffers}

    def _view(self, buffer: Buffer, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
        dtype = _DTYPES.get(buffer.dtype, self.dtype)
        return self.slab[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
