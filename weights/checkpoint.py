"""A tower's tensors in a safetensors checkpoint: a folder, one file, or a repository of the Hugging Face hub.

Only what the tower needs is touched. Of the files, those shards with a tensor of the tower: a hub shard without one
is never fetched, a local one may be absent. Of a shard, its header and the tower's bytes: the language model costs
neither memory nor reading. A tower is checked from headers alone, so a wrong checkpoint fails with one complete message
before any tensor is read. A tensor is read by its place into memory of its own, never mapped: a mapped file that
shrinks kills the process that touches its pages. Pickle files are never opened.
"""

from __future__ import annotations

import json
import math
import os
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fused_vit.errors import CheckpointError

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
LISTED = 20  # names an error spells out per list
LONGEST = 200  # characters of a name or a cause that an error spells out
MIB = 2**20
LARGEST_CONFIG = MIB  # bytes; published ones have some 10 KiB, 100 where every module that is not quantized is named
LARGEST_INDEX = 48 * MIB  # bytes; Kimi-K2.5's, a trillion parameters in quantized experts, has about 23 MiB
LARGEST_HEADERS = 16 * MIB  # bytes of all shards with the tower, mostly one or two; a tensor takes about 150
LARGEST_COUNT = 2**19  # values in a JSON file or in all headers; Kimi-K2.5's index has 210 000, a header 8 a tensor
LARGEST_RANK = 64  # dimensions, torch's own limit
PIECE = 2**30  # bytes asked of the system at once, which reads no more than 2 GiB
PICKLE = "Pickle files are never loaded: save the model as safetensors with transformers' `save_pretrained`."


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a shard's header says of one tensor."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TowerTensors(Mapping[str, torch.Tensor]):
    """A tower's tensors by their name without prefix. Indexing reads one into fresh memory of the CPU.

    prefix: what the checkpoint puts before each name; infos: file, dtype and shape per name; bytes: size of them all.
    """

    def __init__(self, prefix: str, infos: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor]) -> None:
        self.prefix = prefix
        self.infos = dict(infos)
        self.bytes = sum(info.bytes for info in infos.values())
        self._read = read

    def __getitem__(self, key: str) -> torch.Tensor:
        if key not in self.infos:
            raise KeyError(key)
        return self._read(self.prefix + key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)


