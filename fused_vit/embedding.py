"""Embedding: a stream of prepared images through an encoder in full batches, the device fed ahead and read behind.

What is prepared gathers in a pool of a few batches; a batch takes the image that has waited longest and fills up with
the largest that still fit. While one batch runs, the next is copied to the device on a stream of its own, and the last
one back.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch

from .buckets import Bucket
from .calls import Grid
from .errors import InputError
from .output import VisionOutput
from .packing import Item, items
from .preparing import Part, Prepared
from .spec import TowerSpec
from .stills import Normalisation

Pool = Literal["mean"]
POOLS = ("mean",)
AHEAD = 4  # batches' worth of patches that may gather: from so many, full batches can be chosen
SLOTS = 2  # of pinned memory and of the device's: one is filled while the other is read


class Tower(Protocol):
    """What an encoder is asked for here."""

    spec: TowerSpec
    device: torch.device
    dtype: torch.dtype
    buckets: tuple[Bucket, ...]

    @property
    def processor(self) -> Any: ...

    @property
    def embedding_width(self) -> int: ...

    def for_bytes(self, mean: tuple[float, ...], std: tuple[float, ...]) -> Tower: ...

    def warmup(self) -> Any: ...

    def __call__(self, pixel_values: torch.Tensor, grid_thw: Grid | None = None) -> VisionOutput: ...


@dataclass(frozen=True, slots=True)
class Embedded:
    """One image's result on the CPU: merged rows [rows, out] in the encoder's dtype, or pooled, fp32 [out].

    Kimi's rows without their projector are [rows, patches, width]; pooled they are [patches * width].
    """

    source: Any
    number: int
    grid: tuple[int, int, int]  # frames of all its clips or tiles, height and width in patches
    rows: int
    embedding: torch.Tensor


@dataclass(frozen=True, slots=True)
class Failed:
    """One image and why it has no result."""

    source: Any
    number: int
    reason: str


@dataclass(slots=True)
class Times:
    """Where a run's seconds went: start, until an image was prepared, then wall. decode, prepare: of all workers."""

    decode: float = 0.0
    prepare: float = 0.0
    wait: float = 0.0
    copy: float = 0.0
    encode: float = 0.0
    write: float = 0.0
    start: float = 0.0
    wall: float = 0.0
    workers: int = 1
    images: int = 0
    batches: int = 0
    patches: int = 0

    def shares(self) -> dict[str, float]:
        """How much of the run each stage was busy; 1 is all of it."""
        wall = max(self.wall, 1e-9) if self.images else float("inf")  # which starts with the first image
        seconds = {
            "decode": self.decode / self.workers, "preprocess": self.prepare / self.workers, "copy": self.copy,
            "encode": self.encode, "write": self.write,
        }  # fmt: skip
        return {name: each / wall for name, each in seconds.items()}

    def bound(self) -> str:
        """What bounded the run, in one sentence."""
        if not self.images:
            return "nothing was encoded"
        shares = self.shares()
        workers = shares["decode"] + shares["preprocess"]
        listed = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        busy = f"busy: {listed} of {self.wall:.1f} s ({self.workers} workers)"
        stages = {"copy": shares["copy"], "encode": shares["encode"], "write": shares["write"], "workers": workers}
        name = max(stages, key=lambda stage: stages[stage])
        if stages[name] < 0.5:
            return f"nothing bounded the run for long, it was short or its parts took turns; {busy}"
        if name == "workers":
            name = max(("decode", "preprocess"), key=lambda stage: shares[stage])
            return f"bounded by {name}, so more --workers on more cores would help; {busy}"
        return f"bounded by {name}; {busy}"


# --- batches ---


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """An image that waits in the pool for its batch."""

    part: Part
    pixels: torch.Tensor
    found: list[Item]
    tokens: int
    segments: int

    def alone(self) -> _Ready:
        """With pixels of its own, no view of all that was prepared with it, which keeps a slot from workers."""
        if self.pixels.untyped_storage().nbytes() <= self.pixels.nbytes:
            return self
        own = torch.empty_like(self.pixels)
        own.view(torch.uint8).numpy()[:] = self.pixels.view(torch.uint8).numpy()  # by one thread, as in _Slot.fill
        return replace(self, pixels=own)


@dataclass(slots=True)
class _Batch:
    """A batch under way: its images, its results and the events of what the device does."""

    members: list[_Ready]
    results: torch.Tensor | None = None  # [images, out] where they are pooled, else [rows, out]
    rows: list[int] = field(default_factory=list)  # of every image
    events: list[torch.cuda.Event] = field(default_factory=list)  # begin and end of the copy, then of encoding
    fetched: torch.cuda.Event | None = None


