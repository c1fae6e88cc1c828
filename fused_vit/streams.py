"""Streams: many images from Python through one encoder: `encode` in their order, `stream` as they are done."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .embedding import Embedded, Embedder, Failed, Pool, Tower
from .errors import InputError
from .images import processor
from .preparing import Prepared, Preparer, Sent, Workers, default_workers


def _preparer(vit: Tower, source: Any) -> Preparer:
    """source: a checkpoint, its processor, or None for the one that the encoder was loaded from."""
    if source is None:
        source = vit.processor
    found = processor(vit.spec, source) if isinstance(source, (str, Path)) else source
    if not callable(found):
        raise InputError(
            f"processor is {type(source).__name__}; expected a checkpoint's path or hub id, or its image processor "
            "(fused_vit.images.processor)"
        )
    return Preparer(vit.spec, found, dtype=vit.dtype)


def encode(
    vit: Tower,
    images: Any,
    *,
    processor: Any,
    pool: Pool | None = None,
    batch_tokens: int | None = None,
    normalize_embeddings: bool = False,
    convert_to_numpy: bool = False,
    show_progress_bar: bool = False,
    workers: int | None = None,
) -> Any:
    """See FusedViT.encode."""
    if normalize_embeddings and pool is None:
        raise InputError("normalize_embeddings is for vectors; take pool='mean' with it")
    single = isinstance(images, (str, Path, bytes)) or not isinstance(images, Iterable) or _is_picture(images)
    wanted = [images] if single else list(images)
    results: list[Any] = [None] * len(wanted)
    embedder = Embedder(vit, (prepare := _preparer(vit, processor)).normalisation, pool=pool, batch_tokens=batch_tokens)
    with Workers(prepare, workers or default_workers(), threads=True) as pool_of_workers:
        found = embedder.run(pool_of_workers.run(wanted))
        for one in _bar(found, len(wanted)) if show_progress_bar else found:
            if isinstance(one, Failed):
                raise InputError(f"image {one.number}: {one.reason}")
            results[one.number] = F.normalize(one.embedding, dim=0) if normalize_embeddings else one.embedding
    if convert_to_numpy:
        results = [_numpy(result) for result in results]
    if single:
        return results[0]
    if pool is None:
        return results
    if not results:
        empty = torch.empty(0, vit.embedding_width)
        return empty.numpy() if convert_to_numpy else empty
    if convert_to_numpy:
        import numpy as np

        return np.stack(results)
    return torch.stack(results)


def _is_picture(images: Any) -> bool:
    return hasattr(images, "convert") or getattr(images, "ndim", 0) == 3


def _numpy(tensor: torch.Tensor) -> Any:
    """numpy has no bfloat16."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _bar(found: Iterator[Embedded | Failed], total: int) -> Iterator[Embedded | Failed]:
    from rich.console import Console
    from rich.progress import track

    yield from track(found, "encoding", total, console=Console(stderr=True))


async def stream(
    vit: Tower,
    images: Iterable[Any] | AsyncIterable[Any],
    *,
    processor: Any,
    pool: Pool | None = None,
    batch_tokens: int | None = None,
    workers: int | None = None,
) -> AsyncIterator[tuple[int, torch.Tensor | InputError]]:
    """See FusedViT.stream."""
    # In a thread: imports and the tower for bytes take seconds, and the loop is a server's.
    prepare = await asyncio.to_thread(_preparer, vit, processor)
    embedder = await asyncio.to_thread(
        lambda: Embedder(vit, prepare.normalisation, pool=pool, batch_tokens=batch_tokens)
    )
    count = workers or default_workers()
    loop = asyncio.get_running_loop()
    ready: queue.SimpleQueue[Prepared | BaseException | None] = queue.SimpleQueue()  # None: no more will come
    results: asyncio.Queue[Embedded | Failed | BaseException | None] = asyncio.Queue()
    closed = threading.Event()
    room = asyncio.Semaphore(4 * count + 32)  # of images under way, so that a caller cannot run ahead for ever

    def tell(value: Embedded | Failed | BaseException | None) -> None:
        loop.call_soon_threadsafe(results.put_nowait, value)

    def encode_what_comes() -> None:
        try:
            for result in embedder.run(_arriving(ready)):
                if closed.is_set():
                    return
                tell(result)
            tell(None)
        except BaseException as error:
            tell(error)

    def prepared(future: Future[Prepared | Sent]) -> None:
        if not future.cancelled():
            ready.put(future.exception() or pool_of_workers.received(future))

    async def feed(pool_of_workers: Workers) -> None:
        waiting: list[asyncio.Future[Prepared | Sent]] = []
        try:
            number = 0
            async for image in _each(images):
                await room.acquire()
                future = pool_of_workers.submit([(number, image)])
                future.add_done_callback(prepared)
                waiting = [f for f in waiting if not f.done()] + [asyncio.wrap_future(future)]
                number += 1
            await asyncio.gather(*waiting, return_exceptions=True)
        except Exception as error:
            ready.put(error)
        finally:
            ready.put(None)

    thread = threading.Thread(target=encode_what_comes, name="fused-vit-stream", daemon=True)
    pool_of_workers = Workers(prepare, count, threads=True)
    thread.start()
    feeder = asyncio.ensure_future(feed(pool_of_workers))

    def leave() -> None:
        thread.join()
        pool_of_workers.close()

    try:
        while (result := await results.get()) is not None:
            if isinstance(result, BaseException):
                raise result
            room.release()
            if isinstance(result, Failed):
                yield result.number, InputError(f"image {result.number}: {result.reason}")
            else:
                yield result.number, result.embedding
    finally:
        closed.set()
        feeder.cancel()
        ready.put(None)
        await asyncio.to_thread(leave)  # both wait for images under way, and the loop is a server's


def _arriving(ready: queue.SimpleQueue[Prepared | BaseException | None]) -> Iterator[Prepared | None]:
    """What workers have prepared, and None before every wait: a batch takes what came while the last one ran."""
    while True:
        try:
            found = ready.get_nowait()
        except queue.Empty:
            yield None
            found = ready.get()
        if found is None:
            return
        if isinstance(found, BaseException):
            raise found
        yield found


async def _each(images: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if isinstance(images, AsyncIterable):
        async for image in images:
            yield image
    else:  # in a thread: the next one may be a download, and the loop is a server's
        iterator, end = iter(images), object()
        while (image := await asyncio.to_thread(next, iterator, end)) is not end:
            yield image
