"""Buffers of more than 2^31 elements: an offset of 32 bits would be somebody else's row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fused_vit import FusedViT
from fused_vit.buckets import Bucket
from fused_vit.workspace import shapes
from tests.gpu.towers import DEVICE, flat, random_weights, spec_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
FRAMES = 720  # of 28 x 28 patches: frames attend within themselves, so that the work grows with the rows
CROSSED = {"qkv": 2**31, "hidden": 2**31}


@pytest.fixture(autouse=True)
def _free() -> Iterator[None]:
    """15 GB at the most, in use by nobody afterwards."""
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("gluon", [True, False], ids=["gluon", "plain"])
def test_rows_beyond_32_bits_are_those_of_small_calls(gluon: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """564 480 rows in one launch each, every output bit for bit that of 45 packs of 16 frames.

    Fails where a kernel multiplies a row by a width in 32 bits.
    """
    from fused_vit.kernels import config

    if gluon and not (config.has_gluon() and config.device_arch(torch.device(DEVICE)) // 10 == 9):
        pytest.skip("this GPU has no such form")
    monkeypatch.setattr(config, "has_gluon", lambda: gluon)
    spec = replace(spec_of("heads of 72"), depth=1, deepstack=())
    weights = random_weights(spec, torch.bfloat16)
    large, small = Bucket(FRAMES * 784, FRAMES), Bucket(16 * 784, 16)
    vit, reference = (FusedViT(spec, weights, buckets=[bucket]) for bucket in (large, small))
    sizes = {name: math.prod(shape) for name, shape in shapes(vit.plan(), large, vit.tile).items()}
    assert all(sizes[name] > most for name, most in CROSSED.items()), sizes
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    pixels = torch.randn(FRAMES * 784, spec.patch.features, dtype=torch.bfloat16, device=DEVICE, generator=generator)
    got, want = flat(vit(pixels, [[FRAMES, 28, 28]])), flat(reference(pixels, [[FRAMES, 28, 28]]))
    for a, b in zip(got, want, strict=True):
        for rows, others in zip(a.split(1 << 16), b.split(1 << 16), strict=True):  # torch compares into bytes
            assert torch.equal(rows, others)
    assert vit.stats()["oversize_calls"] == 0 and sum(b["replays"] for b in reference.stats()["buckets"].values()) == 45
