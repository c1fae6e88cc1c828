"""What reading an image may take: 32 bytes for each pixel that its header names, 6 for each byte of its file, 16 MiB.

So 6.9 GiB for the largest that is read at all. Measured as the resident peak of a process for each image; `python -m
tests.test_image_memory FOLDER` does that, without torch, whose own memory would hide it.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fused_vit.errors import InputError
from fused_vit.images import FORMATS, read_image
from tests.test_images import encoded, exif

PIL = pytest.importorskip("PIL")
Image = pytest.importorskip("PIL.Image")
PER_PIXEL, PER_BYTE, BASE = 32, 6, 16 << 20
SIDE = 2048
ROOT = Path(__file__).parent.parent


def checkered(channels: int, dtype: type = np.uint8) -> np.ndarray:
    """Squares of 16 pixels in random colours: what compresses well, and still is no single run."""
    squares = np.random.default_rng(0).integers(0, 256, (SIDE // 16, SIDE // 16, channels)).astype(dtype)
    return np.kron(squares, np.ones((16, 16, 1), dtype)).squeeze()


def legal(kind: str, mode: str = "RGB", **options: object) -> Callable[[], bytes]:
    """SIDE x SIDE pixels that lie on their side, where the format can say so."""
    turned = {"exif": exif(6)} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    return lambda: encoded(Image.fromarray(checkered(4)).convert(mode), kind, **turned, **options)


def deep(kind: str, dtype: type) -> Callable[[], bytes]:
    return lambda: encoded(Image.fromarray(checkered(1, dtype)), kind, exif=exif(6))


LEGAL: dict[str, tuple[int, Callable[[], bytes]]] = {  # bytes for a pixel, and how it is made
    "JPEG": (10, legal("JPEG")),
    "JPEG, progressive": (12, legal("JPEG", progressive=True, subsampling=0)),
    "JPEG, progressive, CMYK": (14, legal("JPEG", "CMYK", progressive=True, subsampling=0)),
    "PNG": (18, legal("PNG", "RGBA", compress_level=1)),
    "PNG, palette with a hole": (15, legal("PNG", "P", transparency=0, compress_level=1)),
    "PNG, 16 bits": (14, deep("PNG", np.uint16)),
    "PNG, 1 bit": (7, legal("PNG", "1")),
    "WEBP": (19, legal("WEBP", quality=50)),
    "WEBP, lossless": (PER_PIXEL, legal("WEBP", "RGBA", lossless=True, method=0)),
    "GIF": (15, legal("GIF", "P", transparency=0)),
    "BMP": (10, legal("BMP")),
    "TIFF": (18, legal("TIFF", "RGBA")),
    "TIFF, deflate": (18, legal("TIFF", "RGBA", compression="tiff_deflate")),
    "TIFF, 32 bits": (14, deep("TIFF", np.int32)),
    "PPM": (10, legal("PPM")),
}


def tiff(side: int, tile: int | None = None, strip: int | None = None) -> bytes:
    """8 x 8 pixels, all black, in one tile of that side or in one strip that says it has so many rows."""
    data = zlib.compress(bytes(3 * (tile or side) ** 2), 9)
    where = [(273, 0), (278, strip), (279, len(data))] if strip else [(322, tile), (323, tile), (324, 0)]
    where += [] if strip else [(325, len(data))]
    tags = [(256, side), (257, side), (258, 0), (259, 8), (262, 2), *where, (277, 3)]
    depths = 8 + 2 + 12 * len(tags) + 4
    places = {258: depths, 273: depths + 6, 324: depths + 6}
    entries = [struct.pack("<HHII", tag, 4, 1, places.get(tag, value or 0)) for tag, value in sorted(tags)]
    entries[2] = struct.pack("<HHII", 258, 3, 3, depths)
    return (
        b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4) + struct.pack("<3H", 8, 8, 8) + data
    )


def directory(count: int, size: int) -> bytes:
    """EXIF of that many tags, each of `size` bytes, which all are the same bytes."""
    first = 8 + 2 + 12 * count + 4
    entries = b"".join(struct.pack("<HHII", 1000 + i, 7, size, first) for i in range(count))
    return b"II*\0" + struct.pack("<IH", 8, count) + entries + bytes(4) + bytes(size)


def jpeg_with(data: bytes) -> bytes:
    """In as many segments as it takes, and without the density in whose absence EXIF is read before all else."""
    plain = encoded(Image.new("RGB", (8, 8)), "JPEG")
    pieces = [b"Exif\0\0" + data[i : i + 65000] for i in range(0, len(data), 65000)]
    return plain[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", len(p) + 2) + p for p in pieces) + plain[20:]


def png_with(kind: bytes, data: bytes, times: int = 1) -> bytes:
    plain = encoded(Image.new("RGB", (8, 8)), "PNG")
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return plain[:33] + times * chunk + plain[33:]


CRAFTED: dict[str, Callable[[], bytes]] = {
    "a TIFF of one large tile": lambda: tiff(8, tile=4096),
    "a TIFF of one tile that is too large": lambda: tiff(8, tile=14000),
    "a TIFF of a strip of a billion rows": lambda: tiff(8, strip=10**9),
    "a JPEG's tags, all the same bytes": lambda: jpeg_with(directory(2000, 500_000)),
    "a JPEG of one tag": lambda: jpeg_with(directory(1, 8 << 20)),
    "a PNG's tags, all the same bytes": lambda: png_with(b"eXIf", directory(2000, 500_000)),
    "a PNG of comments": lambda: png_with(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 20), 9), 500),
    "a PNG's bomb of a profile": lambda: png_with(b"iCCP", b"icc\0\0" + zlib.compress(bytes(1 << 27), 9)),
    "a WebP's tags, all the same bytes": lambda: encoded(
        Image.new("RGB", (8, 8)), "WEBP", exif=b"Exif\0\0" + directory(2000, 500_000)
    ),
}
NEEDS_13 = ("tags, all the same bytes",)  # older pillows read them without a limit: the extra asks for 13


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    folder = tmp_path_factory.mktemp("images")
    for name, make in {**{name: make for name, (_, make) in LEGAL.items()}, **CRAFTED}.items():
        (folder / name).write_bytes(make())
    command = [sys.executable, "-W", "ignore", "-m", "tests.test_image_memory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", LEGAL)
def test_reading_takes_what_the_header_says(name: str, measured: dict[str, dict[str, int]]) -> None:
    """In every format. Fails where a step keeps one more copy, or widens pixels on their way to eight bits."""
    row, most = measured[name], LEGAL[name][0]
    assert row["read"] and row["peak"] <= most * SIDE**2 + 2 * row["bytes"], (row["peak"] / SIDE**2, row)


@pytest.mark.parametrize("name", CRAFTED)
def test_what_is_crafted_to_take_more_does_not(name: str, measured: dict[str, dict[str, int]]) -> None:
    """8 x 8 pixels, read or refused. A tile counts as the pixels that are decoded of it."""
    if any(name.endswith(what) for what in NEEDS_13) and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("pillow before 13 bounds no tags")
    row, decoded = measured[name], 4096**2 if name == "a TIFF of one large tile" else 64
    assert row["read"] == ("bomb" not in name and "comments" not in name and "too large" not in name), row
    assert row["peak"] <= PER_PIXEL * decoded + PER_BYTE * row["bytes"] + BASE, row


def test_every_format_is_measured() -> None:
    assert {name.split(",")[0] for name in LEGAL} == set(FORMATS)


def peak(path: Path) -> tuple[int, bool]:
    """Bytes by which reading it raises the resident peak of a fork of this process, and whether it was read."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            before, read = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, True
            try:
                read_image(path)
            except InputError:
                read = False
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            os.write(writing, f"{1024 * grown} {int(read)}".encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading) as pipe:
        found = pipe.read().split()
    assert os.waitpid(child, 0)[1] == 0, path.name
    return int(found[0]), found[1] == "1"


if __name__ == "__main__":
    for path in sorted(Path(sys.argv[1]).iterdir()):
        most, was_read = peak(path)
        print(json.dumps({"name": path.name, "bytes": path.stat().st_size, "peak": most, "read": was_read}))
