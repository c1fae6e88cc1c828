"""A hostile archive costs only itself: listing ends soon, in little memory, and lists whatever lies beside it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.archives import data, photographs

pytest.importorskip("PIL.Image")
ROOT = Path(__file__).parents[1]
LISTER = """
import json, os, resource, signal, sys
from fused_vit.sources import find
try:
    import pyarrow.parquet
except ImportError:
    pass
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for line in sys.stdin:
    if not (child := os.fork()):
        signal.alarm(20)
        before = peak()
        resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))  # so that a failure costs nobody else
        found = find([json.loads(line)])
        unread = [(u.key, u.reason) for u in found.unread]
        grown = (peak() - before) // 1024
        print(json.dumps([[(r.key, r.size) for r in found.records], unread, grown]), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print("null", flush=True)
"""
GOOD, AFTER = data(0), data(1)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, size_field: bytes = b"") -> bytes:
    """A tar's header block; sizes that octal digits have no room for are in base 256."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    fits = 0 <= size < 8**11
    block[124:136] = size_field or (b"%011o\0" % size if fits else base256(size))
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def base256(size: int) -> bytes:
    return b"\xff" + size.to_bytes(11, "big", signed=True) if size < 0 else b"\x80" + size.to_bytes(11, "big")


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def member(name: str, content: bytes) -> bytes:
    return header(name, len(content)) + padded(content)


def pax(*fields: tuple[str, str], kind: bytes = tarfile.XHDTYPE) -> bytes:
    content = b""
    for key, value in fields:
        rest = len(f" {key}={value}\n".encode())
        length = next(n for n in range(rest, rest + 9) if n == rest + len(str(n)))
        content += f"{length} {key}={value}\n".encode()
    return raw_pax(content, kind)


def raw_pax(content: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return header("pax", len(content), kind) + padded(content)


def sparse_of_old(last: bytes) -> bytes:
    """The old form of GNU's, whose list of pieces says that it goes on."""
    block = bytearray(header("sparse.png", 512, tarfile.GNUTYPE_SPARSE))
    block[482], block[483:495] = 1, last
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


SPARSE = (("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"))
TARS = {  # what comes after a good photograph and before another that is listed only where the tar can be read on
    "header that is none": b"junk" * 128,
    "size of -512": header("a.png", -512),
    "size of -1024": header("a.png", -1024),
    "size of -1, which leads nowhere": header("a.png", -1),
    "size that is as negative as can be": header("a.png", -(1 << 87)),
    "PAX size of -1000": pax(("size", "-1000")) + header("a.png", 0),
    "PAX size that leads back, hidden": pax(("GNU.sparse.realsize", "5")) + pax(("size", "-2560")) + header("a.png", 0),
    "PAX size that leads before the beginning, hidden": pax(("GNU.sparse.realsize", "5"))
    + pax(("size", "-99999"))
    + header("a.png", 0),
    "global PAX size of -1000": pax(("size", "-1000"), kind=tarfile.XGLTYPE) + header("a.png", 0),
    "3000 x headers": pax(("comment", "a")) * 3000 + header("a.png", 0),
    "3000 g headers": pax(("comment", "a"), kind=tarfile.XGLTYPE) * 3000 + header("a.png", 0),
    "3000 L headers": (header("long", 2, tarfile.GNUTYPE_LONGNAME) + padded(b"a\0")) * 3000 + header("a.png", 0),
    "x header of 2^70": header("x", 1 << 70, tarfile.XHDTYPE),
    "L header of 4 GB": header("x", 1 << 32, tarfile.GNUTYPE_LONGNAME),
    "K header of -512": header("x", -512, tarfile.GNUTYPE_LONGLINK),
    "x header of 2 MiB": pax(*((f"k{n}", "v" * 2000) for n in range(1000))) + header("a.png", 0),
    "L header of 2 MiB": header("long", 2 << 20, tarfile.GNUTYPE_LONGNAME) + bytes(2 << 20) + header("a.png", 0),
    "member of 2^70": header("a.txt", 1 << 70),
    "sparse map of letters": pax(("GNU.sparse.map", "x,y")) + header("a.png", 0),
    "sparse size of letters": pax(("GNU.sparse.size", "zz")) + header("a.png", 0),
    "sparse 1.0 over junk": pax(*SPARSE) + member("a.png", b"\xff\n" * 2000),
    "sparse of old that has a negative size": sparse_of_old(base256(-512)) + bytes(512),
    "PAX fields that lie on another": raw_pax(b"2 " * 900 + b"x" * 1_000_000 + b"=\n") + header("a.png", 0),
    "PAX field of digits": pax(("comment", "1" * 1_000_000)) + header("a.png", 0),
    "PAX header of 100000 fields": pax(*((f"{n:06}", "") for n in range(80_000))) + header("a.png", 0),
    "global PAX headers of 20000 fields": b"".join(
        pax(*((f"{n + at:06}", "") for n in range(900)), kind=tarfile.XGLTYPE) for at in range(0, 20_000, 900)
    )
    + header("a.png", 0),
}


REASONS = {  # of those that tarfile may stumble over anyway, later
    "header that is none": "the tar's header at byte ",
    "size of -512": "the tar has a member of -512 bytes",
    "size of -1, which leads nowhere": "the tar has a member of -1 bytes",
    "K header of -512": "the tar has a member of -512 bytes",
    "L header of 4 GB": "the tar has a header of 4294967296 bytes",
}


def bad_tar(folder: Path, between: bytes) -> Path:
    path = folder / "hostile.tar"
    path.write_bytes(member("first.png", GOOD) + between + member("last.png", AFTER) + bytes(1024))
    return path


Found = tuple[list[tuple[str, int]], list[tuple[str, str]], int]
Listed = Callable[[Path], Found]


@pytest.fixture(scope="module")
def listed() -> Iterator[Listed]:
    """A folder's records, what is unread, and by how many MiB memory grew; in a process that ends after 20 seconds."""
    command = [sys.executable, "-c", LISTER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as lister:

        def listed(folder: Path) -> Found:
            print(json.dumps(str(folder)), file=lister.stdin, flush=True)
            found = json.loads(lister.stdout.readline())
            assert found is not None, "listing raised or did not end"
            return [(key.removeprefix(f"{folder}/"), size) for key, size in found[0]], *found[1:]

        yield listed


@pytest.mark.parametrize("case", TARS)
def test_a_hostile_tar_costs_only_what_comes_after(case: str, listed: Listed, tmp_path: Path) -> None:
    photographs(tmp_path, [0])
    path = bad_tar(tmp_path, TARS[case])
    records, unread, grown = listed(tmp_path)
    assert [key for key, _ in records[:2]] == ["000.png", "hostile.tar/first.png"]
    assert [key for key, _ in unread] == [str(path)] and unread[0][1].isprintable()
    assert unread[0][1].startswith(REASONS.get(case, ""))
    assert all(size >= 0 for _, size in records) and grown < 100


@pytest.mark.parametrize(
    "first",
    [header("a.png", -512), pax(("size", "-1000")) + header("a.png", 0)],
    ids=["size of -512", "PAX size of -1000"],
)
def test_a_tar_that_is_hostile_at_once_is_unread(first: bytes, listed: Listed, tmp_path: Path) -> None:
    photographs(tmp_path, [0])
    (tmp_path / "hostile.tar").write_bytes(first + bytes(1024))
    records, unread, _ = listed(tmp_path)
    assert [key for key, _ in records] == ["000.png"] and len(unread) == 1


def test_tars_with_honest_headers_of_every_form_are_read_whole(listed: Listed, tmp_path: Path) -> None:
    """Long names, PAX fields of this file and of all, sizes in base 256, and text that is not ASCII."""
    photographs(tmp_path, [0])
    names = ["b" * 300 + ".png", "写真" * 60 + ".png", "short.png"]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        fields = {"comment": "all" * 100, "SCHILY.xattr.user.a": "1" * 900} if form == tarfile.PAX_FORMAT else {}
        with tarfile.open(tmp_path / f"{form}.tar", "w", format=form, pax_headers=fields) as tar:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size, info.mtime = len(GOOD), 1.5
                info.pax_headers = {"comment": "this = one\n" * 50_000} if fields else {}
                tar.addfile(info, io.BytesIO(GOOD))
    large = header("base256.png", 0, size_field=base256(len(GOOD))) + padded(GOOD)
    (tmp_path / "z.tar").write_bytes(large + bytes(1024))
    records, unread, _ = listed(tmp_path)
    assert not unread and records[1:] == [
        *(
            (f"{form}.tar/{name}", len(GOOD))
            for form in sorted([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
            for name in names
        ),
        ("z.tar/base256.png", len(GOOD)),
    ]


def test_a_tar_of_many_members_takes_no_memory_but_its_records(listed: Listed, tmp_path: Path) -> None:
    """Whose headers may be as large as their maker likes: here 50 MB of text that means nothing."""
    photographs(tmp_path, [0])
    fields = pax(("comment", "a" * 1_000_000))
    (tmp_path / "a.tar").write_bytes(b"".join(fields + member(f"{n}.txt", b"a") for n in range(50)) + bytes(1024))
    records, unread, grown = listed(tmp_path)
    assert len(records) == 1 and not unread and grown < 25


def varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def parquet(rows: int) -> bytes:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [b"x"] * rows}), buffer, store_schema=False)
    return buffer.getvalue()


def claiming(claimed: int) -> bytes:
    """A file of 777 rows whose footer says another number wherever it said that one: rows are zigzag varints there."""
    whole = parquet(777)
    length = int.from_bytes(whole[-8:-4], "little")
    footer = whole[-8 - length : -8].replace(b"\x16" + varint(777 * 2), b"\x16" + varint(claimed * 2))
    return whole[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def flipped() -> bytes:
    """The name of a column is not UTF-8."""
    head, _, tail = parquet(3).partition(b"image")
    return head + b"im\xffge" + tail


PARQUETS: dict[str, tuple[Callable[[], bytes], str]] = {
    "20 million rows": (lambda: claiming(20_000_000), "says that it has 20000000 rows in "),
    "2^62 rows": (lambda: claiming(1 << 62), "says that it has 4611686018427387904 rows in "),
    "a flipped byte of its footer": (flipped, "UnicodeDecodeError: 'utf-8' codec can't decode"),
    "an empty file": (lambda: b"", "not a Parquet file that can be read"),
    "a footer that is longer than the file": (
        lambda: parquet(3)[:-8] + (1 << 30).to_bytes(4, "little") + b"PAR1",
        "not a Parquet file that can be read",
    ),
}


@pytest.mark.parametrize("case", PARQUETS)
def test_a_hostile_parquet_file_costs_only_itself(case: str, listed: Listed, tmp_path: Path) -> None:
    photographs(tmp_path, [0])
    make, reason = PARQUETS[case]
    (tmp_path / "hostile.parquet").write_bytes(make())
    records, unread, grown = listed(tmp_path)
    assert [key for key, _ in records] == ["000.png"] and grown < 100
    assert len(unread) == 1 and unread[0][0] == f"{tmp_path}/hostile.parquet" and unread[0][1].startswith(reason)
