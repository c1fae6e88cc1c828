"""Archive: everything that some sources hold, embedded into a folder of shards, by one process or one for each GPU."""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .embedding import Embedded, Embedder, Failed, Pool, Times
from .encoder import FusedViT, load
from .encoding import identity
from .errors import FusedVitError, InputError
from .images import processor
from .preparing import Preparer, Workers, default_workers
from .shards import FORMATS, SHARD_BYTES, Folder, Row, storage, stored
from .sources import Listing, Record, Unread, find, share
from .videos import need_av, video_processor

logger = logging.getLogger("fused_vit")
Tell = Callable[["State"], None]


@dataclass(frozen=True, slots=True)
class Job:
    """What to embed and how. part of parts: this process's share of the sources; workers 0: a thread of its own."""

    sources: tuple[str, ...]
    checkpoint: str
    output: Path
    kind: str = "parquet"
    pool: Pool | None = None
    store: str | None = None
    batch_tokens: int | None = None
    max_tokens: int = 16384
    workers: int | None = None
    part: int = 0
    parts: int = 1
    device: str | None = None
    dtype: torch.dtype | None = None
    revision: str | None = None
    column: str | None = None
    fps: float | None = None
    frames: int | None = None
    shard_images: int = 4096
    processes: int = 1  # of this host, which share its cores


@dataclass(slots=True)
class State:
    """How far a share is. before: images that earlier runs embedded; times: None until the end."""

    part: int
    total: int = 0
    before: int = 0
    done: int = 0
    failures: int = 0
    failed: list[Unread] = field(default_factory=list)  # complete at the end; progress of another process has none
    ignored: int = 0
    busy: float = 0.0  # share of the time in which the device encoded
    seconds: float = 0.0
    backend: str = ""
    times: Times | None = None


def run(job: Job, tell: Tell, vit: FusedViT | None = None) -> State:
    """Embed this job's share: what no shard in its folder holds. Results that were done are kept whatever happens.

    vit: the job's checkpoint on its device, where that is loaded already; it stays open.
    Raises FusedVitError: nothing there to embed, a folder of other results, a worker that died. A bad image is a row of
    `failed` and of the report.
    """
    if job.kind not in FORMATS:
        raise InputError(f"format is {job.kind!r}; expected one of {', '.join(FORMATS)}")
    if job.workers is not None and job.workers < 0:
        raise InputError(f"workers is {job.workers}; expected 0, a thread of this process, or more")
    if job.kind == "parquet":
        _need_pyarrow()
    listing = find(job.sources, job.column, without=job.output)
    if not listing.records and not listing.unread:
        raise InputError(f"{', '.join(job.sources)}: no images in there; expected photographs, videos, tars or Parquet")
    loaded = vit is not None
    vit = vit or load(
        job.checkpoint, device=job.device, dtype=job.dtype, max_tokens=job.max_tokens, revision=job.revision
    )  # fmt: skip
    listing, prepare = _prepared(job, vit, listing)
    store = storage(job.store, job.kind, job.pool is not None, vit.dtype)
    about = _about(job, vit, prepare, store)
    with Folder(job.output, about, part=job.part, parts=job.parts, kind=job.kind) as folder:
        state = State(job.part, ignored=len(listing.ignored), backend=f"{vit.backend} on {vit.device}")
        left = _left(job, listing, folder, state)
        tell(state)
        if left or state.failed:
            try:
                _embed(job, vit, prepare, left, _Writer(folder, store, job.shard_images), state, tell)
            finally:  # of a run that is interrupted, too
                folder.report(_report(job, state))
        elif folder.reported().get("failed"):  # what failed is gone, or another share did it
            folder.report(_report(job, state))
        if job.part == 0:
            folder.forget(job.parts)
    if not loaded:
        vit.close()
    return state


def _need_pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"Parquet needs pyarrow: pip install 'fused-vit[embed]', or take --format safetensors ({error})"
        ) from error


def _prepared(job: Job, vit: FusedViT, listing: Listing) -> tuple[Listing, Preparer]:
    """Videos beside images that nothing here can read are failures; alone they are an error."""
    videos = [record for record in listing.records if record.video]
    try:
        return listing, _preparer(job, vit, bool(videos))
    except (ImportError, FusedVitError) as error:
        if len(videos) in (0, len(listing.records)):
            raise
        reason = " ".join(str(error).split())
    images = [record for record in listing.records if not record.video]
    unread = [*listing.unread, *(Unread(video.key, reason, video.index) for video in videos)]
    return replace(listing, records=images, unread=unread), _preparer(job, vit, False)


