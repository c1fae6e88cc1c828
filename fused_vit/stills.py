"""Stills: photographs as patches of bytes, resized and cut by a Hugging Face processor, for towers that normalise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from .calls import call_of, flatten_call
from .errors import InputError
from .images import convert_image
from .spec import TowerSpec

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of channels
BYTES = {"do_rescale": False, "do_normalize": False}  # what a processor is asked, for bytes


def normalisation(prepare: Any, channels: int) -> Normalisation:
    """Mean and std of channels, as a processor subtracts and divides. Raises InputError where it does otherwise."""
    names = ("do_rescale", "rescale_factor", "do_normalize")
    about = {name: getattr(prepare, name, None) for name in names}
    mean, std = (tuple(getattr(prepare, name, None) or ()) for name in ("image_mean", "image_std"))
    usual = about["do_rescale"] and about["do_normalize"] and abs(255 * (about["rescale_factor"] or 0) - 1) < 1e-6
    if not usual or len(mean) != channels or len(std) != channels:
        raise InputError(
            f"the processor has {about}, image_mean {mean}, image_std {std}; expected one that divides by 255 and "
            f"normalises {channels} channels: call it, and pass its pixel_values"
        )
    return mean, std


def byte_patches(
    spec: TowerSpec, prepare: Any, images: Sequence[Any], device: torch.device
) -> tuple[torch.Tensor, list[list[int]]]:
    """Patches uint8 [patches, channels * size * size] of images that a processor resized and cut, and their grid.

    Raises InputError naming the image.
    """
    if not len(images):
        raise InputError("images is empty; expected at least one")
    on_device = any(base.__name__ in ("TorchvisionBackend", "BaseImageProcessorFast") for base in type(prepare).mro())
    given = [_pixels(image, i, on_device) for i, image in enumerate(images)]
    options: dict[str, Any] = {"device": device} if on_device else {}
    try:
        batch = prepare(images=given, return_tensors="pt", input_data_format="channels_last", **BYTES, **options)
    except (ValueError, ArithmeticError) as error:
        raise InputError(f"images of {[_size(image) for image in given]}: {error}") from error
    pixels, grid = flatten_call(spec, *call_of(batch))
    return _first_frames(spec, pixels).to(device), grid


def proven_normalisation(spec: TowerSpec, prepare: Any) -> Normalisation | None:
    """A processor's mean and std, if all that it does after resizing is to normalise by them: tried on noise, once."""
    try:
        numbers = normalisation(prepare, spec.patch.channels)
        return numbers if _only_normalises(spec, prepare, numbers) else None
    except (TypeError, ValueError):  # not ours to say: it is taken as it is
        return None


@lru_cache(8)
def _only_normalises(spec: TowerSpec, prepare: Any, numbers: Normalisation) -> bool:
    noise = np.random.default_rng(0).integers(0, 256, (397, 301, 3), dtype=np.uint8)
    pixels, grid = flatten_call(spec, *call_of(prepare(images=[noise], return_tensors="pt")))
    patches, same = byte_patches(spec, prepare, [noise], torch.device("cpu"))
    mean, std = (torch.tensor(values)[:, None, None] for values in numbers)
    normalised = (patches.view(len(patches), len(mean), 1, -1) / 255 - mean) / std
    frames = normalised.expand(-1, -1, spec.patch.temporal, -1).flatten(1)
    return grid == same and torch.allclose(frames, pixels, rtol=1e-5, atol=1e-5)


def _first_frames(spec: TowerSpec, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [patches, channels * size * size] of a processor's bytes [patches, features] of stills, in any dtype.

    The frames of a still are alike. Raises InputError where these are no bytes.
    """
    first = pixels.reshape(len(pixels), spec.patch.channels, spec.patch.temporal, -1)[:, :, 0].flatten(1)
    if first.dtype == torch.uint8:  # nothing to compare, for which the host would wait
        return first
    patches = first.to(torch.uint8)
    if not torch.equal(patches.to(first.dtype), first):
        raise InputError("the processor resizes to values that are no bytes: call it, and pass its pixel_values")
    return patches


def _pixels(image: Any, i: int, on_device: bool) -> Any:
    """An image as processors take it: one that works on a device takes tensors, the others arrays."""
    if not isinstance(image, torch.Tensor | np.ndarray):
        image = np.asarray(convert_image(image, f"image {i}") if hasattr(image, "convert") else image)
    if str(image.dtype).removeprefix("torch.") != "uint8" or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"image {i} is {image.dtype} {list(image.shape)}; expected uint8 [height, width, 3]")
    if on_device:
        return torch.as_tensor(image)
    return image.cpu().numpy() if isinstance(image, torch.Tensor) else image


def _size(image: Any) -> str:
    return f"{image.shape[0]} x {image.shape[1]}"
