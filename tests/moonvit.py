"""MoonViT in plain torch, transcribed from its published maths: Kimi-VL's tower has no class in transformers.

Source: Kimi-VL (arXiv 2504.07491) and the hub's modeling_kimi_vl.py: parameters carry the checkpoint's names.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Config:
    """The hub's MoonViTConfig."""

    def __init__(self, **fields: Any) -> None:
        self.fields = {"model_type": "moonvit", "merge_kernel_size": [2, 2], **fields}

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["fields"][name]
        except KeyError:
            raise AttributeError(name) from None

    def to_dict(self) -> dict[str, Any]:
        return dict(self.fields)


class Positions(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(config.init_pos_emb_height, config.init_pos_emb_width, config.hidden_size)
        )

    def forward(self, h: int, w: int) -> torch.Tensor:
        """[h * w, width] in raster order; the table itself where it has that size."""
        if (h, w) == self.weight.shape[:2]:
            return self.weight.flatten(0, 1)
        table = self.weight.permute(2, 0, 1)[None]
        return F.interpolate(table, size=(h, w), mode="bicubic")[0].permute(1, 2, 0).flatten(0, 1)


class PatchEmbed(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.pos_emb = Positions(config)


class Mlp(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc0 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc1 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc1(F.gelu(self.fc0(x), approximate="tanh"))
        return out


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.norm0, self.norm1 = nn.LayerNorm(width), nn.LayerNorm(width)  # eps 1e-5, torch's default
        self.wqkv, self.wo = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = Mlp(config)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        """One image: x [rows, width], rotation [rows, head_dim / 2] of unit complex numbers."""
        q, k, v = self.wqkv(self.norm0(x)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        q, k = (_rotate(t, rotation) for t in (q, k))
        heads = (t.transpose(0, 1) for t in (q, k, v))
        x = x + self.wo(F.scaled_dot_product_attention(*heads).transpose(0, 1).flatten(1))
        out: torch.Tensor = x + self.mlp(self.norm1(x))
        return out


def _rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Even and odd columns of a head are a complex number's parts."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation[:, None]).flatten(-2).to(x.dtype)


class Encoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size)


class MoonViT(nn.Module):
    """(pixels [rows, 3, patch, patch] in raster order, [[1, h, w], ...]) -> [rows, width], [rows / 4, 4, width]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.encoder = Encoder(config)

    def forward(self, pixels: torch.Tensor, grid: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        embedded = self.patch_embed.proj(pixels).flatten(1)
        outs, merged = [], []
        for x, (_, h, w) in zip(embedded.split([h * w for _, h, w in grid]), grid, strict=True):
            x = x + self.patch_embed.pos_emb(h, w)
            rotation = self.rotation(h, w).to(x.device)
            for block in self.encoder.blocks:
                x = block(x, rotation)
            x = self.encoder.final_layernorm(x)
            outs.append(x)
            merged.append(x.view(h // 2, 2, w // 2, 2, -1).transpose(1, 2).reshape(h * w // 4, 4, -1))
        return torch.cat(outs), torch.cat(merged)

    def rotation(self, h: int, w: int) -> torch.Tensor:
        """[h * w, head_dim / 2]: the column's angle, then the row's, frequency by frequency."""
        dim = self.config.hidden_size // self.config.num_attention_heads
        frequency = 1.0 / 10000 ** (torch.arange(0, dim, 4)[: dim // 4].float() / dim)
        y, x = torch.meshgrid(torch.arange(h).float(), torch.arange(w).float(), indexing="ij")
        angles = torch.stack([x.flatten()[:, None] * frequency, y.flatten()[:, None] * frequency], -1)
        return torch.polar(torch.ones(h * w, dim // 2), angles.flatten(1))


class Projector(nn.Module):
    """KimiVLMultiModalProjector: norm each patch, join four, linear, GELU, linear."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(width)
        self.linear_1, self.linear_2 = nn.Linear(4 * width, 4 * width), nn.Linear(4 * width, out)

    def forward(self, merged: torch.Tensor) -> torch.Tensor:
        """[rows, 4, width] -> [rows, out]."""
        out: torch.Tensor = self.linear_2(F.gelu(self.linear_1(self.pre_norm(merged).flatten(1))))
        return out
