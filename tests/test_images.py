"""Images that people and attackers send: what decodes decodes right, the rest is one clear error, cheaply."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import numpy as np
import pytest

from fused_vit import images
from fused_vit.errors import InputError
from fused_vit.images import read_image

Image = pytest.importorskip("PIL.Image")
ORIENTATION = 0x0112


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width: int = 40, height: int = 24) -> Image.Image:
    """Left half red, right half blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels)


def png(width: int, height: int, extra: bytes = b"") -> bytes:
    """A PNG of one bit a pixel, all black, whose compressed rows take next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(height * (1 + -(-width // 8))), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bomb_in_text() -> bytes:
    data = b"Comment\0\0" + zlib.compress(bytes(1 << 28), 9)
    return png(8, 8, struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data)))


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[ORIENTATION] = orientation
    return found


def at(image: Image.Image, x: float, y: float) -> tuple[int, ...]:
    """The colour at a place in 0..1, rounded to what JPEG keeps of it."""
    return tuple(round(c / 255) for c in image.getpixel((int(x * (image.width - 1)), int(y * (image.height - 1)))))


RED, BLUE, WHITE = (1, 0, 0), (0, 0, 1), (1, 1, 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_every_format_on_the_list_decodes(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.bin"  # the suffix says nothing
    path.write_bytes(encoded(photo(), kind))
    found = read_image(path)
    assert (found.mode, found.size) == ("RGB", (40, 24)) and at(found, 0, 0) == RED and at(found, 1, 1) == BLUE


@pytest.mark.parametrize(
    ("orientation", "size", "first", "last"),
    [(1, (40, 24), RED, BLUE), (3, (40, 24), BLUE, RED), (6, (24, 40), RED, BLUE), (8, (24, 40), BLUE, RED)],
)
def test_photographs_are_turned_upright(
    orientation: int, size: tuple[int, int], first: tuple[int, ...], last: tuple[int, ...], tmp_path: Path
) -> None:
    path = tmp_path / "turned.jpg"
    path.write_bytes(encoded(photo(), "JPEG", quality=95, exif=exif(orientation)))
    found = read_image(path)
    assert found.size == size and at(found, 0, 0) == first and at(found, 1, 1) == last


def palette_with_a_hole() -> bytes:
    image = photo().convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    return encoded(image, "PNG", transparency=image.getpixel((0, 0)))


def half_transparent() -> bytes:
    image = photo().convert("RGBA")
    image.putalpha(Image.fromarray(np.repeat(np.array([[0] * 20 + [255] * 20], np.uint8), 24, 0)))
    return encoded(image, "PNG")


def sixteen_bits(kind: str) -> bytes:
    ramp = np.repeat(np.linspace(0, 65535, 40).astype(np.uint16)[None], 24, 0)
    return encoded(Image.fromarray(ramp), kind)


def animated() -> bytes:
    frames = [photo(), Image.new("RGB", (40, 24), "white")]
    return encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)


BLACK = (0, 0, 0)
MODES: dict[str, tuple[Callable[[], bytes], tuple[int, ...], tuple[int, ...]]] = {
    "palette": (palette_with_a_hole, WHITE, BLUE),
    "alpha": (half_transparent, WHITE, BLUE),
    "animated": (animated, RED, BLUE),
    "16 bits PNG": (lambda: sixteen_bits("PNG"), BLACK, WHITE),
    "16 bits TIFF": (lambda: sixteen_bits("TIFF"), BLACK, WHITE),
    "CMYK": (lambda: encoded(photo().convert("CMYK"), "JPEG", quality=95), RED, BLUE),
    "1 bit": (lambda: encoded(Image.new("1", (40, 24), 1), "PNG"), WHITE, WHITE),
    "grey and alpha": (lambda: encoded(photo().convert("LA"), "PNG"), BLACK, BLACK),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_eight_bit_rgb(name: str, tmp_path: Path) -> None:
    data, left, right = MODES[name]
    path = tmp_path / "image"
    path.write_bytes(data())
    found = read_image(path)
    assert found.mode == "RGB" and at(found, 0, 0.5) == left and at(found, 1, 0.5) == right


def test_sixteen_bits_keep_their_steps(tmp_path: Path) -> None:
    """pillow's own conversion makes every value above 255 white."""
    path = tmp_path / "ramp.png"
    path.write_bytes(sixteen_bits("PNG"))
    row = np.asarray(read_image(path))[0, :, 0].astype(int)
    assert (np.diff(row) > 0).all() and row[0] == 0 and row[-1] == 255


