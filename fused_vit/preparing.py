"""Preparing: records to pixels and grids, in worker processes or threads, so that the encoder never waits for one core.

A worker hands over what the Hugging Face processor makes, with one shortcut: where the processor does nothing after
resizing but normalise, which is tried out first, the bytes of one frame travel, an eighth of the size of a still's
numbers, to the tower for bytes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .calls import call_of, flatten_call
from .errors import FusedVitError, InputError
from .images import convert_image, decode_image, read_image
from .slots import Slots
from .sources import Record, read
from .spec import TowerSpec
from .stills import byte_patches, proven_normalisation
from .videos import prepare_video, read_video

TASK_BYTES, TASK_IMAGES = 1 << 24, 32  # that a worker hands over at once: handing over costs about a millisecond
HELD = 16  # tasks whose pixels the encoder's batches may wait for
DEATHS = 3  # of processes, one after the other, until a harmless image shows whether it was the images
HARMLESS = 256  # pixels along a side of that image
Grid = list[list[int]]
Task = list[tuple[int, Any]]  # images and their numbers


@dataclass(frozen=True, slots=True)
class Part:
    """One image's place among what was prepared with it, or why it has none. grid: a row for every tile or clip."""

    source: Any  # what was given: a Record, a path, an image
    number: int  # its place in what was asked for
    grid: Grid = field(default_factory=list)
    reason: str | None = None

    @property
    def patches(self) -> int:
        return sum(t * h * w for t, h, w in self.grid)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Images and their pixels, one after the other: floats [patches, features], or bytes of one frame."""

    parts: list[Part]
    pixels: torch.Tensor
    decode_seconds: float
    prepare_seconds: float

    def split(self) -> Iterator[tuple[Part, torch.Tensor]]:
        begin = 0
        for part in self.parts:
            yield part, self.pixels[begin : begin + part.patches]
            begin += part.patches


class Preparer:
    """What a worker does, and all that it needs for it: it is sent to every process once."""

    def __init__(self, spec: TowerSpec, image: Any, video: Any = None, dtype: torch.dtype = torch.float32) -> None:
        """image, video: Hugging Face's processors; video only where there are any. dtype: of numbers, the encoder's."""
        self.spec, self.image, self.video, self.dtype = spec, image, video, dtype
        self.normalisation = proven_normalisation(spec, image)  # of images that are left as bytes; None: none are

    def __call__(self, numbered: Sequence[tuple[int, Any]]) -> Prepared:
        """Prepare images: records, paths, PIL images, or arrays and tensors [height, width, 3] of bytes."""
        parts, pixels, decoded, prepared = [], [], 0.0, 0.0
        videos = any(isinstance(source, Record) and source.video for _, source in numbered)
        raw = self.normalisation is not None and not videos  # pixels of one kind
        for number, source in numbered:
            start = middle = time.perf_counter()
            try:
                image = self._decode(source)
                middle = time.perf_counter()
                rows, grid = self._prepare(image, raw)
                parts.append(Part(source, number, grid))
                pixels.append(rows)
            except ImportError:
                raise  # nothing that another image would change
            except Exception as error:  # ours, and whatever a processor stumbles over
                parts.append(Part(source, number, reason=_reason(source, error)))
            end = time.perf_counter()
            middle = middle if middle > start else end
            decoded, prepared = decoded + middle - start, prepared + end - middle
        empty = torch.empty(0, self.spec.patch.features, dtype=self.dtype)
        return Prepared(parts, torch.cat(pixels) if pixels else empty, decoded, prepared)

    def _decode(self, source: Any) -> Any:
        if not isinstance(source, Record):
            return as_image(source)
        data = read(source)
        if source.video:
            return read_video(data, source.key, self.video)
        return decode_image(data, source.key) if isinstance(data, bytes) else read_image(data)

    def _prepare(self, image: Any, raw: bool) -> tuple[torch.Tensor, Grid]:
        if raw:
            pixels = np.asarray(image)  # as an image it would be converted again
            return byte_patches(self.spec, self.image, [pixels], torch.device("cpu"))
        video = isinstance(image, tuple)
        call = prepare_video(self.video, *image) if video else call_of(self.image(images=[image], return_tensors="pt"))
        rows, grid = flatten_call(self.spec, *call)
        return rows.to(self.dtype), grid


def _reason(source: Any, error: Exception) -> str:
    name = source.key if isinstance(source, Record) else source if isinstance(source, (str, Path)) else ""
    file = source.file if isinstance(source, Record) else ""
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    text = getattr(error, "strerror", None) or str(error)
    text = " ".join(text.removeprefix(f"{name}: ").removeprefix(f"{file}: ").split())
    return text if isinstance(error, (ValueError, OSError)) and text else f"{type(error).__name__}: {text}"


def as_image(source: Any) -> Any:
    """A PIL image in RGB of a path, a file's bytes, a PIL image, or uint8 [height, width, 3]. Raises InputError."""
    from PIL import Image

    if isinstance(source, (str, Path)):
        return read_image(source)
    if isinstance(source, Image.Image):
        return convert_image(source, f"a PIL image of mode {source.mode}")
    if isinstance(source, bytes):
        return decode_image(source, "an image in bytes")
    array = source.cpu().numpy() if isinstance(source, torch.Tensor) else source
    if getattr(array, "ndim", 0) != 3 or array.shape[-1] != 3 or str(array.dtype) != "uint8":
        got = f"{array.dtype} {list(array.shape)}" if hasattr(array, "shape") else type(source).__name__
        raise InputError(
            f"an image is {got}; expected a path, a file's bytes, a PIL image, or uint8 [height, width, 3]"
        )
    return Image.fromarray(array)


