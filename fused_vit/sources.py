"""Sources: what an archive holds, as records that any worker can read alone.

Folders, globs, lists of files, WebDataset tars, Parquet files with a column of images, and videos. Listing reads names,
headers and footers only; a record says where its bytes lie, so that nothing is read twice or in order.
"""

from __future__ import annotations

import glob
import hashlib
import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from .errors import InputError
from .images import check_size
from .shards import is_result

IMAGES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
VIDEOS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv"}
TAR, PARQUET, LIST = ".tar", ".parquet", ".txt"
KINDS = IMAGES | VIDEOS | {TAR, PARQUET}
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
NOT_TEXT = "its name is not UTF-8, and results are kept by name; rename it"
ROWS, PIECE = 64, 1 << 26  # of a Parquet file that are decoded at a time: rows, and bytes where rows are large


@dataclass(frozen=True, slots=True)
class Record:
    """One image or video: a whole file, a tar's member at (offset, size), or a Parquet file's (row group, row)."""

    key: str  # names it for ever: a path, tar/member, or file.parquet#row
    index: int  # its place in the file that holds it
    file: str
    size: int  # bytes of its own file or member, or of the whole Parquet file: another size means another content
    kind: Literal["file", "tar", "parquet"] = "file"
    at: tuple[int, int] = (0, 0)
    video: bool = False
    column: str = ""
    written: float = 0.0  # when its file was, in seconds since 1970

    @property
    def digest(self) -> int:
        """64 bits of the key."""
        return int.from_bytes(hashlib.blake2b(self.key.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class Unread:
    """What could not be listed or embedded, and why."""

    key: str
    reason: str
    index: int = 0


@dataclass(slots=True)
class Listing:
    """Everything that the sources hold, in an order that depends on nothing else; each key once."""

    records: list[Record] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)  # of other kinds in folders and of globs, and results
    without: str = ""


def find(sources: Sequence[str | Path], column: str | None = None, without: str | Path | None = None) -> Listing:
    """List sources: folders (recursive), globs, .txt lists (a path a line), .tar, .parquet, images and videos.

    column: of Parquet files, the one that holds images; by default the only one with bytes, or `image`.
    without: a folder that is left out where another holds it, such as the one that results go to.
    Raises InputError where a source does not exist or lies in `without`; what is broken inside one is a row of
    `unread`.
    """
    listing, seen = Listing(without=os.path.realpath(without) if without else ""), set()
    for source in sources:
        for record in _expand(str(source), column, listing):
            if record.key in seen:
                continue
            seen.add(record.key)
            if is_text(record.key):
                listing.records.append(record)
            else:
                listing.unread.append(Unread(shown(record.key), NOT_TEXT, record.index))
    return listing


def is_text(name: str) -> bool:
    """Bytes of a name that are not UTF-8 come from the system as lone surrogates, which no result can be named by."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(name: str) -> str:
    r"""A name as text that can be printed and written: each byte of it that is not UTF-8 as \xff."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def share(records: Sequence[Record], part: int, parts: int) -> Sequence[Record]:
    """The part-th of `parts` consecutive shares, of equal lengths give or take one. Raises InputError."""
    if not 0 <= part < parts:
        raise InputError(f"shard is {part}/{parts}; expected i/n with 0 <= i < n, such as 0/8 for the first of eight")
    return records[len(records) * part // parts : len(records) * (part + 1) // parts]


def _expand(source: str, column: str | None, listing: Listing) -> Iterator[Record]:
    if os.path.isdir(source):
        if _inside(source, listing.without):
            raise InputError(
                f"{source} lies in {listing.without}, where results go and no images are looked for; choose another "
                "folder with -o, beside it or in it"
            )
        for path in _walk(source, listing):
            if _suffix(path) in KINDS and not is_result(path):
                yield from _file(path, column, listing)
            else:
                listing.ignored.add(path)
    elif os.path.lexists(source):
        if _suffix(source) == LIST:
            for path in _lines(source):
                yield from _file(path, column, listing)
        else:
            yield from _file(source, column, listing)
    elif glob.has_magic(source):
        found = sorted(glob.glob(source, recursive=True))
        if not found:
            raise InputError(f"{source}: matches nothing; expected a glob such as 'photos/**/*.jpg' (in quotes)")
        for path in found:
            if _inside(path, listing.without):
                continue
            wanted = os.path.isdir(path) or _suffix(path) in KINDS | {"", _suffix(source)}
            if wanted and not is_result(path):
                yield from _expand(path, column, listing)
            else:
                listing.ignored.add(path)
    else:
        raise InputError(f"{source}: no such file or folder")


def _inside(path: str, folder: str) -> bool:
    return bool(folder) and Path(os.path.realpath(path)).is_relative_to(folder)


def _walk(folder: str, listing: Listing) -> Iterator[str]:
    """Files under a folder in sorted order, hidden ones left out; links to folders are not followed."""

    def unread(error: OSError) -> None:
        listing.unread.append(Unread(shown(str(error.filename)), error.strerror or str(error)))

    for here, folders, files in os.walk(folder, onerror=unread):
        if _inside(here, listing.without):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(here, name) for name in sorted(files) if not name.startswith("."))


def _lines(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # splitlines() would cut a name at U+2028
        return [line.strip() for line in lines if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not text; expected a path a line in UTF-8") from error


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _file(path: str, column: str | None, listing: Listing) -> Iterator[Record]:
    """Records of one file by its suffix; one without a known suffix is taken for an image."""
    path = os.path.normpath(path)
    try:
        if not is_text(path):
            raise InputError(NOT_TEXT)  # before anything that would have to name it
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise InputError("not a regular file")
        size, written = status.st_size, status.st_mtime
        if path.lower().endswith(COMPRESSED):
            raise InputError("a compressed tar, whose members cannot be read one by one; decompress it first")
        if _suffix(path) == TAR:
            yield from _members(path, written)
        elif _suffix(path) == PARQUET:
            yield from _rows(path, size, column, written)
        else:
            yield Record(path, 0, path, size, video=_suffix(path) in VIDEOS, written=written)
    except (OSError, tarfile.TarError, InputError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        listing.unread.append(Unread(shown(path), " ".join(reason.split())))


def _members(path: str, written: float) -> Iterator[Record]:
    """Those before the place where a tar is broken, too."""
    index = 0
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            kind = _suffix(member.name)
            if member.isreg() and kind in IMAGES | VIDEOS:
                at = (member.offset_data, member.size)
                key = f"{path}/{member.name.removeprefix('./')}"
                yield Record(key, index, path, member.size, "tar", at, kind in VIDEOS, written=written)
                index += 1


def _rows(path: str, size: int, column: str | None, written: float) -> list[Record]:
    parquet = _parquet(path)
    name = _column(path, parquet.schema_arrow, column)
    rows = [n for g in range(parquet.num_row_groups) for n in ((g, r) for r in range(_length(parquet, g)))]
    parquet.close()
    return [
        Record(f"{path}#{i}", i, path, size, "parquet", at, column=name, written=written) for i, at in enumerate(rows)
    ]


def _length(parquet: Any, group: int) -> int:
    length: int = parquet.metadata.row_group(group).num_rows
    return length


def _row_bytes(parquet: Any, group: int, column: str) -> int:
    """Of a row of one column, on average, before it was compressed; a struct's fields are columns of the file."""
    about = parquet.metadata.row_group(group)
    parts = [about.column(i) for i in range(about.num_columns)]
    size: int = sum(p.total_uncompressed_size for p in parts if f"{p.path_in_schema}.".startswith(f"{column}."))
    return size // max(1, int(about.num_rows))


def _parquet(path: str) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(f"Parquet needs pyarrow: pip install 'fused-vit[embed]' ({error})") from error
    try:
        return pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise InputError(f"not a Parquet file that can be read ({error})") from error


def _column(path: str, schema: Any, wanted: str | None) -> str:
    """The column of images: bytes, a struct with `bytes` as Hugging Face datasets have it, or, if asked for, paths."""
    import pyarrow.types as types

    def holds(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(one.name == "bytes" and holds(one.type) for one in kind)
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    found = [one.name for one in schema if holds(one.type)]
    if wanted is not None:
        if wanted not in schema.names:
            raise InputError(f"has no column {wanted!r}; its columns are {', '.join(schema.names)}")
        kind = schema.field(wanted).type
        if wanted not in found and not types.is_string(kind) and not types.is_large_string(kind):
            raise InputError(f"column {wanted!r} is {kind}; expected bytes, a struct with bytes, or paths")
        return wanted
    if len(found) == 1 or "image" in found:
        return "image" if "image" in found else found[0]
    names = ", ".join(found or schema.names)
    raise InputError(f"which column holds images is not clear from {names}; name it with --column")


# --- reading, in whatever process ---


def read(record: Record) -> bytes | str:
    """The encoded bytes of a record, or the path of the file that is it. Raises InputError or OSError."""
    if record.kind == "file":
        return record.file
    if record.kind == "tar":
        offset, size = record.at
        if not record.video:  # an image's size is known to be too large before it is in memory
            check_size(size, record.key)
        with open(record.file, "rb") as tar:
            tar.seek(offset)
            data = tar.read(size)
        if len(data) < size:
            raise InputError(f"{record.key}: the tar ends before it does")
        return data
    value = _rows_of(record.file, record.at[0], record.column).at(record.at[1])
    beside = os.path.dirname(record.file)
    if isinstance(value, dict):
        name, value = value.get("path"), value["bytes"]
        if value is None and name is not None:  # not asked for by --column, so it may not lead out
            value = os.path.realpath(os.path.join(beside, name))
            if not Path(value).is_relative_to(os.path.realpath(beside)):
                raise InputError(f"{record.key}: no bytes, and its path leads out of the file's folder")
    if value is None:
        raise InputError(f"{record.key}: null")
    return os.path.join(beside, value) if isinstance(value, str) else bytes(value)


class _RowGroup:
    """Rows of one column of a row group, read forward in small pieces: a row group may be larger than memory."""

    def __init__(self, path: str, group: int, column: str) -> None:
        self.arguments = (path, group, column)
        self._begin()

    def _begin(self) -> None:
        path, group, column = self.arguments
        parquet = _parquet(path)
        rows = max(1, min(ROWS, PIECE // max(1, _row_bytes(parquet, group, column))))
        self.batches: Iterator[Any] = iter(parquet.iter_batches(rows, row_groups=[group], columns=[column]))
        self.first, self.values = 0, None
        self.broken: Exception | None = None

    def at(self, row: int) -> Any:
        """Raises what reading it, or any row before it, raised."""
        if row < self.first:
            self._begin()
        while self.values is None or row >= self.first + len(self.values):
            values = self._read()
            self.first += 0 if self.values is None else len(self.values)
            self.values = values
        return self.values[row - self.first].as_py()

    def _read(self) -> Any:
        """The next piece; after one that cannot be read there is none, of which the reader only says that it ends."""
        if self.broken is None:
            try:
                return next(self.batches).column(0)
            except StopIteration:
                self.broken = InputError("its row group ends before it does")
            except Exception as error:
                self.broken = error
        raise self.broken


@lru_cache(2)
def _rows_of(path: str, group: int, column: str) -> _RowGroup:
    return _RowGroup(path, group, column)