class Checkpoint:
    """An opened checkpoint; see `open`. source: as given; config: its config.json."""

    def __init__(self, source: str, config: dict[str, Any], home: _Folder | _Hub, single: str | None) -> None:
        self.source = source
        self.config = config
        self._home = home
        self._single = single
        self._shards: dict[str, _Shard] = {}

    @classmethod
    def open(cls, source: str | Path, *, revision: str | None = None) -> Checkpoint:
        """Reads config.json and nothing else, so that a config can be refused before a weight is fetched.

        Args:
            source: a folder; a `.safetensors` file with config.json beside it; or a hub id, a str such as
                "Qwen/Qwen3-VL-8B-Instruct" (HF_HUB_OFFLINE=1: from the hub's local cache alone).
            revision: branch, tag or commit of a hub id, pinned to its commit at the first file.
        Raises:
            CheckpointError: nothing at source, a pickle file, or a config.json that is absent or no JSON object.
        """
        home, single = _find(source, revision)
        config = home.get(CONFIG)
        if config is None:
            raise CheckpointError(f"{source}: no {CONFIG}; expected it beside the weights. {home.remedy()}")
        return cls(str(source), _read_json(config, LARGEST_CONFIG), home, single)

    @property
    def place(self) -> tuple[str, str | None]:
        """Where it lies wherever the process goes, with a hub id's commit: `open` finds the same files there again."""
        if isinstance(self._home, _Hub):
            return self._home.repo, self._home.revision
        return os.path.abspath(Path(self.source).expanduser()), None

    @cached_property
    def files(self) -> dict[str, str]:
        """Every tensor's full name -> the file that holds it, from the index or from the only file's header.

        Raises:
            CheckpointError: no safetensors weights, an unreadable file, or an index that names other than plain files.
        """
        index = None if self._single else self._home.get(INDEX)
        if index is not None:
            return _read_index(index)
        single = self._single or SINGLE
        shard = self._shard(single)
        if shard is None:
            raise CheckpointError(f"{self.source}: neither {INDEX} nor {SINGLE}. {self._home.remedy()}")
        return dict.fromkeys(shard.rows, single)

    def tower(
        self, prefixes: Sequence[str], expected: Mapping[str, tuple[int, ...]], unused: tuple[str, ...] = ()
    ) -> TowerTensors:
        """The tensors `expected` (name -> shape), under the first of `prefixes` that has any of them.

        unused: beginnings of names under the prefix that may be there and are left alone.

        Raises:
            CheckpointError: shards that are absent; or, in one message, every tensor that is missing, unexpected (the
                prefix has it, `expected` does not), of another shape, or of a dtype that is no float of 16+ bits.
        """
        prefix = self._prefix(prefixes, expected)
        shards = sorted({self.files[prefix + key] for key in expected if prefix + key in self.files})
        absent = [shard for shard in shards if self._shard(shard) is None]
        if absent:
            raise CheckpointError(f"{self.source}: shards absent: {_list(absent)}. {self._home.remedy()}")
        found = {key: row for key in expected if (row := self._row(prefix + key))}
        problems = {
            "missing": [key for key in expected if key not in found],
            "unexpected": _unexpected(self.files, prefix, expected, unused),
            "of another shape": [
                f"{key} is {list(shape)}, expected {list(expected[key])}"
                for key, (_, _, shape) in found.items()
                if shape != tuple(expected[key])
            ],
            "of another dtype": [f"{key} is {dtype}" for key, (_, dtype, _) in found.items() if dtype not in DTYPES],
        }
        if any(problems.values()):
            raise CheckpointError(_mismatch(self.source, prefix, problems))
        self._check_once(prefix, expected, shards)
        infos = {key: TensorInfo(file, DTYPES[dtype], shape) for key, (file, dtype, shape) in found.items()}
        return TowerTensors(prefix, infos, self._read)

    def _check_once(self, prefix: str, expected: Mapping[str, tuple[int, ...]], shards: Sequence[str]) -> None:
        """No tensor of the tower lies in two of its shards, where an index could pick either."""
        holder: dict[str, str] = {}
        for shard in shards:
            for name in self._shards[shard].rows:
                if name.removeprefix(prefix) in expected and holder.setdefault(name, shard) != shard:
                    raise CheckpointError(
                        f"{self.source}: {name} lies in {holder[name]} and in {shard}; expected it in one. "
                        "Take all shards from one release."
                    )

    def _prefix(self, prefixes: Sequence[str], expected: Mapping[str, tuple[int, ...]]) -> str:
        for prefix in prefixes:
            if any(prefix + key in self.files for key in expected):
                return prefix
        raise CheckpointError(
            f"{self.source}: no tensor of the tower under the prefixes {', '.join(map(repr, prefixes))}; it has "
            f"{_list(sorted(self.files), 4)}. Give the checkpoint of a whole model, or of its vision tower."
        )

    def _shard(self, name: str) -> _Shard | None:
        """A file that is open, kept: its header is read and checked, no tensor. None: the source lacks it."""
        if name not in self._shards:
            path = self._home.get(name)
            if path is None:
                return None
            others = self._shards.values()
            try:
                self._shards[name] = _Shard(path, sum(s.header for s in others), sum(s.count for s in others))
            except (OSError, ValueError, RecursionError) as error:
                raise CheckpointError(
                    f"{path}: no readable safetensors file ({_cut(error)}). "
                    "Download it again (a git clone: git lfs pull)."
                ) from error
        return self._shards[name]

    def _row(self, name: str) -> tuple[Path, str, tuple[int, ...]] | None:
        """File, dtype as the header spells it, and shape of a tensor; None where the index or the header lacks it."""
        if name not in self.files:
            return None
        shard = self._shards[self.files[name]]
        row = shard.rows.get(name)
        return None if row is None else (shard.path, row.dtype, row.shape)

    def _read(self, name: str) -> torch.Tensor:
        shard = self._shards[self.files[name]]
        try:
            return shard.read(shard.rows[name])
        except (OSError, EOFError) as error:
            raise CheckpointError(
                f"{shard.path}: {name} cannot be read ({_cut(error)}). Load it when nothing else writes to the file."
            ) from error


