"""Folding: algebra on weights, done once at load, that removes work from every call. Exact in exact arithmetic."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange

from fused_vit.spec import AttentionSpec, RopeSpec


def fold_norm(
    weight: torch.Tensor, bias: torch.Tensor | None, gamma: torch.Tensor, beta: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(W', b') with norm(x) @ W.T + b == rstd * (x @ W'.T - mean * colsum(W')) + b'. weight [out, in], gamma [in].

    Deferred normalisation as in FlashNorm (arXiv 2407.09577), extended to LayerNorm by the column sum.
    """
    shift = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device) if bias is None else bias
    return weight * gamma, shift if beta is None else shift + weight @ beta


def column_sum(rounded: torch.Tensor) -> torch.Tensor:
    """[out] row sums of the weight as the kernel sees it: taken after rounding, so that the mean cancels."""
    return rounded.double().sum(1)


def fold_bytes(
    weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, frames: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(W', b') with x @ W.T + b == (u - 128) @ W'.T + b', x = (u / 255 - mean) / std of bytes u, alike in all frames.

    weight [out, channels * frames * area], W' [out, channels * area], mean and std [channels]. What a processor does to
    pixels, and both frames of a still, at no cost; u - 128 has eight bits.
    """
    of_channels = rearrange(weight, "o (c f a) -> o f c a", c=len(mean), f=frames).sum(1) / (255 * std[:, None])
    return of_channels.flatten(1), bias + (of_channels * (128 - 255 * mean[:, None])).sum((1, 2))


def fold_softmax_scale(queries: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Query rows of a weight or bias times head_dim ** -0.5 * log2(e), so that the kernel's exp2 is a softmax."""
    scale: float = head_dim**-0.5 * math.log2(math.e)
    return queries * scale


def pair_rotations(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows (j, j + head_dim / 2) of each head, which rotate together in rotate_half, become rows (2j, 2j + 1).

    Queries and keys are permuted alike, so their products do not change.
    """
    return rearrange(rows, "(head pair j) ... -> (head j pair) ...", pair=2, j=head_dim // 2)


def pair_gates(rows: torch.Tensor) -> torch.Tensor:
    """Rows of a gate, then as many of its up projection, become rows (gate j, up j): one tile holds both."""
    return rearrange(rows, "(pair j) ... -> (j pair) ...", pair=2)


def frame_sinusoids(frames: int, width: int) -> torch.Tensor:
    """[frames, width] fp32 sin and cos of frame numbers 0, 1, ... (transformers Kimi_K25VisionPositionEmbeddings)."""
    frequency = 1.0 / 10000 ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = torch.outer(torch.arange(frames, dtype=torch.float32), frequency)
    return torch.cat([angle.sin(), angle.cos()], 1)


def rotary_frequencies(rope: RopeSpec, attention: AttentionSpec, dtype: torch.dtype) -> torch.Tensor:
    """[2, qkv width]: what a patch's row and its column weigh in the angle of each column; of values, nothing.

    2-D rotary embedding of Qwen2-VL (arXiv 2409.12191); MoonViT's (arXiv 2504.07491) takes turns with columns first.
    """
    quarter = attention.head_dim // 4
    exponent = torch.arange(0, 2 * quarter, 2, dtype=dtype) / (2 * quarter)
    frequency, none = 1.0 / rope.theta**exponent, torch.zeros(quarter, dtype=dtype)
    if rope.layout == "w_h_interleaved":
        pairs = torch.stack([torch.stack([none, frequency], 1).flatten(), torch.stack([frequency, none], 1).flatten()])
    else:
        pairs = torch.stack([torch.cat([frequency, none]), torch.cat([none, frequency])])
    turned = pairs.repeat_interleave(2, 1).repeat(1, attention.heads + attention.kv_heads)
    return F.pad(turned, (0, attention.kv_heads * attention.head_dim))
