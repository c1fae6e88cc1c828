"""An image's rows have the same bits alone and packed, whatever lies in the workspace and whoever is beside it."""

from __future__ import annotations

import itertools

import pytest
import torch

from fused_vit import FusedViT
from fused_vit.buckets import Bucket
from fused_vit.graphs import BucketGraph
from fused_vit.packing import items
from tests.gpu.towers import encoder, flat, pixels_of, same, spec_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
Grid = list[list[int]]
# A bucket each: what fills it to its last row and segment, and what fits no smaller one and leaves it ragged.
FULL: list[Grid] = [
    [[1, 12, 14], [1, 2, 2], [1, 6, 10], [1, 4, 6]],
    [[1, 22, 26], [1, 2, 2], [2, 10, 14], [1, 8, 16]],
    [[1, 36, 36], [4, 10, 14], [1, 2, 2], [1, 16, 18]],
    [[1, 50, 54], [4, 14, 14], [1, 2, 2], [1, 6, 10], [1, 4, 4]],
]
RAGGED: list[Grid] = [
    [[1, 2, 2], [1, 10, 10]],
    [[1, 14, 30], [1, 2, 2], [1, 6, 26]],
    [[1, 30, 34], [3, 6, 10]],
    [[1, 46, 50], [1, 2, 2], [1, 10, 22]],
]
BEYOND: Grid = [[1, 64, 60], [1, 64, 58], [1, 56, 66]]  # each larger than any of those buckets, the largest first
PAIRS = list(itertools.permutations(range(len(FULL)), 2))
POISONS = {
    "0xFF": (torch.uint8, 0xFF),
    "NaN": (torch.bfloat16, float("nan")),
    "Inf": (torch.bfloat16, float("inf")),
    "Inf in fp32": (torch.float32, float("inf")),
    "1.0": (torch.bfloat16, 1.0),
    "1.0 in fp32": (torch.float32, 1.0),
}
CASES = [
    ("heads of 72", "bfloat16"), ("heads of 72", "float16"), ("heads of 72", "float32"), ("heads of 72", "bytes"),
    ("gated, in windows, heads of 80", "bfloat16"), ("whole clips, pooled", "bfloat16"),
    ("class token, heads of 64", "bfloat16"), ("class token, heads of 64", "bytes"),
    ("normed heads of 64, clamped", "bfloat16"), ("normed heads of 64, clamped", "float16"),
]  # fmt: skip


def buckets_of(name: str) -> list[Bucket]:
    spec = spec_of(name)
    packs = [items(spec, grid, sum(t * h * w for t, h, w in grid)) for grid in FULL]
    return [Bucket(sum(i.rows for i in pack), sum(i.segments for i in pack)) for pack in packs]


@pytest.fixture(scope="module", params=CASES, ids=map(", ".join, CASES))
def vit(request: pytest.FixtureRequest) -> FusedViT:
    """bytes: the tower for those, in bfloat16."""
    name, kind = request.param
    if kind == "bytes":
        whole = encoder(name, torch.bfloat16, buckets=buckets_of(name))
        return whole.for_bytes((0.5, 0.4, 0.3), (0.5, 0.3, 0.2)).warmup()
    return encoder(name, getattr(torch, kind), buckets=buckets_of(name)).warmup()


def images_of(vit: FusedViT, grid: Grid) -> list[torch.Tensor]:
    """Pixels of each image, the same ones wherever an image of that size is asked for."""
    return [pixels_of(vit, [image], seed=sum(image)) for image in grid]


def alone(vit: FusedViT, grid: Grid) -> list[torch.Tensor]:
    """Every output, of images that ran one by one, in an empty workspace."""
    assert vit._workspace is not None
    outs = []
    for pixels, image in zip(images_of(vit, grid), grid, strict=True):
        vit._workspace.slab.zero_()
        outs.append(flat(vit(pixels, [image])))
    return [torch.cat(column) for column in zip(*outs, strict=True)]