# --- by a path, in bytes, and as a PIL image ---


def taken(source: Any) -> np.ndarray:
    from fused_vit.preparing import as_image  # here, since test_image_memory is without torch

    return np.asarray(as_image(source))


def taken_by_encode_images(path: Path) -> np.ndarray:
    from fused_vit.stills import _pixels

    return np.asarray(_pixels(Image.open(path), 0, on_device=False))


WAYS: dict[str, Callable[[Path], np.ndarray]] = {
    "path": taken,
    "bytes": lambda path: taken(path.read_bytes()),
    "opened": lambda path: taken(Image.open(path)),
    "decoded": lambda path: taken(Image.open(path).copy()),
    "encode_images": taken_by_encode_images,
}


def two_pictures() -> bytes:
    """As cameras write them: pillow says MPO, even where it is asked for JPEG alone."""
    return encoded(photo(), "MPO", save_all=True, append_images=[photo()], exif=exif(6))


KNOWN: dict[str, Callable[[], bytes]] = {
    **{name: data for name, (data, _, _) in MODES.items()},
    **{kind: lambda kind=kind: encoded(photo(), kind) for kind in images.FORMATS},
    **{
        f"{kind} turned by {n}": lambda kind=kind, n=n: encoded(photo(), kind, exif=exif(n))
        for kind in ("JPEG", "PNG", "WEBP", "TIFF")
        for n in (3, 6)
    },
    "transparent and turned": lambda: encoded(Image.open(io.BytesIO(half_transparent())), "PNG", exif=exif(6)),
    "32 bits": lambda: encoded(Image.fromarray(np.arange(960, dtype=np.int32).reshape(24, 40) * 68), "TIFF"),
    "two pictures": two_pictures,
}


