"""Encoding: photographs to features in one file, by way of a part for each photograph.

So one that cannot be read costs nobody else the result, and a run that was interrupted, or that had bad photographs
among its own, does only what is left when it is started again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from . import __version__
from .calls import call_of, flatten_call
from .encoder import FusedViT
from .errors import InputError
from .images import check_file, read_image
from .pca import colours, raster
from .shards import EXCLUSIVE, held, save
from .sources import NOT_TEXT, is_text
from .spec import TowerSpec

# Tensors of a part, beside deepstack.K; COLOURS: the picture of the patches, if one is wanted. `merge` names them by
# photograph, so that no photograph's name can be taken for another tensor's.
ROWS, GRID, COLOURS = "rows", "grid_thw", "colours"
RESERVED = "__metadata__"  # by safetensors: no tensor can be called so
LOCK, MERGED = "_lock", "_merged"
ATTEMPTS = 100  # to lock a folder that others remove
_PART = re.compile(r"[0-9a-f]{32}\.(safetensors|tmp)")  # what `Parts` calls its files


@dataclass(frozen=True, slots=True)
class Done:
    """A photograph and where its features are."""

    photo: Path
    part: Path


@dataclass(frozen=True, slots=True)
class Failed:
    """A photograph and why it has none."""

    photo: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Parts:
    """The folder of a run's parts, there while it is locked. A part is named by all that its features depend on.

    encoder: an `identity`.
    """

    folder: Path
    encoder: str
    coloured: bool

    def of(self, photo: Path) -> Path:
        """Where a photograph's part lies, or will. Raises InputError where there is no such file."""
        status = check_file(photo)
        about = [ROWS, str(photo), status.st_size, status.st_mtime_ns, self.encoder, self.coloured]
        name = hashlib.blake2b(json.dumps(about).encode(), digest_size=16).hexdigest()
        return self.folder / f"{name}.safetensors"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """For one run at a time: the first to end removes parts that another counts on. Raises InputError."""
        with self._lock():
            try:
                yield
            finally:
                with suppress(OSError):
                    (self.folder / LOCK).unlink()
                    self.folder.rmdir()

    def _lock(self) -> IO[str]:
        path = self.folder / LOCK
        for _ in range(ATTEMPTS):
            with suppress(FileNotFoundError, FileExistsError):  # a run that ends in this moment removes both
                self.folder.mkdir(exist_ok=True)
                lock = held(path, EXCLUSIVE)
                if lock is None:
                    raise InputError(
                        f"{self.folder}: another run is encoding to the same file; wait for it, or choose another "
                        "with -o"
                    )
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                    return lock
                lock.close()
        raise InputError(f"{self.folder}: cannot be locked; remove what is there, or choose another file with -o")

    def write(self, part: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Whole or not at all: a run may be killed at any moment."""
        unfinished = part.with_suffix(".tmp")
        save(tensors, unfinished)
        os.replace(unfinished, part)

    def remove(self) -> None:
        """Every run's parts, finished or not: other files are not ours."""
        for file in self.folder.iterdir():
            if _PART.fullmatch(file.name):
                with suppress(OSError):  # the result is written: what cannot be removed is no failure
                    file.unlink()


def identity(vit: FusedViT, prepare: Any) -> str:
    """Of an encoder and its processor: by their numbers, since a name may stand for others tomorrow."""
    found = hashlib.blake2b(f"{__version__} {vit.spec} {prepare.to_json_string()}".encode(), digest_size=16)
    for name, weight in sorted(vit.weights.items()):
        found.update(f"{name} {weight.dtype}".encode())
        found.update(weight.contiguous().view(torch.uint8).cpu().numpy().data)
    return found.hexdigest()


def encode_photos(vit: FusedViT, prepare: Any, photos: Iterable[Path], parts: Parts) -> list[Done | Failed]:
    """Every photograph's part, made now unless it lies there from an earlier run.

    Raises OSError: a part cannot be written, which no other photograph would change.
    """
    rows: list[Done | Failed] = []
    owners: dict[str, Path] = {}
    for photo in photos:
        try:
            _claim(photo, vit.spec, owners)
            part = parts.of(photo)
            tensors = None if _readable(part) else _encode(vit, prepare, photo, parts.coloured)
        except ImportError:
            raise  # nothing that another photograph would change
        except Exception as error:  # ours, and whatever a processor or torch stumbles over
            rows.append(Failed(photo, _reason(photo, error)))
            continue
        if tensors is not None:
            parts.write(part, tensors)
        rows.append(Done(photo, part))
    return rows


def _reason(photo: Path, error: Exception) -> str:
    """One line. The processor's errors on sizes that it cannot resize speak for themselves; others need their type."""
    if isinstance(error, MemoryError):  # of the host, which says nothing more
        return "not enough memory to decode and resize it"
    text = " ".join(str(error).removeprefix(f"{photo}: ").split())
    plain = isinstance(error, (ValueError, ArithmeticError, torch.OutOfMemoryError)) and text
    return text if plain else f"{type(error).__name__}: {text}"


def _claim(photo: Path, spec: TowerSpec, owners: dict[str, Path]) -> None:
    """Make a photograph the owner of its names in the merged file. Raises InputError where it cannot have them all."""
    if not is_text(str(photo)):
        raise InputError(f"{photo}: {NOT_TEXT}")
    names = [_name(photo, key) for key in (ROWS, GRID, *(f"deepstack.{k}" for k in range(len(spec.deepstack))))]
    if RESERVED in names:
        raise InputError(f"{photo}: safetensors keeps this name for itself; rename it, or give its absolute path")
    for name in names:
        if owners.get(name, photo) != photo:
            raise InputError(f"{photo}: {name} names a result of {owners[name]}; rename one, or encode them apart")
    owners.update(dict.fromkeys(names, photo))


def _name(photo: Path, key: str) -> str:
    return f"{photo}" if key == ROWS else f"{photo}.{key}"


def _readable(part: Path) -> bool:
    try:
        with safe_open(part, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _encode(vit: FusedViT, prepare: Any, photo: Path, coloured: bool) -> dict[str, torch.Tensor]:
    batch = prepare(images=[read_image(photo)], return_tensors="pt")
    pixels, grid = flatten_call(vit.spec, *call_of(batch))
    result = vit(pixels.to(vit.device), grid)
    tensors = {ROWS: result.split()[0].cpu(), GRID: torch.tensor(grid[0])}
    tensors |= {f"deepstack.{k}": t.cpu() for k, t in enumerate(result.deepstack_features)}
    if coloured:
        tensors[COLOURS] = colours(raster(result.last_hidden_state, grid[0], vit.spec)[0])
    return {name: t.contiguous() for name, t in tensors.items()}


def merge(rows: Sequence[Done], output: Path, metadata: dict[str, str]) -> list[torch.Tensor]:
    """All parts as one file, which takes its place only when it is whole; the pictures of their patches, if any.

    Rows are named by the photograph's path, .grid_thw and .deepstack.K beside them.
    """
    tensors: dict[str, torch.Tensor] = {}
    pictures = []
    for row in rows:
        with safe_open(row.part, "pt") as file:
            part = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if COLOURS in part:
            pictures.append(part.pop(COLOURS))
        tensors |= {_name(row.photo, key): tensor for key, tensor in part.items()}
    unfinished = rows[0].part.with_name(MERGED)  # a name beside the output might be a photograph's
    save(tensors, unfinished, metadata)
    os.replace(unfinished, output)
    return pictures