@dataclass(frozen=True, slots=True)
class _Row:
    """What a header says of one tensor; begin, end: in bytes of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class _Shard:
    """A safetensors file, open until nobody holds it, so that what is read is what was checked.

    rows: by name; header, count: bytes and values of its header. Raises OSError or ValueError with the cause.
    """

    def __init__(self, path: Path, headers: int, counted: int) -> None:
        """headers, counted: bytes and values in the headers of the checkpoint's other shards."""
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self.header = int.from_bytes(os.pread(self._file, 8, 0), "little")
        if headers + self.header > LARGEST_HEADERS:
            raise ValueError(
                f"a header of {self.header} bytes, at most {LARGEST_HEADERS} are read in all headers together"
            )
        raw = os.pread(self._file, self.header, 8)
        if raw[:1] != b"{" or len(raw) < self.header:
            raise ValueError(f"a header of {self.header} bytes that is cut or no JSON object")
        self.count = _count(raw)
        if counted + self.count > LARGEST_COUNT:
            raise ValueError(f"more than {LARGEST_COUNT} values in all headers together")
        start = 8 + self.header
        self.rows = _rows(json.loads(raw.decode(), object_pairs_hook=_once), start, os.fstat(self._file).st_size)

    def read(self, row: _Row) -> torch.Tensor:
        """Into fresh memory. Raises EOFError where the file has become too short."""
        buffer = torch.empty(row.end - row.begin, dtype=torch.uint8)
        view, done = buffer.numpy().data, 0
        while done < len(view):
            got = os.preadv(self._file, [view[done : done + PIECE]], row.begin + done)
            if got == 0:
                raise EOFError(f"the file ended {len(view) - done} bytes early: it has shrunk since it was opened")
            done += got
        return buffer.view(DTYPES[row.dtype]).reshape(row.shape)


@dataclass(frozen=True, slots=True)
class _Folder:
    """The files of a local folder. Links that lead out of it are refused: a downloaded one could point anywhere."""

    path: Path

    def get(self, name: str) -> Path | None:
        path, root = self.path / name, self.path.resolve()
        if not os.path.isfile(path):  # unlike Path.is_file, False for a name too long
            return None
        # A repository in the hub's cache is links into itself: models--owner--name/snapshots/commit/x.json ->
        # ../../blobs/... What lies beside it is other repositories', or nobody's.
        if len(root.parents) > 2 and root.parent.name == "snapshots" and root.parents[1].name.startswith("models--"):
            root = root.parents[1]
        if not path.resolve().is_relative_to(root):
            raise CheckpointError(
                f"{path}: links to {path.resolve()}, outside its folder. Give the real file's folder."
            )
        return path

    def remedy(self) -> str:
        try:
            names = sorted(os.listdir(self.path))
        except OSError as error:
            return f"The folder cannot be listed ({error})."
        pickles = any(name.endswith((".bin", ".pt", ".pth")) for name in names)
        return f"The folder has {_list(names)}. {PICKLE if pickles else 'Download the missing files into it.'}"


@dataclass(slots=True)
class _Hub:
    """The files of a hub repository, fetched one by one into the local cache, all from the commit of the first."""

    repo: str
    revision: str | None

    def get(self, name: str) -> Path | None:
        try:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import EntryNotFoundError
        except ImportError as error:
            raise CheckpointError(
                f"{self.repo}: a hub id needs huggingface_hub; install it or give a folder"
            ) from error
        try:
            path = Path(hf_hub_download(self.repo, name, revision=self.revision))
        except EntryNotFoundError:
            return None
        except Exception as error:  # whatever the transport raises, the caller meets one kind of error
            raise CheckpointError(
                f"{self.repo}: cannot fetch {name} ({type(error).__name__}: {error}). Check the id and the revision; "
                "a gated model needs `hf auth login`; or give a folder."
            ) from error
        if re.fullmatch(r"[0-9a-f]{40}", path.parent.name):
            self.revision = path.parent.name
        return path

    def remedy(self) -> str:
        return (
            "The hub lacks it, or cannot be reached (HF_HUB_OFFLINE?) and the cache lacks it: connect or give a folder."
        )