def fill(slab: torch.Tensor, kind: str) -> torch.Tensor:
    """Fill the whole slab; what it then holds."""
    dtype, value = POISONS[kind]
    slab.fill_(0xFF)
    slab[: len(slab) // 4 * 4].view(dtype).fill_(value)
    return slab.clone()


@pytest.mark.parametrize("kind", POISONS)
def test_no_pair_of_buckets_and_nothing_in_the_workspace_changes_a_bit(
    vit: FusedViT, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small, large, small over every ordered pair, the slab poisoned before every replay, as it then still is.

    Fails where a kernel lets a row past the last one, of its own or of a larger bucket's last run, into a sum.
    """
    assert vit._workspace is not None
    calls = {id(grid): (torch.cat(images_of(vit, grid)), alone(vit, grid)) for grid in (*FULL, *RAGGED)}
    slab, replay = vit._workspace.slab, BucketGraph.replay
    held: list[torch.Tensor] = []
    seen = []

    def watched(self: BucketGraph) -> None:
        seen.append((self.bucket, int((slab != held[0]).sum())))
        replay(self)

    monkeypatch.setattr(BucketGraph, "replay", watched)
    for one, other in PAIRS:
        for bucket, grid in ((one, FULL[one]), (other, RAGGED[other]), (other, FULL[other]), (one, RAGGED[one])):
            pixels, want = calls[id(grid)]
            held[:] = [fill(slab, kind)]
            got = flat(vit(pixels, grid))
            assert same(got, want), (one, other, grid)
            used, written = seen[-1]
            row = vit._graphs[used].buffers["pixels"][0].nbytes
            assert used == vit.buckets[bucket], "the pack was to run in this bucket"
            assert written <= len(pixels) * row + 4096, "only pixels and table may lie over the poison"
    assert len(seen) == 4 * len(PAIRS)


@pytest.mark.parametrize("kind", POISONS)
def test_nothing_in_the_workspace_of_larger_calls_changes_a_bit(vit: FusedViT, kind: str) -> None:
    """Plain launches over a slab of their own, which the largest made, poisoned before each and smaller in between."""
    pixels, calls = images_of(vit, BEYOND), vit.stats()["oversize_calls"]
    want = []
    for part, image in zip(pixels, BEYOND, strict=True):
        vit(part, [image])
        assert vit._oversize is not None
        vit._oversize.slab.zero_()
        want.append(flat(vit(part, [image])))
    slab = vit._oversize.slab
    for i in (0, 1, 0, 2, 1, 2, 0):
        fill(slab, kind)
        assert same(flat(vit(pixels[i], [BEYOND[i]])), want[i]), BEYOND[i]
        assert vit._oversize.slab is slab, "else what was poisoned was not used"
    assert vit.stats()["oversize_calls"] == calls + 13


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "largest"])
def test_a_poisoned_neighbour_changes_no_bit(vit: FusedViT, value: str) -> None:
    """In every bucket, full and ragged, at every place. Fails where a tile's rows past its segment are not zeroed."""
    if vit.spec.patch.bytes:
        pytest.skip("no byte is a poison")
    poison = torch.finfo(vit.dtype).max if value == "largest" else float(value)
    for grid in (*FULL, *RAGGED):
        parts = images_of(vit, grid)
        want = vit(torch.cat(parts), grid).split()
        for bad in range(len(grid)):
            mixed = [torch.full_like(part, poison) if i == bad else part for i, part in enumerate(parts)]
            got = vit(torch.cat(mixed), grid).split()
            for i, (a, b) in enumerate(zip(got, want, strict=True)):
                assert i == bad or same([a], [b]), (grid, bad, i)
            if value == "nan":
                assert torch.isnan(got[bad]).all(), "else nothing was poisoned"


def test_any_order_and_any_company_gives_an_image_its_bits(vit: FusedViT) -> None:
    """A hundred random packs of one to eight images. Fails where a row's sum depends on where in a tile it is."""
    sizes = [[1, 2, 2], [1, 6, 10], [1, 16, 16], [2, 8, 14], [1, 22, 26], [1, 4, 40]]
    parts = images_of(vit, sizes)
    want = [vit(pixels, [size]).split()[0] for pixels, size in zip(parts, sizes, strict=True)]
    random = torch.Generator().manual_seed(0)
    for _ in range(100):
        count = int(torch.randint(1, 9, (1,), generator=random))
        chosen = torch.randint(0, len(sizes), (count,), generator=random).tolist()
        got = vit(torch.cat([parts[i] for i in chosen]), [sizes[i] for i in chosen]).split()
        assert all(same([a], [want[i]]) for a, i in zip(got, chosen, strict=True)), chosen
