"""Shards: a folder of results that many runs fill, each file whole or absent.

A shard is written beside its place and renamed, and says in its own header what it holds: what is done is what lies
there. A manifest says by what encoder and options, and a folder holds the results of one.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import InputError

FORMATS = ("parquet", "safetensors")
EXCLUSIVE = fcntl.LOCK_EX | fcntl.LOCK_NB
STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MANIFEST, DONE = "_manifest.json", "fused_vit.done"  # names with _ are skipped by readers of Parquet folders
SHARD_BYTES, GROUP_BYTES = 1 << 28, 1 << 26  # a shard is full with so much, however few its images; a row group too
_NAME = re.compile(r"part-(\d{5,})-(\d{6,})\.(parquet|safetensors)")
_REPORT = re.compile(r"_report-(\d{5,})\.json")  # another name is no report of ours
_PAIR = struct.Struct("<QQ")


@dataclass(frozen=True, slots=True)
class Row:
    """One image's result. embedding: [out], or [rows, out] (Kimi's without projector: [rows, patches * width])."""

    key: str
    digest: int  # 64 bits of the key
    size: int  # of what it was made from, in bytes
    index: int
    grid: tuple[int, int, int]
    rows: int
    embedding: torch.Tensor


def save(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """As safetensors. Raises OSError where the file cannot be written; the library has an error of its own."""
    try:
        save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error


def held(path: Path, how: int) -> IO[str] | None:
    """The file, locked until it is closed or the process ends; None where another run holds it."""
    lock = os.fdopen(os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666), "w")
    try:
        fcntl.flock(lock, how)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def is_result(path: str) -> bool:
    """Whether a file is of a folder of results, so that the next run takes it for no source."""
    folder, name = os.path.split(path)
    ours = name.startswith("_") or _NAME.fullmatch(name)
    return bool(ours) and os.path.exists(os.path.join(folder, MANIFEST))


class Folder:
    """An output folder, locked for one part of the work as long as this is open.

    Raises InputError where it holds other results, or another run writes this part or cuts the work into other parts.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], *, part: int, kind: str, parts: int = 1) -> None:
        """about: everything that the results depend on. part of parts: the share, which names its shards."""
        if path.exists() and not path.is_dir():
            raise InputError(f"{path}: is no folder; choose another with -o")
        path.mkdir(parents=True, exist_ok=True)
        self.path, self.part, self.parts, self.kind, self.about = path, part, parts, kind, dict(about)
        with ExitStack() as locks:
            locks.enter_context(self._shared())
            locks.enter_context(self._locked())
            self._check()
            self._locks = locks.pop_all()
        for left in path.glob(f"_part-{part:05d}-*.tmp"):  # of a run that was killed
            left.unlink()
        taken = [int(m[2]) for m in map(_NAME.fullmatch, os.listdir(path)) if m and int(m[1]) == part]
        self.next = max(taken, default=-1) + 1

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self._locks.close()

    def _shared(self) -> IO[str]:
        """Held by every run that cuts the work into as many parts. Others would do images of this one's again."""
        mine = self.path / f"_lock-of-{self.parts:05d}"
        lock = held(mine, fcntl.LOCK_SH)  # waits for others who only look whether it is held
        assert lock is not None
        for path in self.path.glob("_lock-of-*"):
            if path == mine:
                continue
            free = held(path, EXCLUSIVE)
            if free is None:
                lock.close()
                raise InputError(
                    f"{self.path}: another run, of {int(path.name[9:])} shares, is writing to it, and this one is of "
                    f"{self.parts}: wait for it, or give both the same n in --shard i/n"
                )
            free.close()
        return lock

    def _locked(self) -> IO[str]:
        lock = held(self.path / f"_lock-{self.part:05d}", EXCLUSIVE)
        if lock is None:
            raise InputError(
                f"{self.path}: another run is writing its shard {self.part}; wait for it, or give each its own --shard"
            )
        return lock

    def _check(self) -> None:
        """Write the manifest, or compare with the one that lies there. Of runs that start at once one writes it."""
        manifest = self.path / MANIFEST
        if not manifest.exists():
            unfinished = self.path / f"_manifest-{self.part:05d}.tmp"
            _write(unfinished, lambda file: file.write(json.dumps(self.about, indent=1).encode() + b"\n"))
            try:
                os.link(unfinished, manifest)
            except FileExistsError:
                pass
            except OSError:  # of a file system without hard links, such as exFAT
                os.replace(unfinished, manifest)
            finally:
                unfinished.unlink(missing_ok=True)
        try:
            found = json.loads(manifest.read_bytes())
        except ValueError as error:
            raise InputError(f"{manifest}: not JSON ({error}); choose another folder with -o") from error
        mine = json.loads(json.dumps(self.about))
        differs = [name for name in sorted(mine | found) if mine.get(name) != found.get(name)]
        if "encoder" in differs:
            raise InputError(
                f"{self.path} holds embeddings of another encoder, made from {found.get('checkpoint')}; this one is "
                f"from {mine['checkpoint']} (weights, dtype, processor or version differ): take another folder with -o"
            )
        differs = [name for name in differs if name != "checkpoint"]  # the same weights under another name
        if differs:
            got = ", ".join(f"{name} {found.get(name)!r} and not {mine.get(name)!r}" for name in differs)
            raise InputError(
                f"{self.path} holds embeddings with {got}: take the same options, or another folder with -o"
            )

    def shards(self) -> list[Path]:
        """Every shard of every part, sorted."""
        return sorted(self.path / name for name in os.listdir(self.path) if _NAME.fullmatch(name))

    def done(self) -> dict[int, tuple[int, Path]]:
        """What lies in the shards: a key's digest -> the size of what it was made from, and where it is."""
        found: dict[int, tuple[int, Path]] = {}
        for path in self.shards():
            for digest, size in _PAIR.iter_unpack(base64.b64decode(_metadata(path)[DONE])):
                found[digest] = (size, path)
        return found

    def write(self, rows: Sequence[Row]) -> Path:
        """One shard of these rows, sorted by key."""
        name = f"part-{self.part:05d}-{self.next:06d}.{self.kind}"
        unfinished = self.path / f"_{name}.tmp"
        rows = sorted(rows, key=lambda row: (row.key, row.index))
        done = base64.b64encode(b"".join(_PAIR.pack(row.digest, row.size) for row in rows)).decode()
        metadata = {DONE: done, "fused_vit": json.dumps(self.about)}
        if self.kind == "parquet":
            _write(unfinished, lambda file: _parquet(file, rows, metadata))
        else:
            _safetensors(unfinished, rows, metadata)
            _flush(unfinished)
        os.replace(unfinished, self.path / name)
        _flush(self.path)
        self.next += 1
        return self.path / name

    def reported(self) -> dict[str, Any]:
        """This part's report, {} where there is none."""
        try:
            return dict(json.loads((self.path / f"_report-{self.part:05d}.json").read_bytes()))
        except (OSError, ValueError):
            return {}

    def forget(self, parts: int) -> None:
        """Reports of parts that there no longer are, now that the work is cut into fewer."""
        for path in self.path.glob("_report-*.json"):
            if (name := _REPORT.fullmatch(path.name)) and int(name[1]) >= parts:
                path.unlink()

    def report(self, report: Mapping[str, Any]) -> Path:
        """_report-PART.json: what this part's run did and what failed, in place of that of the run before."""
        path = self.path / f"_report-{self.part:05d}.json"
        unfinished = path.with_suffix(".tmp")
        _write(unfinished, lambda file: file.write(json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n"))
        os.replace(unfinished, path)
        return path


def _write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    with open(path, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _flush(path: Path) -> None:
    """To the disk: of a folder the names in it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _metadata(path: Path) -> dict[str, str]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return dict(file.metadata())
        import pyarrow.parquet as pq

        return {k.decode(): v.decode() for k, v in (pq.read_schema(path).metadata or {}).items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path}: not a shard that can be read ({error}); delete it and run again") from error


def _safetensors(path: Path, rows: Sequence[Row], metadata: dict[str, str]) -> None:
    """embedding [images, out] or [all rows, out]; index, rows [images] and grid_thw [images, 3]; keys in the header."""
    pooled = rows[0].embedding.ndim == 1
    embeddings = [row.embedding for row in rows]
    tensors = {
        "embedding": torch.stack(embeddings) if pooled else torch.cat(embeddings),
        "index": torch.tensor([row.index for row in rows]),
        "rows": torch.tensor([row.rows for row in rows]),
        "grid_thw": torch.tensor([row.grid for row in rows]),
    }
    save(tensors, path, metadata | {"keys": json.dumps([row.key for row in rows])})


def _parquet(file: IO[bytes], rows: Sequence[Row], metadata: dict[str, str]) -> None:
    """key, index, grid_t, grid_h, grid_w, rows, and embedding: fixed_size_list, or a list of those where not pooled."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    pooled = rows[0].embedding.ndim == 1
    width = rows[0].embedding.shape[-1]
    embeddings = [row.embedding for row in rows]
    values = (torch.stack(embeddings) if pooled else torch.cat(embeddings)).flatten().numpy()
    embedding: Any = pa.FixedSizeListArray.from_arrays(pa.array(values), width)
    if not pooled:
        bounds = np.cumsum([0, *(row.rows for row in rows)])
        embedding = pa.LargeListArray.from_arrays(pa.array(bounds, pa.int64()), embedding)
    columns = {
        "key": pa.array([row.key for row in rows], pa.string()),
        "index": pa.array([row.index for row in rows], pa.int64()),
        **{f"grid_{n}": pa.array([row.grid[i] for row in rows], pa.int32()) for i, n in enumerate("thw")},
        "rows": pa.array([row.rows for row in rows], pa.int32()),
        "embedding": embedding,
    }
    table = pa.table(columns).replace_schema_metadata(metadata)
    size = max(1, GROUP_BYTES * len(rows) // max(1, values.nbytes))
    plain = [name for name in columns if name != "embedding"]
    # floats of embeddings do not compress, and statistics of them say nothing
    pq.write_table(table, file, row_group_size=size, compression="none", use_dictionary=False, write_statistics=plain)


def stored(embedding: torch.Tensor, name: str) -> torch.Tensor:
    """In the dtype that a shard keeps. Raises InputError where a finite number has no place in it."""
    dtype = STORED[name]
    result = embedding.to(dtype)
    if dtype == torch.float16 and not torch.equal(result.isfinite(), embedding.isfinite()):
        raise InputError("its embedding has numbers beyond float16's 65504; take --store float32")
    return result.flatten(1) if result.ndim == 3 else result


def storage(wanted: str | None, kind: str, pooled: bool, dtype: torch.dtype) -> str:
    """What shards keep: pooled vectors float32, rows the encoder's dtype; in Parquet, which has no bfloat16, float32.

    Raises InputError for bfloat16 in Parquet.
    """
    name = wanted or ("float32" if pooled else str(dtype).removeprefix("torch."))
    if name not in STORED:
        raise InputError(f"store is {name!r}; expected one of {', '.join(STORED)}")
    if kind == "parquet" and name == "bfloat16":
        if wanted is not None:
            raise InputError("Parquet has no bfloat16; take --store float32 (exact), float16, or --format safetensors")
        return "float32"
    return name