# --- workers ---


def default_workers(processes: int = 1) -> int:
    """Cores of this process that are not its own, shared with as many processes like it; at most 32."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(32, cores // max(1, processes) - 1))


_prepare: Preparer  # of a worker process
_slots: Slots | None


def _begin(prepare: Preparer, slots: Slots | None) -> None:
    global _prepare, _slots
    _prepare, _slots = prepare, slots
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed cannot say goodbye, and the pool's queue stays open as long as any worker lives."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


@dataclass(frozen=True, slots=True)
class Sent:
    """What a worker process prepared, on its way: pixels in the slot that it was given, or beside it in the pipe."""

    prepared: Prepared
    shape: tuple[int, int]
    dtype: torch.dtype
    slot: int | None
    beside: Any  # uint8 [bytes], or None


def _work(numbered: Sequence[tuple[int, Any]], slot: int | None) -> Sent:
    prepared = _prepare(numbered)
    pixels = prepared.pixels
    placed = slot is not None and _slots is not None and _slots.write(slot, pixels)
    beside = None if placed else pixels.reshape(-1).view(torch.uint8).numpy()
    return Sent(replace(prepared, pixels=torch.empty(0)), (len(pixels), pixels.shape[1]), pixels.dtype, slot, beside)


def _context(prepare: Preparer) -> BaseContext:
    """CUDA survives no fork: workers are forked from a fresh process, which imports once what each of them needs.

    Eight spawned ones, importing torch and transformers on two cores, were ready after 25 s, eight forked ones after 6.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *{type(p).__module__ for p in (prepare.image, prepare.video) if p}])
    return context


