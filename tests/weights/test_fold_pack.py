"""Folding is exact in exact arithmetic: fp64 to 1e-10, and the column sum must come from the rounded weight."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fused_vit.weights.fold import column_sum, fold_bytes, fold_norm, fold_softmax_scale, pair_rotations


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def deferred(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, colsum: torch.Tensor) -> torch.Tensor:
    mean = x.mean(1, keepdim=True)
    rstd = torch.rsqrt(x.var(1, correction=0, keepdim=True) + 1e-6)
    return rstd * (x @ weight.T - mean * colsum) + bias


@pytest.mark.parametrize("mean", [0.0, 5.0, -20.0])
def test_layer_norm_folds_into_the_next_matmul(mean: float) -> None:
    x, weight, bias = random(17, 96) + mean, random(40, 96, seed=1), random(40, seed=2)
    gamma, beta = 1 + 0.3 * random(96, seed=3), random(96, seed=4)
    plain = F.linear(F.layer_norm(x, (96,), gamma, beta, 1e-6), weight, bias)
    folded, shift = fold_norm(weight, bias, gamma, beta)
    assert relative(deferred(x, folded, shift, column_sum(folded)), plain) < 1e-10


def test_rms_norm_folds_without_bias() -> None:
    x, weight, gamma = random(9, 64), random(24, 64, seed=1), random(64, seed=2)
    plain = F.linear(F.rms_norm(x, (64,), gamma, 1e-5), weight)
    folded, shift = fold_norm(weight, None, gamma, None)
    rstd = torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5)
    assert relative(rstd * (x @ folded.T) + shift, plain) < 1e-10


def test_the_column_sum_must_be_of_the_rounded_weight() -> None:
    """With a mean of 20 deviations, the sum of the unrounded weight leaves an error many times rounding's own."""
    x, weight, bias = random(33, 512) + 20, random(48, 512, seed=1), random(48, seed=2)
    plain = F.linear(F.layer_norm(x, (512,), eps=1e-6), weight, bias)
    rounded = weight.bfloat16()
    right = deferred(x, rounded.double(), bias, column_sum(rounded))
    wrong = deferred(x, rounded.double(), bias, column_sum(weight))
    assert relative(right, plain) < 3e-3 < 10e-3 < relative(wrong, plain)


def test_softmax_scale_turns_exp2_into_softmax() -> None:
    q, k = random(5, 72), random(11, 72, seed=1)
    plain = torch.softmax(q @ k.T / math.sqrt(72), -1)
    scores = fold_softmax_scale(q, 72) @ k.T
    weights = torch.exp2(scores - scores.amax(-1, keepdim=True))
    assert relative(weights / weights.sum(-1, keepdim=True), plain) < 1e-10


def test_what_processors_do_to_bytes_folds_into_the_patch_embedding() -> None:
    area, frames = 20, 2
    weight, bias = random(40, 3 * frames * area), random(40, seed=1)
    mean, std = random(3, seed=2).abs(), 0.2 + random(3, seed=3).abs()
    pixels = torch.randint(0, 256, (9, 3, area), generator=torch.Generator().manual_seed(4))
    normalised = (pixels.double() / 255 - mean[:, None]) / std[:, None]
    plain = F.linear(normalised[:, :, None].expand(-1, -1, frames, -1).flatten(1), weight, bias)
    folded, shift = fold_bytes(weight, bias, mean, std, frames)
    assert relative(F.linear(pixels.flatten(1).double() - 128, folded, shift), plain) < 1e-10


@pytest.mark.parametrize("head_dim", [8, 64, 72, 80])
def test_rotation_pairs_become_neighbours(head_dim: int) -> None:
    """Rotating neighbours of permuted rows gives the scores of rotate_half on the plain ones."""
    heads, half = 3, head_dim // 2
    q, k = random(7, heads * head_dim), random(7, heads * head_dim, seed=1)
    angle = random(7, half, seed=2)

    def rotate_half(x: torch.Tensor) -> torch.Tensor:
        a, b = x.view(7, heads, 2, half).unbind(2)
        c, s = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    def rotate_neighbours(x: torch.Tensor) -> torch.Tensor:
        a, b = pair_rotations(x.T, head_dim).T.reshape(7, heads, half, 2).unbind(-1)
        c, s = angle.cos()[:, None], angle.sin()[:, None]
        return torch.stack([a * c - b * s, b * c + a * s], -1).flatten(2)

    plain = torch.einsum("qhd,khd->hqk", rotate_half(q), rotate_half(k))
    ours = torch.einsum("qhd,khd->hqk", rotate_neighbours(q), rotate_neighbours(k))
    assert relative(ours, plain) < 1e-10
