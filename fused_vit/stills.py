"""Stills: photographs as patches of bytes, resized and cut by a Hugging Face processor, for towers that normalise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .calls import call_of
from .errors import InputError
from .spec import TowerSpec


def normalisation(prepare: Any, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
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
        batch = prepare(
            images=given, do_rescale=False, do_normalize=False, input_data_format="channels_last",
            return_tensors="pt", **options,
        )  # fmt: skip
    except (ValueError, ArithmeticError) as error:
        raise InputError(f"images of {[_size(image) for image in given]}: {error}") from error
    p, (pixels, grid) = spec.patch, call_of(batch)
    if grid is None or pixels[0].numel() != p.features:
        raise InputError(
            f"the processor gives pixel_values {list(pixels.shape)}; expected [patches, {p.features}] and a grid: call "
            "it, and pass what it gives"
        )
    first = pixels.reshape(len(pixels), p.channels, p.temporal, -1)[:, :, 0].flatten(1)  # a still's frames are alike
    patches = first.to(torch.uint8)
    if not torch.equal(patches.to(first.dtype), first):
        raise InputError("the processor resizes to values that are no bytes: call it, and pass its pixel_values")
    return patches.to(device), [[1, *row][-3:] for row in grid.tolist()]


def _pixels(image: Any, i: int, on_device: bool) -> Any:
    """An image as processors take it: one that works on a device takes tensors, the others arrays."""
    if not isinstance(image, torch.Tensor | np.ndarray):
        if getattr(image, "mode", "RGB") != "RGB":
            raise InputError(f"image {i} has mode {image.mode}; expected RGB: image.convert('RGB')")
        image = np.asarray(image)
    if str(image.dtype).removeprefix("torch.") != "uint8" or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"image {i} is {image.dtype} {list(image.shape)}; expected uint8 [height, width, 3]")
    if on_device:
        return torch.as_tensor(image)
    return image.cpu().numpy() if isinstance(image, torch.Tensor) else image


def _size(image: Any) -> str:
    return f"{image.shape[0]} x {image.shape[1]}"
