"""Every family at one checkpoint's real sizes, in bf16: error to fp32 at most twice the reference's own."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator

import pytest
import torch

import fused_vit
from fused_vit.parity import FLOOR, exact_fp32, relative
from tests.families import FAMILIES, Family, available, build, pixels
from tests.test_families import outputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
HERE = [family for family in FAMILIES if available(family)]
CLIPS = [[3, 10, 14], [1, 22, 18], [2, 4, 4]]


@pytest.fixture(autouse=True)
def _free() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def grids(family: Family, vit: fused_vit.FusedViT) -> list[list[list[int]]]:
    """One call of stills at odd sizes, and one of clips and stills where the family has video."""
    side = vit.spec.position.side if vit.spec.position else 0
    if vit.spec.merge == 1 and vit.spec.rope is None:  # fixed resolution
        return [[[1, side, side]] * 2]
    stills = [[1, 22, 30], [1, 2, 2], [1, 36, 26], [1, 10, 54]]
    return [stills, CLIPS] if "video" in family.grids else [stills]


@pytest.mark.parametrize("family", HERE, ids=[family.name for family in HERE])
def test_real_sizes_in_bf16(family: Family) -> None:
    tower = build(family, seed=0, real=True, device="cuda")
    peer = copy.deepcopy(tower)
    for parameter in peer.parameters():
        parameter.data = parameter.data.bfloat16()
    vit = fused_vit.FusedViT.from_module(tower, dtype=torch.bfloat16, buckets=[(4096, 128)])
    for grid in grids(family, vit):
        x = pixels(family, tower, grid, seed=1).bfloat16().cuda()
        with exact_fp32():
            truth = family.call(tower, x.float(), grid)
        theirs, ours = family.call(peer, x, grid), outputs(vit(x, grid))
        assert len(ours) == len(truth)
        for got, peers, true in zip(ours, theirs, truth, strict=True):
            error, own = relative(got, true), relative(peers, true)
            assert error <= 2 * own + FLOOR, (error, own)
        kept = outputs(vit(x, grid))
        assert vit._workspace is not None
        vit._workspace.slab.fill_(0xFF)  # NaN everywhere: nothing of it may reach a result
        assert all(torch.equal(a, b) for a, b in zip(outputs(vit(x, grid)), kept, strict=True))
        together = vit(x, grid).split()
        for one, part, row in zip(together, x.split([t * h * w for t, h, w in grid]), grid, strict=True):
            assert torch.equal(vit(part, [row]).split()[0], one), row
    assert vit.stats()["oversize_calls"] == 0
