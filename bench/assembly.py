"""Assembly: Qwen3-VL's tower from what libraries have, as a peer: cuBLAS, torch's norms, variable-length attention.

Bound to one grid, so that all that depends on the grid alone is computed once and the rest fits in a CUDA graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Assembly:
    """pixels [rows, features] -> [pooled, *deepstack], with the parameters of transformers' Qwen3VLVisionModel."""

    def __init__(self, tower: Any, grids: Sequence[Sequence[int]]) -> None:
        config, table = tower.config, tower.pos_embed.weight
        self.tower, self.heads, self.merge = tower, config.num_heads, config.spatial_merge_size
        self.positions = positions(table, grids, self.merge)
        head_dim = config.hidden_size // config.num_heads
        self.cos, self.sin = rotations(grids, self.merge, head_dim, table.dtype, table.device)
        self.attend = attention([h * w for t, h, w in grids for _ in range(t)], table.device, table.dtype)

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        embedding = self.tower.patch_embed.proj
        x = F.linear(pixels, embedding.weight.flatten(1), embedding.bias) + self.positions
        taps = list(self.tower.config.deepstack_visual_indexes)
        deepstack = []
        for i, block in enumerate(self.tower.blocks):
            x = self.block(block, x)
            if i in taps:
                deepstack.append(self.merger(self.tower.deepstack_merger_list[taps.index(i)], x, whole=True))
        return [self.merger(self.tower.merger, x, whole=False), *deepstack]

    def block(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        qkv = linear(block.attn.qkv, norm(block.norm1, x)).view(len(x), 3, self.heads, -1)
        q, k = rotated(qkv[:, :2], self.cos, self.sin).unbind(1)
        x = x + linear(block.attn.proj, self.attend(q, k, qkv[:, 2]).flatten(1))
        hidden = F.gelu(linear(block.mlp.linear_fc1, norm(block.norm2, x)), approximate="tanh")
        return x + linear(block.mlp.linear_fc2, hidden)

    def merger(self, merger: Any, x: torch.Tensor, whole: bool) -> torch.Tensor:
        """whole: the norm is over a merged row, not over each of its patches."""
        width = x.shape[1] * self.merge**2
        rows = norm(merger.norm, x.view(-1, width)) if whole else norm(merger.norm, x).view(-1, width)
        return linear(merger.linear_fc2, F.gelu(linear(merger.linear_fc1, rows)))


def linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, layer.weight, layer.bias)


def norm(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries and keys [rows, 2, heads, head_dim], turned together; pairs are half a head apart."""
    first, second = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat([-second, first], -1), sin)


def in_blocks(x: torch.Tensor, merge: int) -> torch.Tensor:
    """[h, w, ...] as rows in the order of merged blocks."""
    tail = x.shape[2:]
    x = x.unflatten(1, (-1, merge)).unflatten(0, (-1, merge))  # [h / merge, merge, w / merge, merge, ...]
    return x.transpose(1, 2).reshape(-1, *tail)


def positions(table: torch.Tensor, grids: Sequence[Sequence[int]], merge: int) -> torch.Tensor:
    """The learned square of positions, stretched bilinearly to every grid: [rows, width]."""
    side = int(len(table) ** 0.5)
    square = table.float().view(1, side, side, -1).movedim(-1, 1)
    rows = []
    for t, h, w in grids:
        image = F.interpolate(square, size=(h, w), mode="bilinear", align_corners=True)
        rows += [in_blocks(image[0].movedim(0, -1), merge)] * t
    return torch.cat(rows).to(table.dtype)


def rotations(
    grids: Sequence[Sequence[int]], merge: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [rows, 1, 1, head_dim]: a quarter of a head turns with a patch's row, a quarter with its column."""
    frequency = 1.0 / 10000.0 ** (torch.arange(0, head_dim // 2, 2, device=device) / (head_dim // 2))
    rows = []
    for t, h, w in grids:
        y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
        rows += [in_blocks(torch.stack([y, x], -1), merge)] * t
    angles = (torch.cat(rows)[:, :, None] * frequency).flatten(1).repeat(1, 2)[:, None, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def attention(lengths: Sequence[int], device: torch.device, dtype: torch.dtype) -> Attend:
    """Attention within segments of packed rows [rows, heads, head_dim]: torch's own for them, or segment by segment."""
    if device.type == "cuda" and dtype.itemsize == 2 and (varlen := variable_length(lengths, device)) is not None:
        return varlen

    def by_segment(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = zip(*(t.transpose(0, 1).split(list(lengths), 1) for t in (q, k, v)), strict=True)
        outs = [F.scaled_dot_product_attention(*(t[None] for t in part))[0] for part in parts]
        return torch.cat(outs, 1).transpose(0, 1)

    return by_segment


def variable_length(lengths: Sequence[int], device: torch.device) -> Attend | None:
    """torch.nn.attention.varlen over these segments; None where torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    longest = max(lengths)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = varlen_attn(q, k, v, ends, ends, longest, longest)
        assert isinstance(out, torch.Tensor), "no auxiliary output was asked for"
        return out

    return attend


class Captured:
    """A tower of fixed grids in a CUDA graph over its own copy of the pixels. A call's results are fresh tensors."""

    def __init__(self, tower: Callable[[torch.Tensor], list[torch.Tensor]], pixels: torch.Tensor) -> None:
        self.pixels = pixels.clone()
        self.tower = tower  # the graph reads what it computed of the grids
        for _ in range(2):
            tower(self.pixels)  # libraries choose and allocate here, not in the capture
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = tower(self.pixels)

    def __call__(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        self.pixels.copy_(pixels)
        self.graph.replay()
        return [result.clone() for result in self.results]
