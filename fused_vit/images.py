"""Images: photographs through a checkpoint's Hugging Face processor, in its PIL form, which needs no torchvision."""

from __future__ import annotations

import io
import logging
import os
import stat
import warnings
from contextlib import nullcontext
from pathlib import Path
from threading import Lock
from typing import Any

from .errors import CheckpointError, InputError
from .spec import TowerSpec

logger = logging.getLogger("fused_vit")
# Qwen3-VL's published preprocessor_config.json
MEAN = STD = [0.5, 0.5, 0.5]
PIXELS = {"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096}

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no decoder beyond these meets a file
MULTI_PICTURE = "MPO"  # pillow's name for a JPEG with more pictures behind it, as some cameras write
MAX_PIXELS, MAX_BYTES = 178_956_970, 1 << 28  # of one photograph: half a gigabyte in RGB; and of its file
# One thread at a time decodes a PIL image, since two would find it broken. It is found by its address, so that few wait
# for another image's.
TURNS = [Lock() for _ in range(61)]


def processor(spec: TowerSpec, source: str | Path, *, revision: str | None = None) -> Any:
    """The image processor that `source` names in its preprocessor_config.json, or Qwen3-VL's where it has none."""
    place = Path(source).expanduser()
    place = place.parent if place.is_file() else place
    p, merge = spec.patch, spec.merge
    if place.is_dir() and not (place / "preprocessor_config.json").is_file():
        return _processor_class("Qwen2VLImageProcessor")(
            patch_size=p.size, temporal_patch_size=p.temporal, merge_size=merge,
            image_mean=MEAN, image_std=STD, size=dict(PIXELS),
        )  # fmt: skip
    try:
        from transformers.image_processing_base import ImageProcessingMixin

        home = place if place.is_dir() else str(source)
        fields, _ = ImageProcessingMixin.get_image_processor_dict(home, revision=revision)
        found = _processor_class(fields.get("image_processor_type", "Qwen2VLImageProcessor")).from_dict(fields)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: its preprocessor_config.json cannot be read ({error})") from error
    expected = {"patch_size": p.size, "temporal_patch_size": p.temporal}
    if merge > 1:  # else what the projector behind the tower merges is not the tower's concern
        expected["merge_size"] = merge
    got = {name: getattr(found, name, value) for name, value in expected.items()}
    if got != expected:
        raise CheckpointError(
            f"{source}: preprocessor_config.json has {got}; config.json says {expected}: take both from one release"
        )
    return found


def _processor_class(name: str) -> Any:
    """transformers 5 calls the PIL form ...Pil; in 4.57 it is the plain name, and ...Fast the other."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"images need transformers and pillow: pip install 'fused-vit[hf]' ({error})") from error
    plain = name.removesuffix("Fast").removesuffix("Pil")
    found = getattr(transformers, f"{plain}Pil", None) or getattr(transformers, plain, None)
    if found is None:
        raise ValueError(f"transformers {transformers.__version__} has no {plain}")
    return found


def read_image(path: str | Path) -> Any:
    """A PIL image in RGB, upright; of an animation the first frame, transparent pixels over white.

    Nothing is decoded before its size, as the header has it, was found to be at most MAX_PIXELS: reading takes at most
    32 bytes for each of them, and 6 for each byte of the file. Raises InputError naming the file.
    """
    check_file(path)
    return _decode(path, str(path))


def decode_image(data: bytes, name: str) -> Any:
    """`read_image` of a file's content that is in memory already; errors call it `name`."""
    if len(data) > MAX_BYTES:
        raise InputError(f"{name}: {len(data)} bytes; expected at most {MAX_BYTES}")
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours, below
            with nullcontext(source) if given else Image.open(source, formats=FORMATS) as image:
                width, height = _decoded_size(image)
                if width * height <= MAX_PIXELS:
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
    if status.st_size > MAX_BYTES:
        raise InputError(f"{path}: {status.st_size} bytes; expected at most {MAX_BYTES}")
    return status


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
