"""Images: photographs through a checkpoint's Hugging Face processor, in its PIL form, which needs no torchvision."""

from __future__ import annotations

import io
import logging
import os
import stat
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Lock
from typing import Any

from .errors import CheckpointError, InputError
from .spec import TowerSpec

logger = logging.getLogger("fused_vit")
# Qwen3-VL's published preprocessor_config.json
MEAN = STD = [0.5, 0.5, 0.5]
PIXELS = {"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096}

# What a checkpoint may set a processor to: pixels along a side, pixels in all, and counts. Published ones ask for at
# most 1536, 4096 * 4096 and a dozen tiles.
SIDE, AREA = 1 << 13, 1 << 26
SIZES = ("size", "crop_size", "pad_size", "size_divisor")
LIMITS = {"patch_size": 256, "temporal_patch_size": 16, "merge_size": 16, "min_patches": 256, "max_patches": 256}
CAUSE = 200  # characters of an error's cause that are repeated

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no decoder beyond these meets a file
MULTI_PICTURE = "MPO"  # pillow's name for a JPEG with more pictures behind it, as some cameras write
MAX_PIXELS, MAX_BYTES = 178_956_970, 1 << 28  # of one photograph: half a gigabyte in RGB; and of its file
# One thread at a time decodes a PIL image, since two would find it broken. It is found by its address, so that few wait
# for another image's.
TURNS = [Lock() for _ in range(61)]
# Which warnings are shown is the whole process's: of two threads that change it at a time, the one that leaves last
# would put back what the other had set, for good.
FILTERS = Lock()


def processor(spec: TowerSpec, source: str | Path, *, revision: str | None = None) -> Any:
    """The image processor that `source` names in its preprocessor_config.json, or Qwen3-VL's where it has none.

    Raises CheckpointError: a file that is not read for the reasons that config.json is not, that names no image
    processor of transformers, asks for more than SIDE, AREA or LIMITS, or was made for another tower.
    """
    from .source import read_processor  # brings torch, which processes that only read images do without

    p, merge = spec.patch, spec.merge
    described = read_processor(source, revision=revision)
    if described is None:
        return _processor_class("Qwen2VLImageProcessor")(
            patch_size=p.size, temporal_patch_size=p.temporal, merge_size=merge,
            image_mean=MEAN, image_std=STD, size=dict(PIXELS),
        )  # fmt: skip
    path, fields = described
    try:
        kind = _processor_class(fields.get("image_processor_type", "Qwen2VLImageProcessor"))
        check_names(kind, fields)
        check_numbers(fields, p.channels, areas=hasattr(sys.modules[kind.__module__], "smart_resize"))
        found = kind.from_dict(fields)
    except ImportError:  # of pillow or torchvision, with the remedy
        raise
    except Exception as error:  # whatever transformers meets in what anybody may have written
        raise CheckpointError(
            f"{path}: no image processor that can be used ({str(error)[:CAUSE]}). Take it from the tower's release."
        ) from error
    expected = {"patch_size": p.size, "temporal_patch_size": p.temporal}
    if merge > 1:  # else what the projector behind the tower merges is not the tower's concern
        expected["merge_size"] = merge
    got = {name: getattr(found, name, value) for name, value in expected.items()}
    if got != expected:
        raise CheckpointError(f"{path}: has {got}; config.json says {expected}: take both from one release")
    return found


def _processor_class(name: object) -> Any:
    """transformers 5 calls the PIL form ...Pil; in 4.57 it is the plain name, and ...Fast the other."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"images need transformers and pillow: pip install 'fused-vit[hf]' ({error})") from error
    plain = name.removesuffix("Fast").removesuffix("Pil") if isinstance(name, str) else ""
    if not plain.endswith("ImageProcessor"):  # transformers has functions, modules and configs by name too
        raise ValueError(f"image_processor_type is {name!r}; expected the name of an image processor")
    found = getattr(transformers, f"{plain}Pil", None) or getattr(transformers, plain, None)
    if not isinstance(found, type) or not hasattr(found, "from_dict"):
        raise ValueError(f"transformers {transformers.__version__} has no {plain}")
    if not found.__module__.startswith("transformers.models."):
        raise ValueError(f"image_processor_type is {name}, which others derive from; expected a model's own")
    return found


def check_names(kind: Any, fields: dict[str, Any]) -> None:
    """No field takes a method's place. Raises ValueError."""
    for name in fields:
        if callable(getattr(kind, name, None)):
            raise ValueError(f"{name} is a method of {kind.__name__}; expected settings")


def check_numbers(fields: dict[str, Any], channels: int, *, areas: bool) -> None:
    """No number of a processor asks for endless memory or time. Raises ValueError.

    areas: it resizes to an area between size's edges, so called; the others to sides.
    """
    for path, number in _numbers(fields):
        largest = min((LIMITS[name] for name in path if name in LIMITS), default=AREA)
        if path[0] in SIZES and not (areas and path[-1] in PIXELS):
            largest = SIDE
        if not -largest <= number <= largest:  # nor is NaN
            raise ValueError(f"{'.'.join(path)} is {number}; expected at most {largest}")
    side = max((number for path, number in _numbers(fields) if path[0] in SIZES and path[-1] not in PIXELS), default=0)
    tiles = max((number for path, number in _numbers(fields) if path[-1] == "max_patches"), default=1)
    if tiles * side**2 > AREA:
        raise ValueError(f"{tiles} tiles of {side} x {side} pixels; expected at most {AREA} pixels")
    for name in ("image_mean", "image_std"):
        given = fields.get(name)
        values = given if isinstance(given, list) else [given] * channels
        numbers = all(isinstance(value, (int, float)) for value in values)
        if given is not None and (not numbers or len(values) != channels or (name == "image_std" and 0 in values)):
            raise ValueError(f"{name} is {given!r}; expected {channels} numbers, of image_std none 0")


def _numbers(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int | float]]:
    """Every number in a JSON value, with the keys that lead to it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, (*path, key))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, path)
    elif isinstance(value, (int, float)):
        yield path, value


def read_image(path: str | Path) -> Any:
    """A PIL image in RGB, upright; of an animation the first frame, transparent pixels over white.

    Nothing is decoded before its size, as the header has it, was found to be at most MAX_PIXELS: reading takes at most
    32 bytes for each of them, and 6 for each byte of the file. Raises InputError naming the file.
    """
    check_file(path)
    return _decode(path, str(path))


def decode_image(data: bytes, name: str) -> Any:
    """`read_image` of a file's content that is in memory already; errors call it `name`."""
    check_size(len(data), name)
    return _decode(io.BytesIO(data), name)


