"""PCA colours: an image's patch features as a picture, their three strongest components as red, green and blue."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .errors import InputError
from .images import MAX_PIXELS
from .spec import TowerSpec

KEPT = 0.02  # share of patches that may clip at either end of a component's range


def raster(features: torch.Tensor, grid: Sequence[int], spec: TowerSpec) -> torch.Tensor:
    """[frames, height, width, channels] of an image's last_hidden_state, in patches, or merged ones if it is merged."""
    t, h, w = grid
    m, per_frame = spec.merge, len(features) // t
    if per_frame < h * w:
        return features.reshape(t, h // m, w // m, -1)
    features = features.reshape(t, per_frame, -1)[:, per_frame - h * w :]  # without class tokens
    if spec.patch.order == "raster":
        return features.reshape(t, h, w, -1)
    if spec.attention.windows:
        order = _window_order(h // m, w // m, spec.attention.windows.side // m).to(features.device)
        groups = features.reshape(t, len(order), -1)
        features = torch.empty_like(groups).index_copy_(1, order, groups)
    blocks = features.reshape(t, h // m, w // m, m, m, -1)
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(t, h, w, -1)


def _window_order(h: int, w: int, side: int) -> torch.Tensor:
    """The blocks of a frame of h x w blocks in the order in which windows of side x side hold them."""
    grid = torch.arange(h * w).view(h, w)
    return torch.cat([b.flatten() for band in grid.split(side, 0) for b in band.split(side, 1)])


def colours(features: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 3] of [..., channels]: principal components in a fixed sign, stretched to their own range."""
    x = features.detach().reshape(-1, features.shape[-1]).double().cpu()
    x = x - x.mean(0)
    axes = torch.linalg.eigh(x.T @ x).eigenvectors[:, -3:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    y = x @ axes
    low, high = y.quantile(KEPT, 0), y.quantile(1 - KEPT, 0)
    y = ((y - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    pixels: torch.Tensor = (255 * y).round().to(torch.uint8)
    return pixels.reshape(*features.shape[:-1], 3)


def picture(photos: Iterable[Any], maps: Sequence[torch.Tensor], height: int = 640, gap: int = 16) -> Any:
    """A PIL image: each photo (PIL) beside its map (uint8 [h, w, 3]), one pair a row.

    Raises InputError where that would be more than MAX_PIXELS, which few programs would open.
    """
    from PIL import Image

    rows: list[Any] = []
    widest = 0
    for photo, colour in zip(photos, maps, strict=True):
        size = (max(1, round(photo.width * height / photo.height)), height)
        widest = max(widest, 2 * size[0] + gap)
        if widest * len(maps) * (height + gap) > MAX_PIXELS:
            raise InputError(
                f"a picture of {len(maps)} photographs, {widest} pixels wide, has more than {MAX_PIXELS} pixels; give "
                "fewer with --pca"
            )
        row = Image.new("RGB", (2 * size[0] + gap, height), "white")
        row.paste(photo.convert("RGB").resize(size, Image.Resampling.LANCZOS), (0, 0))
        row.paste(Image.fromarray(colour.numpy()).resize(size, Image.Resampling.NEAREST), (size[0] + gap, 0))
        rows.append(row)
    whole = Image.new("RGB", (widest, len(rows) * (height + gap) - gap), "white")
    for i, row in enumerate(rows):
        whole.paste(row, (0, i * (height + gap)))
    return whole
