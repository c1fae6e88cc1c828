"""Calls: pixels and grids in every form that processors give them, as patches [patches, features] and (t, h, w)."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange

from .errors import InputError
from .spec import PatchSpec, TowerSpec

Grid = torch.Tensor | Sequence[Sequence[int]]
# What torch reads and converts; it has more dtypes, of fewer bits or quantized, of which it can do neither.
INTEGERS = frozenset({
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
})  # fmt: skip
DISPATCH = torch.Tensor.__torch_dispatch__
FLOATS = frozenset({
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
})  # fmt: skip


def flatten_call(spec: TowerSpec, pixels: torch.Tensor, grid: Grid | None) -> tuple[torch.Tensor, list[list[int]]]:
    """pixel_values as [patches, features], and the grid as lists of (t, h, w), of any call that FusedViT takes."""
    if grid is None:
        return patches_of_images(spec, pixels)
    columns = (2, 3) if spec.patch.temporal == 1 else (3,)
    if pixels.ndim == 2 and pixels.shape[1] == spec.patch.features:  # what most processors give
        return pixels, read_grid(grid, columns)
    return pixels.reshape(_flat_shape(spec.patch, tuple(pixels.shape))), read_grid(grid, columns)


def _flat_shape(p: PatchSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """[patches, features] of pixels that come with the dims of a patch, or in a batch of one. Raises InputError."""
    frames = (p.temporal,) if p.temporal > 1 and not p.bytes else ()
    patch, flat = (p.channels, *frames, p.size, p.size), shape
    if flat[-len(patch) :] == patch:
        flat = (*flat[: -len(patch)], p.features)
    if len(flat) == 3 and flat[0] == 1 and p.order == "raster":  # such processors keep a batch of one
        flat = flat[1:]
    if len(flat) != 2 or flat[1] != p.features:
        raise InputError(
            f"pixel_values has shape {list(shape)}; expected [patches, {p.features}] "
            f"({' x '.join(map(str, patch))}: channels, frames if there are two, size; as the processor lays them out)"
        )
    return flat


def call_of(batch: Any) -> tuple[Any, Any]:
    """pixel_values and the grid, whatever the processor calls it; None where images are whole."""
    names = ("image_grid_thw", "grid_thws", "image_grid_hws")
    return batch["pixel_values"], next((batch[name] for name in names if name in batch), None)


def check_dense(name: str, tensor: torch.Tensor) -> None:
    """A tensor whose numbers lie in memory. Raises InputError."""
    wrapped = type(tensor).__torch_dispatch__ is not DISPATCH  # masked, fake, distributed: no memory of its own
    if wrapped or tensor.is_nested or tensor.is_meta or tensor.layout is not torch.strided:
        what = type(tensor).__name__ if wrapped else tensor.layout
        kind = "nested" if tensor.is_nested else "on meta" if tensor.is_meta and not wrapped else what
        raise InputError(f"{name} is {kind}; expected a dense tensor with values")
    reach = tensor.numel()
    if not tensor.is_contiguous():
        reach = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() and tensor.untyped_storage().nbytes() < (tensor.storage_offset() + reach) * tensor.itemsize:
        raise InputError(
            f"{name} has no memory behind all of its {list(tensor.shape)} numbers: its storage was resized"
        )


def read_grid(grid: Grid, columns: tuple[int, ...] = (3,)) -> list[list[int]]:
    """The grid as lists of (t, h, w); where two columns are allowed, they are (h, w) of stills."""
    if isinstance(grid, torch.Tensor):
        if grid.dtype not in INTEGERS:
            raise InputError(f"grid_thw is {grid.dtype}; expected integers")
        check_dense("grid_thw", grid)
        shape, rows = tuple(grid.shape), grid
    else:
        try:
            given = list(grid)
            if any(isinstance(part, (set, frozenset, dict)) for part in (grid, *given)):
                raise TypeError("what is in it has no order")
            rows = torch.tensor([list(row) for row in given])
        except (TypeError, ValueError, RuntimeError) as error:  # torch says RuntimeError of None
            raise InputError(f"grid_thw is {reprlib.repr(grid)}; expected [images, 3] integers (t, h, w)") from error
        shape = tuple(rows.shape)
        if rows.dtype not in INTEGERS and rows.numel():
            kind = "fractions" if rows.is_floating_point() else rows.dtype
            raise InputError(f"grid_thw holds {kind}; expected integers")
    if len(shape) != 2 or shape[1] not in columns:
        raise InputError(
            f"grid_thw has shape {list(shape)}; expected [images, 3] of (frames, height, width) in patches"
        )
    values: list[list[int]] = rows.tolist()
    return values if shape[1] == 3 else [[1, *row] for row in values]


def patches_of_images(spec: TowerSpec, images: torch.Tensor) -> tuple[torch.Tensor, list[list[int]]]:
    """Whole images [images, channels, height, width] as raster patches [patches, features], and their grid."""
    p = spec.patch
    if p.order != "raster" or p.temporal != 1:
        raise InputError("grid_thw is missing; expected [images, 3] of (frames, height, width) in patches")
    if images.ndim != 4 or images.shape[1] != p.channels or images.shape[2] % p.size or images.shape[3] % p.size:
        raise InputError(
            f"pixel_values has shape {list(images.shape)} and there is no grid_thw; expected whole images "
            f"[images, {p.channels}, height, width], sides multiples of {p.size}, or patches and their grid"
        )
    patches = rearrange(images, "b c (h p) (w q) -> (b h w) (c p q)", p=p.size, q=p.size)
    return patches, [[1, images.shape[2] // p.size, images.shape[3] // p.size]] * len(images)
