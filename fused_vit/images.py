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


def call_of(batch: Any) -> tuple[Any, Any]:
    """pixel_values and the grid, whatever the processor calls it; None where images are whole."""
    names = ("image_grid_thw", "grid_thws", "image_grid_hws")
    return batch["pixel_values"], next((batch[name] for name in names if name in batch), None)


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
    """A PIL image in RGB, upright. Raises InputError naming the file."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not an image that can be read ({error})") from error