def _preparer(job: Job, vit: FusedViT, videos: bool) -> Preparer:
    image = processor(vit.spec, job.checkpoint, revision=job.revision)
    video = None
    if videos:
        need_av()
        video = video_processor(vit.spec, job.checkpoint, fps=job.fps, frames=job.frames, revision=job.revision)
    return Preparer(vit.spec, image, video, vit.dtype)


def _about(job: Job, vit: FusedViT, prepare: Preparer, store: str) -> dict[str, Any]:
    return {
        "fused_vit": __version__, "checkpoint": job.checkpoint, "encoder": identity(vit, prepare.image),
        "format": job.kind, "pool": job.pool, "store": store, "fps": job.fps, "frames": job.frames,
        "column": job.column,
    }  # fmt: skip


def _left(job: Job, listing: Listing, folder: Folder, state: State) -> list[Record]:
    """Of this share, what no shard holds. A file that one holds and that has another size now has failed.

    Time alone is worth a warning: what is copied, or fetched again, has another and the same content.
    """
    mine = share(listing.records, job.part, job.parts)
    state.failed = [unread for i, unread in enumerate(listing.unread) if i % job.parts == job.part]
    state.total = len(mine) + len(state.failed)
    done, left, rewritten = folder.done(), [], []
    shards = {shard: shard.stat().st_mtime for shard in folder.shards()}
    for record in mine:
        if record.digest not in done:
            left.append(record)
            continue
        size, shard = done[record.digest]
        if size != record.size:
            reason = f"embedded when its file had {size} bytes, and it has {record.size} now; delete {shard}"
            state.failed.append(Unread(record.key, reason, record.index))
            continue
        state.before += 1
        if record.written > shards[shard]:
            rewritten.append(record.key)
    if rewritten:
        logger.warning(
            "%d of the files embedded before were written since, with the size that they had, the first %s: if it is "
            "not the same content, delete the shards in %s that hold it", len(rewritten), rewritten[0], folder.path,
        )  # fmt: skip
    state.failures = len(state.failed)
    return left


class _Writer:
    """Shards as they fill, written by a thread; at most one waits while the next fills."""

    def __init__(self, folder: Folder, store: str, images: int) -> None:
        self.folder, self.store, self.images = folder, store, images
        self.rows: list[Row] = []
        self.bytes = 0
        self.seconds = 0.0
        self.thread = ThreadPoolExecutor(1, "fused-vit-write")
        self.writing: Future[None] | None = None

    def add(self, result: Embedded) -> None:
        record: Record = result.source
        embedding = stored(result.embedding, self.store)
        self.rows.append(
            Row(record.key, record.digest, record.size, record.index, result.grid, result.rows, embedding)
        )  # fmt: skip
        self.bytes += embedding.nbytes
        if len(self.rows) >= self.images or self.bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        if self.writing is not None:
            self.writing.result()
            self.writing = None
        if self.rows:
            self.writing = self.thread.submit(self._write, self.rows)
            self.rows, self.bytes = [], 0

    def _write(self, rows: list[Row]) -> None:
        start = time.perf_counter()
        self.folder.write(rows)
        self.seconds += time.perf_counter() - start

    def close(self) -> None:
        try:
            self.flush()
            if self.writing is not None:
                self.writing.result()
        finally:
            self.thread.shutdown()


def _embed(
    job: Job, vit: FusedViT, prepare: Preparer, left: Sequence[Record], writer: _Writer, state: State, tell: Tell
) -> None:
    count = default_workers(job.processes) if job.workers is None else job.workers
    embedder = Embedder(vit, prepare.normalisation, pool=job.pool, batch_tokens=job.batch_tokens)
    try:
        if left:
            with _one_thread(vit), Workers(prepare, max(1, min(count, len(left))), threads=count == 0) as workers:
                embedder.for_bytes.warmup()
                for result in embedder.run(workers.run(left)):
                    _take(result, writer, state)
                    state.seconds, encode = embedder.times.wall, embedder.times.encode
                    state.busy = encode / max(state.seconds, 1e-9)
                    tell(state)
                embedder.times.workers = workers.count
    finally:
        end = time.perf_counter()
        writer.close()
        embedder.times.wall += time.perf_counter() - end
        embedder.times.write = writer.seconds
        state.times, state.seconds = embedder.times, embedder.times.wall


@contextmanager
def _one_thread(vit: FusedViT) -> Iterator[None]:
    """Beside a GPU the cores are the workers': torch's threads would wait for each other on them, busily."""
    before = torch.get_num_threads()
    try:
        if vit.device.type == "cuda":
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


def _take(result: Embedded | Failed, writer: _Writer, state: State) -> None:
    if isinstance(result, Embedded):
        try:
            writer.add(result)
            state.done += 1
            return
        except InputError as error:
            reason = str(error)
    else:
        reason = result.reason
    state.failed.append(Unread(result.source.key, reason, result.source.index))
    state.failures += 1