@pytest.mark.parametrize("name", KNOWN)
def test_every_way_in_gives_the_same_pixels(name: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(KNOWN[name]())
    want = np.asarray(read_image(path))
    for way, by in WAYS.items():
        got = by(path)
        assert got.dtype == np.uint8 and np.array_equal(got, want), way


@pytest.mark.parametrize("name", KNOWN)
def test_a_callers_image_stays_as_it_is(name: str, tmp_path: Path) -> None:
    def about(image: Image.Image) -> tuple[Any, ...]:
        return image.mode, image.size, image.tobytes(), dict(image.info), dict(image.getexif()), image.format

    path = tmp_path / "image"
    path.write_bytes(KNOWN[name]())
    image = Image.open(path)
    before = about(image)
    first, second = taken(image), taken(image)
    assert about(image) == before and np.array_equal(first, second)
    image.seek(getattr(image, "n_frames", 1) - 1)  # of what has more pictures the file is still open
    image.load()


def test_a_pil_image_is_refused_as_its_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^a PIL image of mode F: not an image that can be read"):
        taken(Image.fromarray(np.ones((8, 8), np.float32)))
    with pytest.raises(InputError, match=r"^a PIL image of mode RGB: not an image that can be read"):
        taken(Image.open(io.BytesIO(encoded(photo(400, 300), "JPEG")[:2000])))
    icon = Image.open(io.BytesIO(encoded(photo(), "ICO")))
    with monkeypatch.context() as patched:
        patched.setattr(type(icon), "load", lambda self: pytest.fail("decoded"))
        with pytest.raises(InputError, match=r"its format is ICO; expected one of JPEG, .* image\.convert"):
            taken(icon)
    assert taken(icon.convert("RGB")).shape == (14, 24, 3)  # its largest picture


def test_threads_may_have_the_same_pil_image() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG", exif=exif(6))
    want = taken(data)
    with ThreadPoolExecutor(8) as threads:
        for _ in range(5):
            assert all(np.array_equal(got, want) for got in threads.map(taken, [Image.open(io.BytesIO(data))] * 8))


@pytest.mark.parametrize("place", [(Image, "open"), (images, "_rgb")], ids=["opening", "loading"])
def test_threads_leave_the_filters_of_warnings_as_they_were(
    place: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that would overlap, the first to come being the first to go; of images that pillow warns of twice."""
    data, real = encoded(photo(), "TIFF"), getattr(*place)
    began, second, first_left = Event(), Event(), Event()

    def slow(*args: Any, **options: Any) -> Any:
        if not began.is_set():
            began.set()
            second.wait(0.5)  # in vain, where only one thread at a time comes here
        else:
            second.set()
            first_left.wait(5)
        return real(*args, **options)

    def first() -> None:
        images.decode_image(data, "first")
        first_left.set()

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)  # of 960
    monkeypatch.setattr(*place, slow)
    with warnings.catch_warnings(), ThreadPoolExecutor(2) as threads:
        warnings.simplefilter("error")
        before = list(warnings.filters)
        one = threads.submit(first)
        assert began.wait(5)
        threads.submit(images.decode_image, data, "second").result()
        one.result()
        assert warnings.filters == before


def test_threads_decode_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    data, real, both = encoded(photo(), "PNG"), images._rgb, Barrier(2, timeout=5)

    def meeting(*args: Any, **options: Any) -> Any:
        both.wait()
        return real(*args, **options)

    monkeypatch.setattr(images, "_rgb", meeting)
    with ThreadPoolExecutor(2) as threads:
        assert [image.size for image in threads.map(lambda name: images.decode_image(data, name), "ab")] == [
            (40, 24)
        ] * 2


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "not an image"),
    "text": (lambda: b"no image at all", "not an image"),
    "half a JPEG": (lambda: encoded(photo(400, 300), "JPEG")[:2000], "not an image"),
    "half a PNG": (lambda: encoded(photo(400, 300), "PNG")[:-40], "not an image"),
    "half a WebP": (lambda: encoded(photo(400, 300), "WEBP", lossless=True)[:-20], "not an image"),
    "a header alone": (lambda: png(8, 8)[:33], "not an image"),
    "a wrong checksum": (lambda: png(8, 8).replace(b"IDAT", b"IDAU", 1), "not an image"),
    "20000 x 20000 of one bit": (lambda: png(20_000, 20_000), "pixels; expected at most"),
    "15000 x 12000 of one bit": (lambda: png(15_000, 12_000), "pixels; expected at most"),
    "a bomb in a comment": (bomb_in_text, "not an image"),
    "a format that is not on the list": (lambda: encoded(photo(), "ICO"), "not an image"),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not an image"),
    "a pickle": (lambda: b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07builtins", "not an image"),
    "floating point": (lambda: encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "not an image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_one_clear_error(name: str, tmp_path: Path) -> None:
    data, says = REFUSED[name]
    path = tmp_path / "image.png"
    path.write_bytes(data())
    with pytest.raises(InputError) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and says in message and "\n" not in message
    assert "object at 0x" not in message and "BytesIO" not in message  # decoders name their objects


def test_a_large_image_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(png(40, 24))
    monkeypatch.setattr(images, "MAX_PIXELS", 959)
    monkeypatch.setattr(images, "_rgb", lambda *_, **__: pytest.fail("decoded"))
    for way in WAYS.values():
        with pytest.raises(InputError, match="40 x 24 pixels; expected at most 959"):
            way(path)


def test_a_large_file_is_refused_before_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(png(8, 8))
    monkeypatch.setattr(images, "MAX_BYTES", 20)
    monkeypatch.setattr(Image, "open", lambda *args, **options: pytest.fail("opened"))
    with pytest.raises(InputError, match="bytes; expected at most 20"):
        read_image(path)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, says in (("pipe", "not a regular file"), (".", "not a regular file"), ("absent", "no such file")):
        with pytest.raises(InputError, match=says):
            read_image(tmp_path / name)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # pillow's, on tags that it skips
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_flipped_bytes_decode_or_are_refused(kind: str, tmp_path: Path, record_property: Any) -> None:
    """No other exception and no crash. FLIPS=10000 is the full length (make fuzz)."""
    flips = int(os.environ.get("FLIPS", "1000")) // 5
    whole, random = bytearray(encoded(photo(64, 48), kind)), np.random.default_rng(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(flips):
        data = bytearray(whole)
        for place in random.integers(0, len(data), random.integers(1, 6)):
            data[place] = random.integers(256)
        path = tmp_path / "flipped"
        path.write_bytes(data)
        try:
            assert read_image(path).mode == "RGB"
            outcomes["read"] += 1
        except InputError:
            outcomes["refused"] += 1
    assert sum(outcomes.values()) == flips and outcomes["refused"]
    for outcome, count in outcomes.items():
        record_property(outcome, count)