def _find(source: str | Path, revision: str | None) -> tuple[_Folder | _Hub, str | None]:
    """Where the files of a source are, and the name of the only file if it is one."""
    path = Path(source).expanduser()
    if not os.path.exists(path):  # unlike Path.exists, False for a name too long or a folder closed to us
        if isinstance(source, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
            return _Hub(source, revision), None
        raise CheckpointError(f"{source}: no such folder or file; expected one, or a hub id as 'owner/name' (a str)")
    if revision is not None:
        raise CheckpointError(f"{source} is local, but revision is {revision!r}; it is for hub ids only: leave it out")
    if path.is_dir():
        return _Folder(path), None
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{source}: expected a folder or a .safetensors file. {PICKLE}")
    return _Folder(path.parent), path.name


def read_beside(
    source: str | Path, names: Sequence[str], *, revision: str | None = None
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Those JSON files of a checkpoint that it has, as path and object, under the checks that its config.json gets.

    Raises:
        CheckpointError: nothing at source, a link out of its folder, or a file that is too large or no JSON object.
    """
    home, _ = _find(source, revision)
    paths = {name: path for name in names if (path := home.get(name))}
    return {name: (path, _read_json(path, LARGEST_CONFIG)) for name, path in paths.items()}


def _read_json(path: Path, largest: int, once: bool = False) -> dict[str, Any]:
    """largest: its bytes; once: a key may not come twice, where the last would hide the others."""
    try:
        with path.open("rb") as file:
            raw = file.read(largest + 1)
        if len(raw) > (largest if raw.isascii() else largest // 4):  # one wide letter, and Python holds all in 4 bytes
            raise ValueError(f"more than {largest} bytes, or a quarter of them where not all are ASCII")
        if _count(raw) > LARGEST_COUNT:
            raise ValueError(f"more than {LARGEST_COUNT} values")
        value = json.loads(raw, object_pairs_hook=_once if once else None)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({_cut(error)}). Download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}; expected an object")
    return value


def _count(raw: bytes) -> int:
    """At least the values that parsing makes, of up to 300 bytes each: all but the first follow one of these."""
    return sum(raw.count(mark) for mark in (b",", b"[", b"{"))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {_cut(repr(twice))} twice")
    return found


def _rows(header: dict[str, Any], start: int, size: int) -> dict[str, _Row]:
    """A header's tensors: they cover the file from `start` to `size` without a gap, each as large as its shape says."""
    rows = {}
    for name, fields in header.items():
        if name != "__metadata__":
            rows[name] = _row(name, fields, start)
    at = start
    for name, row in sorted(rows.items(), key=lambda item: (item[1].begin, item[1].end)):
        if row.begin != at:
            raise ValueError(f"{_cut(name)} begins at byte {row.begin}, expected {at}")
        at = row.end
    if at != size:
        raise ValueError(f"the tensors end at byte {at}, the file at {size}")
    return rows


def _row(name: str, fields: Any, start: int) -> _Row:
    """The size of a tensor is checked where its dtype is one that a tower may have; no other is ever read."""
    match fields:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise ValueError(f"{_cut(name)} has no dtype, shape and data_offsets")
    whole = all(type(side) is int and 0 <= side < 2**63 for side in (*shape, begin, end))
    if not whole or begin > end or len(shape) > LARGEST_RANK:
        raise ValueError(f"{_cut(name)} has an impossible shape or place")
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{_cut(name)} has {end - begin} bytes, which is not {dtype} of {shape}")
    return _Row(_cut(dtype), tuple(shape), start + begin, start + end)


def _read_index(path: Path) -> dict[str, str]:
    files = _read_json(path, LARGEST_INDEX, once=True).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{path}: no weight_map; expected an object of tensor name -> file name")
    # A name of these characters alone is no path: it can neither climb out of the folder nor be absolute.
    wrong = {str(file) for file in files.values() if not re.fullmatch(r"\w[\w.-]*\.safetensors", str(file))}
    if wrong:
        raise CheckpointError(
            f"{path}: expected names of .safetensors files beside it, got {_list(sorted(wrong))}. {PICKLE}"
        )
    return files


def _unexpected(
    files: Mapping[str, str], prefix: str, expected: Mapping[str, tuple[int, ...]], unused: tuple[str, ...]
) -> list[str]:
    """Names under the prefix that are not expected; without a prefix, only those of the tower's top modules."""
    tops = {key.partition(".")[0] for key in expected}
    keys = (name.removeprefix(prefix) for name in files if name.startswith(prefix))
    extra = [key for key in keys if key not in expected and (prefix or key.partition(".")[0] in tops)]
    return [key for key in extra if not key.startswith(unused)]


def _mismatch(source: str, prefix: str, problems: Mapping[str, list[str]]) -> str:
    lines = [f"  {len(keys)} {what}: {_list(keys)}" for what, keys in problems.items() if keys]
    remedy = "Take config.json and weights from one release"
    if problems["of another dtype"]:
        remedy += f", not a quantized one: the tower is read as {', '.join(DTYPES)}"
    return "\n".join([f"{source}: the tensors under {prefix!r} are not the tower of {CONFIG}:", *lines, f"{remedy}."])


def _list(names: Sequence[str], listed: int = LISTED) -> str:
    more = f" and {len(names) - listed} more" if len(names) > listed else ""
    return (", ".join(map(_cut, names[:listed])) or "nothing") + more


def _cut(text: object) -> str:
    whole = str(text)
    return whole if len(whole) <= LONGEST else f"{whole[:LONGEST]}..."