def convert_image(image: Any, name: str) -> Any:
    """`read_image` of a PIL image, which may be a file that is not decoded yet, and stays as it is otherwise."""
    if image.format not in (None, *FORMATS, MULTI_PICTURE):
        kinds = ", ".join(FORMATS)
        raise InputError(
            f"{name}: its format is {image.format}; expected one of {kinds}; if you trust its decoder, pass "
            "image.convert('RGB')"
        )
    with TURNS[id(image) % len(TURNS)]:
        return _decode(image, name)


def _decode(source: Any, name: str) -> Any:
    """source: a path, a file, or a PIL image, which is its caller's: it is not closed, nor turned in its place."""
    from PIL import Image

    given = isinstance(source, Image.Image)
    try:
        with nullcontext(source) if given else _opened(source) as image:
            width, height = _decoded_size(image)
            if width * height <= MAX_PIXELS:
                # as it loads, pillow warns of a large TIFF once more; others are decoded side by side
                large = width * height > (Image.MAX_IMAGE_PIXELS or MAX_PIXELS)
                with _unwarned() if large else nullcontext():
                    return _rgb(image, in_place=not given)
        too_large = f"{width} x {height} pixels"
    except Image.DecompressionBombError:
        too_large = "too many pixels"
    except MemoryError:
        raise
    except Exception as error:  # decoders meet hostile bytes with whatever they stumble over
        logger.info("%s cannot be decoded", name, exc_info=error)  # what a decoder says may hold addresses
        kinds = ", ".join(FORMATS)
        raise InputError(f"{name}: not an image that can be read; supported: {kinds}, complete files") from error
    raise InputError(f"{name}: {too_large}; expected at most {MAX_PIXELS}")


def _opened(source: Any) -> Any:
    """Not decoded yet, so that no thread waits for another's pixels."""
    from PIL import Image

    with _unwarned():
        return Image.open(source, formats=FORMATS)


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without pillow's warnings of large images, since the limit is ours. One thread at a time."""
    from PIL import Image

    with FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _decoded_size(image: Any) -> tuple[int, int]:
    """Width and height of what the decoder makes: the tiles of a TIFF may reach far beyond its pixels."""
    tags = getattr(image, "tag_v2", {})
    wide, high = (
        -(-side // tile) * tile for side, tile in zip(image.size, (tags.get(322, 1), tags.get(323, 1)), strict=True)
    )
    return wide, high


def check_file(path: str | Path) -> os.stat_result:
    """What the system says of a file of at most MAX_BYTES. Raises InputError naming it."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or 'cannot be opened').lower()}") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: not a regular file")
    check_size(status.st_size, path)
    return status


def check_size(size: int, name: str | Path) -> None:
    """Of a file, before it is read. Raises InputError naming it."""
    if size > MAX_BYTES:
        raise InputError(f"{name}: {size} bytes; expected at most {MAX_BYTES}")


def _rgb(image: Any, in_place: bool) -> Any:
    """Decoded and upright, in eight bits: of deeper grey the upper eight, where pillow would clip it.

    in_place: turn the image itself, which takes a copy less.
    """
    import numpy as np
    from PIL import Image, ImageOps

    image.load()
    if in_place:
        ImageOps.exif_transpose(image, in_place=True)
    else:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("pixels in floating point have no range that everybody agrees on")
    if image.mode.startswith("I"):
        deep = np.asarray(image).clip(0, 65535)
        return Image.fromarray(np.right_shift(deep, 8, out=deep).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