@contextmanager
def _inherited() -> Iterator[None]:
    """What is started here looks for no modules where it happens to be, and leaves Ctrl-C to this process.

    Until it has imported what workers need, the process that forks them would answer with a traceback.
    """
    path = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        if path is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = path


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C, and a SIGTERM that is answered as it is, come after this: a process half started belongs to no pool."""
    main = threading.current_thread() is threading.main_thread()  # only there can handlers be set, and are they called
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if main}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    came: list[int] = []
    for number in handlers:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


class Workers:
    """Processes or threads that prepare; leave the `with` block and they are gone.

    A process that dies costs the image that killed it, and only that.
    """

    def __init__(self, prepare: Preparer, count: int, *, threads: bool = False) -> None:
        if count < 1:
            raise InputError(f"workers is {count}; expected at least 1")
        self.prepare, self.count, self.ahead = prepare, count, count + count // 2 + 1
        self.threads = threads
        self.slots: Slots | None = None
        self.pool: Executor = ThreadPoolExecutor(count, "fused-vit-prepare") if threads else self._processes(count)

    def _processes(self, count: int) -> ProcessPoolExecutor:
        """All of them started, while the encoder is being made ready; with slots that no process before them has."""
        self.slots = Slots.make(self.ahead + HELD, TASK_BYTES)
        pool = ProcessPoolExecutor(count, _context(self.prepare), _begin, (self.prepare, self.slots))
        try:
            with _uninterrupted(), _inherited():
                for _ in range(count):
                    pool.submit(_work, (), None)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)  # what it has started would find nothing of it any more
            raise
        return pool

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what is being prepared, and drop the rest."""
        self.pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, numbered: Sequence[tuple[int, Any]]) -> Future[Prepared | Sent]:
        if self.threads:
            return self.pool.submit(self.prepare, numbered)
        return self.pool.submit(_work, numbered, self.slots.take() if self.slots else None)

    def received(self, future: Future[Prepared | Sent]) -> Prepared:
        """What a task prepared. Raises what it raised."""
        result = future.result()
        if isinstance(result, Prepared):
            return result
        if result.beside is None:
            assert self.slots is not None and result.slot is not None, "it was given a slot, and they are in it"
            return replace(result.prepared, pixels=self.slots.read(result.slot, result.shape, result.dtype))
        if self.slots is not None and result.slot is not None:
            self.slots.give(result.slot)
        pixels = torch.from_numpy(result.beside).view(result.dtype).view(result.shape)
        return replace(result.prepared, pixels=pixels)

    def run(self, sources: Iterable[Any]) -> Iterator[Prepared]:
        """Everything in `sources`, in the order in which it is done; at most half as many tasks wait as work.

        Raises FusedVitError where processes die one after the other, whatever the image.
        """
        waiting = enumerate(sources)
        pending: dict[Future[Prepared | Sent], Task] = {}
        size = 1
        try:
            while True:
                lost: Task = []
                while not lost and len(pending) < self.ahead and (task := list(islice(waiting, size))):
                    try:
                        pending[self.submit(task)] = task
                    except BrokenProcessPool:
                        lost += task
                if not pending and not lost:
                    return
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    task = pending.pop(future)
                    try:
                        prepared = self.received(future)
                    except BrokenProcessPool:
                        lost += task
                    else:
                        size = _next_size(prepared)
                        yield prepared
                if lost:
                    lost += [one for task in pending.values() for one in task]
                    pending.clear()
                    yield from self._one_by_one(lost)
        finally:
            for future in pending:
                future.cancel()

    def _one_by_one(self, lost: Task) -> Iterator[Prepared]:
        """Images of which one killed its process: each alone in one, so that it is seen which."""
        deaths = 0
        self._renew(1)
        for number, source in lost:
            try:
                prepared = self.received(self.submit([(number, source)]))
                deaths = 0
            except BrokenProcessPool:
                self._renew(1)
                deaths += 1
                if deaths == DEATHS:
                    self._check_alive()
                    deaths = 0
                reason = "the process that prepared it died of it"
                prepared = Prepared([Part(source, number, reason=reason)], torch.empty(0), 0.0, 0.0)
            yield prepared
        self._renew(self.count)

    def _renew(self, count: int) -> None:
        self.pool.shutdown(wait=True)
        self.pool = self._processes(count)

    def _check_alive(self) -> None:
        """A process that outlives a harmless image: the others died of theirs. Raises FusedVitError."""
        from PIL import Image

        try:
            self.received(self.submit([(0, Image.new("RGB", (HARMLESS, HARMLESS)))]))
        except BrokenProcessPool as error:
            raise FusedVitError(
                f"{DEATHS + 1} worker processes died one after the other, the last of an image that harms none, as "
                "when memory runs out, or where a script starts them that has no `if __name__ == '__main__':`: take "
                "fewer workers; the same command does the rest"
            ) from error


def _next_size(prepared: Prepared) -> int:
    each = max(1, prepared.pixels.nbytes // max(1, len(prepared.parts)))
    return max(1, min(TASK_IMAGES, TASK_BYTES // each))
