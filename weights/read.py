"""Reading: a tower's tensors, under the names and in the pieces of some layout, by the parts that packing asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from einops import rearrange

from fused_vit.errors import SpecError
from fused_vit.layouts import Layout, Shape, parts
from fused_vit.spec import TowerSpec

from .pack import Read

Tensors = Mapping[str, torch.Tensor]


def reader(layout: Layout, spec: TowerSpec, tensors: Tensors) -> Read:
    """A function from (part, block) to its tensor, of the shape and the row order that packing wants."""
    shapes = {(part.name, part.block): part.shape for part in parts(spec) if layout.has(part.name)}

    def read(part: str, i: int) -> torch.Tensor:
        pieces = [tensors[name] for name in layout.names_of(part, i)]
        tensor = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).reshape(shapes[part, i])
        return _halves(spec, tensor) if layout.even_odd and part.startswith("block.qkv.") else tensor

    return read


def _halves(spec: TowerSpec, rows: torch.Tensor) -> torch.Tensor:
    """Query and key rows with pairs (2j, 2j + 1) as pairs (j, j + head_dim / 2)."""
    att = spec.attention
    q, k, v = rows.split(att.sections)
    q, k = (rearrange(t, "(h j pair) ... -> (h pair j) ...", j=att.head_dim // 2, pair=2) for t in (q, k))
    return torch.cat([q, k, v])


def state_of(layout: Layout, spec: TowerSpec, read: Read) -> dict[str, torch.Tensor]:
    """The inverse of reader, for a layout with rotation pairs in halves: every tensor under the layout's names."""
    expected = layout.expected(spec)
    state: dict[str, torch.Tensor] = {}
    for part in parts(spec):
        if layout.has(part.name):
            names = layout.names_of(part.name, part.block)
            tensor = read(part.name, part.block)
            pieces = (tensor,) if len(names) == 1 else tensor.split(part.sections)
            state |= {name: piece.reshape(expected[name]) for name, piece in zip(names, pieces, strict=True)}
    return state


def check_module(name: str, expected: Mapping[str, Shape], state: Tensors) -> None:
    """Raises SpecError with every tensor that LoRA wrapped, quantization packed or offloading emptied."""
    wrong = []
    for key, shape in expected.items():
        tensor = state.get(key)
        if tensor is None:
            wrong.append(f"{key} is missing")
        elif tensor.numel() != math.prod(shape) or not tensor.is_floating_point() or tensor.is_meta:
            wrong.append(f"{key} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}")
    if wrong:
        shown = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise SpecError(
            f"{name}: {shown}. expected plain floating-point tensors: merge adapters, load the tower "
            "neither quantized nor offloaded"
        )
