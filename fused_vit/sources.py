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
from .tars import members

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
    r"""A name as text that can be printed and written: each byte of it that is not UTF-8 as \xff.

    So is each control character or mark of direction, as \x1b or \u202e: a terminal would obey what an archive says.
    """
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in name)


def _escaped(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":  # a byte, as the system's names have those that are not UTF-8
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()


def share(records: Sequence[Record], part: int, parts: int) -> Sequence[Record]:
    """The part-th of `parts` consecutive shares, of equal lengths give or take one. Raises InputError."""
    if not 0 <= part < parts:
        raise InputError(f"shard is {part}/{parts}; expected i/n with 0 <= i < n, such as 0/8 for the first of eight")
    return records[len(records) * part // parts : len(records) * (part + 1) // parts]


def _expand(source: str, column: str | None, listing: Listing, named: bool = True) -> Iterator[Record]:
    if os.path.isdir(source):
        if _inside(source, listing.without):
            raise InputError(
                f"{source} lies in {listing.without}, where results go and no images are looked for; choose another "
                "folder with -o, beside it or in it"
            )
        for path in _walk(source, listing):
            if _suffix(path) in KINDS and not is_result(path):
                yield from _file(path, column, listing, named=False)
            else:
                listing.ignored.add(path)
    elif os.path.lexists(source):
        if _suffix(source) == LIST:
            for path in _lines(source):
                yield from _file(path, column, listing)
        else:
            yield from _file(source, column, listing, named)
    elif "://" in source:
        raise InputError(
            f"{source}: an address; expected local files or folders. For a bucket there is fused_vit.ray "
            "(docs/embedding.md), or download it first"
        )
    elif glob.has_magic(source):
        found = sorted(glob.glob(source, recursive=True))
        if not found:
            raise InputError(f"{source}: matches nothing; expected a glob such as 'photos/**/*.jpg' (in quotes)")
        for path in found:
            if _inside(path, listing.without):
                continue
            wanted = os.path.isdir(path) or _suffix(path) in KINDS | {"", _suffix(source)}
            if wanted and not is_result(path):
                yield from _expand(path, column, listing, named=False)
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
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
        raise InputError(f"{path}: not a regular file; expected a path a line in UTF-8")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # splitlines() would cut a name at U+2028
        return [line.strip() for line in lines if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not text; expected a path a line in UTF-8") from error


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _file(path: str, column: str | None, listing: Listing, named: bool = True) -> Iterator[Record]:
    """Records of one file by its suffix; one without a known suffix is taken for an image.

    named: outright, not found in a folder or by a glob, where a Parquet file may be another's metadata.
    """
    name, path = path, os.path.normpath(path)
    try:
        if "\0" in name:  # some normpaths cut it off there, which names another file
            path = name
            raise InputError("its name holds a NUL byte, which no file's does")
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
    except ImportError:
        raise
    except _NoImages as error:
        if named:
            listing.unread.append(Unread(shown(path), _reason(error)))
        else:
            listing.ignored.add(path)
    except Exception as error:  # what the readers of tars and of Parquet raise for hostile bytes has no end
        listing.unread.append(Unread(shown(path), _reason(error)))


def _reason(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    if not isinstance(error, OSError | tarfile.TarError | InputError):
        reason = f"{type(error).__name__}: {reason}"
    return shown(" ".join(reason.split()))


class _NoImages(InputError):
    """A Parquet file without any column of bytes."""


def _members(path: str, written: float) -> Iterator[Record]:
    """Those before the place where a tar is broken, too."""
    index = 0
    for member in members(path):
        kind = _suffix(member.name)
        if member.isreg() and kind in IMAGES | VIDEOS:
            at = (member.offset_data, member.size)
            key = f"{path}/{member.name.removeprefix('./')}"
            yield Record(key, index, path, member.size, "tar", at, kind in VIDEOS, written=written)
            index += 1


def _rows(path: str, size: int, column: str | None, written: float) -> list[Record]:
    parquet = _parquet(path)
    name = _column(path, parquet.schema_arrow, column)
    lengths = [_length(parquet, g) for g in range(parquet.num_row_groups)]
    parquet.close()
    if (claimed := sum(max(0, n) for n in lengths)) > size:  # a footer may claim any number, and each is a record
        raise InputError(f"says that it has {claimed} rows in {size} bytes; expected at most a row a byte")
    rows = [(g, r) for g, n in enumerate(lengths) for r in range(n)]
    return [
        Record(f"{path}#{i}", i, path, size, "parquet", at, column=name, written=written) for i, at in enumerate(rows)
    ]


def _length(parquet: Any, group: int) -> int:
    length: int = parquet.metadata.row_group(group).num_rows
    return length


def _rows_at_once(parquet: Any, group: int, column: str) -> int:
    """How many rows of one column fit in PIECE, decoded; a struct's fields are columns of the file."""
    about = parquet.metadata.row_group(group)
    parts = [about.column(i) for i in range(about.num_columns)]
    parts = [part for part in parts if f"{part.path_in_schema}.".startswith(f"{column}.")]
    size: int = sum(part.total_uncompressed_size for part in parts)
    rows = max(1, min(ROWS, PIECE // max(1, size // max(1, int(about.num_rows)))))
    if not any(part.has_dictionary_page for part in parts):
        return rows
    # A dictionary's value counts once and may be every row's, and nobody knows how large it is: at most all there is.
    if size <= PIECE:
        return max(1, min(rows, PIECE // max(1, size)))
    # By default every file begins with a dictionary, and row by row takes twice as long: only where almost nothing on
    # disk becomes very much, as photographs never do.
    packed: int = sum(part.total_compressed_size for part in parts)
    return min(rows, 1 if packed < size // 10 else 8)


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
    error = InputError if found else _NoImages
    raise error(f"which column holds images is not clear from {names}; name it with --column")


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
        rows = _rows_at_once(parquet, group, column)
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
