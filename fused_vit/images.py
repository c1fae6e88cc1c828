"""Images: photographs through a checkpoint's Hugging Face processor, in its PIL form, which needs no torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import CheckpointError, InputError
from .spec import TowerSpec

# Qwen3-VL's published preprocessor_config.json
MEAN = STD = [0.5, 0.5, 0.5]
PIXELS = {"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096}


def processor(spec: TowerSpec, source: str | Path, *, revision: str | None = None) -> Any:
    """The image processor that `source` names in its preprocessor_config.json, or Qwen3-VL's where it has none."""
    cls = _processor_class()
    place = Path(source).expanduser()
    if place.is_file():
        place = place.parent
    try:
        if place.is_dir():
            found = cls.from_pretrained(place) if (place / "preprocessor_config.json").is_file() else None
        else:
            found = cls.from_pretrained(str(source), revision=revision)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: its preprocessor_config.json cannot be read ({error})") from error
    p, merge = spec.patch, spec.merger.size
    if found is None:
        found = cls(
            patch_size=p.size, temporal_patch_size=p.temporal, merge_size=merge,
            image_mean=MEAN, image_std=STD, size=dict(PIXELS),
        )  # fmt: skip
    got = (found.patch_size, found.temporal_patch_size, found.merge_size)
    if got != (p.size, p.temporal, merge):
        raise CheckpointError(
            f"{source}: preprocessor_config.json has patch_size, temporal_patch_size, merge_size {got}; "
            f"config.json says {(p.size, p.temporal, merge)}: take both from one release"
        )
    return found


def _processor_class() -> Any:
    try:
        import transformers

        # transformers 5 calls it ...Pil; in 4.57 the plain name is the PIL form
        return getattr(transformers, "Qwen2VLImageProcessorPil", None) or transformers.Qwen2VLImageProcessor
    except ImportError as error:
        raise ImportError(f"images need transformers and pillow: pip install 'fused-vit[hf]' ({error})") from error


def read_image(path: str | Path) -> Any:
    """A PIL image in RGB, upright. Raises InputError naming the file."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not an image that can be read ({error})") from error