class Embedder:
    """An encoder and how it is fed. One run at a time."""

    def __init__(
        self, vit: Tower, bytes_as: Normalisation | None, *, pool: Pool | None = None, batch_tokens: int | None = None
    ) -> None:
        """bytes_as: a Preparer's normalisation. batch_tokens: patches of a batch, default the largest bucket's."""
        if pool is not None and pool not in POOLS:
            raise InputError(f"pool is {pool!r}; expected None, for all rows, or 'mean'")
        if batch_tokens is not None and batch_tokens < 1:
            raise InputError(f"batch_tokens is {batch_tokens}; expected a positive number of patches")
        self.vit, self.pool = vit, pool
        largest = vit.buckets[-1]
        self.budget = batch_tokens or largest.tokens
        self.segments = largest.segments * -(-self.budget // largest.tokens)
        self.for_bytes = vit.for_bytes(*bytes_as) if bytes_as else vit
        self.times = Times()
        self.cuda = vit.device.type == "cuda"
        self.depth = SLOTS if self.cuda else 0  # batches under way before the first is waited for
        self._counted: float | None = None  # until when the wall's time is counted
        self._ready: dict[torch.dtype, list[_Ready]] = {}
        self._slots = [_Slot(vit) for _ in range(SLOTS)] if self.cuda else []
        self._back = torch.cuda.Stream(vit.device) if self.cuda else None

    def run(self, prepared: Iterable[Prepared | None]) -> Iterator[Embedded | Failed]:
        """Results as they are done, in no particular order. None in `prepared`: do not wait for more."""
        under_way: deque[_Batch] = deque()
        source = iter(prepared)
        begin, done = time.perf_counter(), object()
        self._counted = None
        try:
            while True:
                start = time.perf_counter()
                found = next(source, done)
                if self._counted is None:
                    self._counted = time.perf_counter()
                    self.times.start += self._counted - begin
                else:
                    self.times.wait += time.perf_counter() - start
                if isinstance(found, Prepared):
                    yield from self._gather(found)
                idle = not isinstance(found, Prepared)
                while batch := self._take(flush=idle):
                    under_way.append((yield from self._started(batch)))
                    while len(under_way) > self.depth:
                        yield from self._finished(under_way.popleft())
                while under_way and idle:
                    yield from self._finished(under_way.popleft())
                if found is done:
                    return
        finally:
            self._ready.clear()
            self._count_wall()

    def _count_wall(self) -> None:
        if self._counted is not None:
            now = time.perf_counter()
            self.times.wall += now - self._counted
            self._counted = now

    def _gather(self, prepared: Prepared) -> Iterator[Failed]:
        self.times.decode += prepared.decode_seconds
        self.times.prepare += prepared.prepare_seconds
        for part, pixels in prepared.split():
            reason = part.reason
            if reason is None:
                try:
                    found = items(self.vit.spec, part.grid, part.patches)
                    ready = _Ready(part, pixels, found, sum(i.rows for i in found), sum(i.segments for i in found))
                    self._ready.setdefault(pixels.dtype, []).append(ready)
                    continue
                except InputError as error:
                    reason = str(error)
            yield Failed(part.source, part.number, reason)

    def _take(self, flush: bool) -> list[_Ready]:
        """The images of the next batch; none as long as more may come and the pool is not full.

        The one that has waited longest is in it, so that none waits for ever, then the largest that fit.
        """
        for waiting in self._ready.values():  # bytes and numbers never share a batch
            if waiting and (flush or sum(one.tokens for one in waiting) >= AHEAD * self.budget):
                oldest, *others = waiting
                batch, taken = [oldest], {oldest}
                tokens, segments = oldest.tokens, oldest.segments
                for one in sorted(others, key=lambda one: -one.tokens):
                    if tokens + one.tokens <= self.budget and segments + one.segments <= self.segments:
                        batch.append(one)
                        taken.add(one)
                        tokens, segments = tokens + one.tokens, segments + one.segments
                waiting[:] = [one.alone() for one in others if one not in taken]
                return batch
        return []

    def _started(self, members: list[_Ready]) -> Generator[Embedded | Failed, None, _Batch]:
        """Launch a batch. One that fails is tried image by image, so that a bad one costs nobody else a result."""
        try:
            return self._launch(members)
        except (InputError, torch.OutOfMemoryError) as error:
            if len(members) == 1:
                part = members[0].part
                yield Failed(part.source, part.number, " ".join(str(error).split()))
                return _Batch([])
        for one in members:
            batch = yield from self._started([one])
            yield from self._finished(batch)
        return _Batch([])

    def _launch(self, members: list[_Ready]) -> _Batch:
        batch = _Batch(members)
        grid = [row for one in members for row in one.part.grid]
        start = time.perf_counter()
        if not self.cuda:
            pixels = torch.cat([one.pixels for one in members])
            self.times.copy += time.perf_counter() - start
            start = time.perf_counter()
            batch.results = self._encode(pixels, grid, batch)
            self.times.encode += time.perf_counter() - start
        else:
            with torch.cuda.device(self.vit.device):
                slot = self._slots[0]
                self._slots.reverse()
                pixels = slot.fill([one.pixels for one in members], batch.events)
                self.times.copy += time.perf_counter() - start
                batch.events.append(_event())
                try:
                    results = self._encode(pixels, grid, batch)
                finally:
                    slot.free.record()
                batch.events.append(_event())
                batch.results, batch.fetched = self._fetch(results)
        self.times.batches += 1
        self.times.patches += sum(one.tokens for one in members)
        return batch

    def _encode(self, pixels: torch.Tensor, grid: list[list[int]], batch: _Batch) -> torch.Tensor:
        output = (self.for_bytes if pixels.dtype == torch.uint8 else self.vit)(pixels, grid)
        parts = iter(output.split())
        images = [[next(parts) for _ in one.part.grid] for one in batch.members]
        batch.rows = [sum(map(len, tiles)) for tiles in images]
        if self.pool is None:
            return output.last_hidden_state if output.pooler_output is None else output.pooler_output
        whole = [tiles[0] if len(tiles) == 1 else torch.cat(tiles) for tiles in images]
        return torch.stack([rows.flatten(1).mean(0, dtype=torch.float32) for rows in whole])

    def _fetch(self, results: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        """A copy in pinned memory, and when it is there."""
        assert self._back is not None
        self._back.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._back):
            results.record_stream(self._back)
            host = torch.empty(results.shape, dtype=results.dtype, pin_memory=True)
            host.copy_(results, non_blocking=True)
            return host, _event()

    def _finished(self, batch: _Batch) -> Iterator[Embedded]:
        if batch.results is None:
            return
        if batch.fetched is not None:
            batch.fetched.synchronize()
            copied, encoded = batch.events[:2], batch.events[2:]
            self.times.copy += copied[0].elapsed_time(copied[1]) / 1e3
            self.times.encode += encoded[0].elapsed_time(encoded[1]) / 1e3
        self.times.images += len(batch.members)
        self._count_wall()
        results = batch.results if self.pool else batch.results.split(batch.rows)
        for one, rows, result in zip(batch.members, batch.rows, results, strict=True):
            grid = one.part.grid
            whole = (sum(t for t, _, _ in grid), grid[0][1], grid[0][2])
            # pinned memory is for the next batch, and a view of a batch would keep all of it
            yield Embedded(one.part.source, one.part.number, whole, rows, result.clone())


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class _Slot:
    """Pinned memory and the device's for one batch of pixels; grows to the largest batch it has met."""

    def __init__(self, vit: Tower) -> None:
        self.vit = vit
        self.stream = torch.cuda.Stream(vit.device)
        self.free = torch.cuda.Event()  # the encoder has read the device's
        self.copied: torch.cuda.Event | None = None
        self.host = self.device = torch.empty(0, dtype=torch.uint8)

    def fill(self, pixels: Sequence[torch.Tensor], events: list[torch.cuda.Event]) -> torch.Tensor:
        """Pixels of a batch [patches, features] on the device, for the current stream; two events about the copy."""
        if self.copied is not None:
            self.copied.synchronize()  # the last copy has read the pinned memory
        rows, features, dtype = sum(len(p) for p in pixels), pixels[0].shape[1], pixels[0].dtype
        size = rows * features * dtype.itemsize
        if self.host.numel() < size:
            self.free.synchronize()
            self.host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            self.device = torch.empty(size, dtype=torch.uint8, device=self.vit.device)
            self.stream.wait_stream(torch.cuda.current_stream())  # whose work may still use that memory
        host, device = (buffer[:size].view(dtype).view(rows, features) for buffer in (self.host, self.device))
        # By one thread: torch's would wait for each other busily, on cores that workers have. Beside 15 of those
        # torch.cat of 13 MB took 62 to 217 ms, numpy 2.4.
        np.concatenate([p.view(torch.uint8).numpy() for p in pixels], out=host.view(torch.uint8).numpy())
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.free)
            events.append(_event())
            device.copy_(host, non_blocking=True)
            self.copied = _event()
        events.append(self.copied)
        torch.cuda.current_stream().wait_event(self.copied)
        return device