def _report(job: Job, state: State) -> dict[str, Any]:
    times = state.times or Times()
    return {
        "shard": f"{job.part}/{job.parts}", "total": state.total, "before": state.before, "done": state.done,
        "failed": [asdict(unread) for unread in state.failed], "ignored": state.ignored, "backend": state.backend,
        "seconds": state.seconds, "shares": times.shares(), "bound": times.bound(),
        "times": asdict(times),
    }  # fmt: skip


# --- several devices ---


def run_on(job: Job, devices: Sequence[str], tell: Tell) -> list[State]:
    """A process for each device, each with its share of the job's, its own weights and workers.

    Raises FusedVitError where one of them does, or is killed; the others are ended then, and what was written stays.
    """
    from torch.multiprocessing.spawn import ProcessExitedException, start_processes

    count = len(devices)
    states = multiprocessing.get_context("spawn").Queue()
    jobs = [
        replace(job, part=job.part * count + i, parts=job.parts * count, device=device, processes=count)
        for i, device in enumerate(devices)
    ]
    start: Any = start_processes  # untyped
    context = start(_run_one, (jobs, states), count, join=False, start_method="spawn")
    assert context is not None, "join=False returns a context"
    last: dict[int, State] = {}
    try:
        ended = False
        while not ended:
            ended = context.join(timeout=0.2)
            for found in _drain(states):
                if isinstance(found, str):
                    raise FusedVitError(found)
                last[found.part] = found
                tell(found)
    except ProcessExitedException as error:
        raise FusedVitError(
            f"the process for {devices[error.error_index]} died ({error.signal_name or error.exit_code}); the same "
            "command does the rest"
        ) from error
    finally:
        for process in context.processes:
            if process.is_alive():
                process.terminate()
        for process in context.processes:
            process.join()
    return [last[one.part] for one in jobs]


def _drain(states: Any) -> Iterator[Any]:
    while True:
        try:
            yield states.get_nowait()
        except queue.Empty:
            return


def ended_as_by_ctrl_c() -> None:
    """SIGTERM, by which schedulers end what runs, writes what is done before it ends this process."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _run_one(i: int, jobs: Sequence[Job], states: Any) -> None:
    """In a process of its own. Errors that have a sentence send it; a device's progress goes out twice a second."""
    ended_as_by_ctrl_c()
    sent = 0.0

    def tell(state: State) -> None:
        nonlocal sent
        if time.monotonic() - sent > 0.5:
            sent = time.monotonic()
            states.put(replace(state, failed=[]))

    try:
        states.put(run(jobs[i], tell))
    except (FusedVitError, OSError, ImportError, torch.OutOfMemoryError) as error:
        states.put(f"{jobs[i].device}: {error}")


def devices_of(text: str) -> list[str]:
    """`all`, or a list such as 0,1 or cuda:0,cuda:1; for trying it out also cpu,cpu. Raises InputError."""
    if text == "all":
        count = torch.cuda.device_count()
        if not count:
            raise InputError("--devices all: torch sees no GPU here; leave it out to run on the CPU")
        return [f"cuda:{i}" for i in range(count)]
    names = [f"cuda:{name}" if name.isdecimal() else name for name in text.split(",")]
    if not all(name == "cpu" or (name.startswith("cuda:") and name[5:].isdecimal()) for name in names):
        raise InputError(f"--devices is {text!r}; expected all, or numbers such as 0,1")
    missing = [name for name in names if name != "cpu" and int(name[5:]) >= torch.cuda.device_count()]
    if missing:
        raise InputError(f"--devices names {missing[0]}; torch sees {torch.cuda.device_count()} GPUs here")
    return names


def part_of(text: str | None) -> tuple[int, int]:
    """(i, n) of --shard i/n; without one, of torchrun's RANK and WORLD_SIZE; else (0, 1). Raises InputError."""
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if text is None and rank and world:
        text = f"{rank}/{world}"
    sides = (text or "0/1").split("/")
    if len(sides) != 2 or not all(side.isdecimal() for side in sides) or int(sides[0]) >= int(sides[1]):
        raise InputError(f"--shard is {text!r}; expected i/n with 0 <= i < n, such as 0/8 for the first of eight")
    return int(sides[0]), int(sides[1])


def local_rank() -> tuple[int, int] | None:
    """torchrun's place of this process on its host, and how many there are; None where it did not start it."""
    rank, world = os.environ.get("LOCAL_RANK"), os.environ.get("LOCAL_WORLD_SIZE")
    return (int(rank), int(world)) if rank and world else None
