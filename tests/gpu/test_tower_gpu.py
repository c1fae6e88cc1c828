"""The whole tower on the GPU: against transformers, replay against eager, isolation, buckets, streams, bad input."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import fused_vit
from fused_vit.buckets import Bucket
from fused_vit.executor import define, launch
from fused_vit.packing import items, table

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GRIDS = {
    "one": [[1, 16, 16]],
    "odd": [[1, 6, 10], [1, 54, 74], [1, 2, 2], [1, 20, 36]],
    "video": [[8, 14, 22]],
    "mixed": [[1, 16, 16], [4, 10, 6], [1, 34, 60]],
}


@pytest.fixture(scope="module")
def reference():  # type: ignore[no-untyped-def]
    """A seeded tower of the 8B's sizes (8 blocks) in fp32, on the GPU, with norms that are no identity."""
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    torch.manual_seed(0)
    config = Qwen3VLVisionConfig(depth=8, out_hidden_size=4096, deepstack_visual_indexes=[2, 4, 6])
    config._attn_implementation = "sdpa"
    tower = Qwen3VLVisionModel(config).eval().requires_grad_(False)
    for name, parameter in tower.named_parameters():
        noise = torch.randn_like(parameter)
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(noise * (0.1 if parameter.ndim == 1 else 0.7 * parameter[0].numel() ** -0.5))
    return tower.cuda()


@pytest.fixture(scope="module")
def encoder(reference):  # type: ignore[no-untyped-def]
    return fused_vit.FusedViT.from_module(
        reference, dtype=torch.bfloat16, buckets=[(256, 16), (1024, 32), (6144, 64)]
    ).warmup()


def pixels_of(grid: list[list[int]], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(t * h * w for t, h, w in grid), 1536, generator=generator).cuda()


def flat(out) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    return [out.last_hidden_state, out.pooler_output, *out.deepstack_features]


def requested(which: str) -> int:
    """Bytes that torch's allocator was asked for, before it rounds."""
    return int(torch.cuda.memory_stats()[f"requested_bytes.all.{which}"])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_error_is_at_most_twice_transformers_own(reference, grid, dtype) -> None:  # type: ignore[no-untyped-def]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pixels = pixels_of(grid).to(dtype)
    peer = copy.deepcopy(reference)
    for parameter in peer.parameters():  # rounded in place: inv_freq stays fp32, as in a loaded checkpoint
        parameter.data = parameter.data.to(dtype)
    truth = flat(reference(pixels.float(), grid_thw=torch.tensor(grid).cuda()))
    theirs = flat(peer(pixels, grid_thw=torch.tensor(grid).cuda()))
    ours = flat(fused_vit.FusedViT.from_module(reference, dtype=dtype, max_tokens=8192)(pixels, grid))
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert a.shape == c.shape and a.dtype == dtype
        floor = 1e-5 if dtype == torch.float32 else 0.0  # in fp32 transformers is its own reference
        assert relative(a, c) <= 2 * relative(b, c) + floor, (relative(a, c), relative(b, c))


def test_replay_equals_eager_bit_for_bit_on_a_poisoned_slab(encoder) -> None:  # type: ignore[no-untyped-def]
    for grid, byte in itertools.product(GRIDS.values(), (0xFF, 0x7F, 0x00)):
        pixels = pixels_of(grid).bfloat16()
        encoder._workspace.slab.fill_(byte)
        replayed = flat(encoder(pixels, grid))
        pack = items(encoder.spec, grid, len(pixels))
        bucket = next(b for b in encoder.buckets if b.holds(len(pixels), sum(i.segments for i in pack)))
        buffers = encoder._graph(bucket).buffers
        encoder._workspace.slab.fill_(0xFF)
        integers = torch.tensor(table(pack, encoder.tile), dtype=torch.int32)
        buffers["table"][: len(integers)].copy_(integers)
        buffers["pixels"][: len(pixels)].copy_(pixels)
        eager = {
            name: torch.full_like(t, float("nan")) for name, t in zip(encoder.plan().outputs, replayed, strict=True)
        }
        launch(encoder.plan(), encoder.weights, buffers, encoder.tile, elsewhere=eager)
        for name, got in zip(encoder.plan().outputs, replayed, strict=True):
            assert torch.equal(eager[name], got), name
            assert torch.isfinite(got).all()


def test_an_image_has_the_same_bits_alone_and_packed_whatever_its_neighbours(encoder) -> None:  # type: ignore[no-untyped-def]
    grids = [[1, 16, 16], [1, 6, 10], [1, 28, 28], [2, 8, 14]]
    parts = [pixels_of([g], seed=i).bfloat16() for i, g in enumerate(grids)]
    alone = [encoder(p, [g]).pooler_output for p, g in zip(parts, grids, strict=True)]
    poisoned = torch.full_like(parts[0], float("nan"))
    for order in itertools.permutations(range(4)):
        out = encoder(torch.cat([parts[i] for i in order]), [grids[i] for i in order]).split()
        assert all(torch.equal(o, alone[i]) for o, i in zip(out, order, strict=True))
        out = encoder(torch.cat([parts[i] if i else poisoned for i in order]), [grids[i] for i in order]).split()
        assert all(torch.equal(o, alone[i]) for o, i in zip(out, order, strict=True) if i)


@pytest.mark.parametrize("grid", [[[1, 6, 10]], [[1, 14, 18]]], ids=["60 patches", "252 patches"])
def test_every_bucket_gives_an_image_the_same_bits(reference, grid) -> None:  # type: ignore[no-untyped-def]
    """Sizes at which every form of a matmul is chosen for some step."""
    pixels = pixels_of(grid).bfloat16()
    tokens = [n for n in (64, 128, 256, 512, 896, 1024, 2048, 3072, 4096, 16384) if n >= len(pixels)]
    outs = [
        flat(fused_vit.FusedViT.from_module(reference, dtype=torch.bfloat16, buckets=[n])(pixels, grid)) for n in tokens
    ]
    for other in outs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outs[0], other, strict=True))


def test_outputs_are_fresh_and_inputs_may_be_overwritten(encoder) -> None:  # type: ignore[no-untyped-def]
    pixels = pixels_of(GRIDS["odd"]).bfloat16()
    first = encoder(pixels, GRIDS["odd"])
    kept = [t.clone() for t in flat(first)]
    pixels.fill_(float("nan"))
    for grid in ("one", "odd"):
        encoder(pixels_of(GRIDS[grid], seed=1).bfloat16(), GRIDS[grid])
    assert all(torch.equal(a, b) for a, b in zip(flat(first), kept, strict=True))


def test_packs_beyond_the_largest_bucket_are_split_and_one_larger_image_still_runs(reference, encoder) -> None:  # type: ignore[no-untyped-def]
    big = fused_vit.FusedViT.from_module(reference, dtype=torch.bfloat16, buckets=[(16384, 256)])
    for grid in ([[1, 54, 74], [1, 54, 74], [12, 28, 28]], [[1, 100, 90]], [[1, 16, 16], [1, 100, 90], [1, 6, 10]]):
        pixels = pixels_of(grid).bfloat16()
        assert all(torch.equal(a, b) for a, b in zip(flat(encoder(pixels, grid)), flat(big(pixels, grid)), strict=True))
    assert encoder.stats()["oversize_calls"] == 2


def test_after_warmup_a_call_allocates_only_its_output_and_does_not_synchronise(encoder) -> None:  # type: ignore[no-untyped-def]
    pixels = pixels_of(GRIDS["mixed"]).bfloat16()
    out = encoder(pixels, GRIDS["mixed"])
    torch.cuda.synchronize()
    graphs, before = encoder.stats()["graphs"], requested("current")
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = encoder(pixels, GRIDS["mixed"])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert requested("peak") - before == sum(t.nbytes for t in flat(again)) and encoder.stats()["graphs"] == graphs
    assert all(torch.equal(a, b) for a, b in zip(flat(out), flat(again), strict=True))
    encoder(pixels, torch.tensor(GRIDS["mixed"]).cuda())  # a grid on the GPU: one small read, the same result


def test_streams_take_turns(encoder) -> None:  # type: ignore[no-untyped-def]
    cases = [(pixels_of(g, i).bfloat16(), g) for i, g in enumerate(GRIDS.values())]
    truth = [flat(encoder(*case)) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for stream, case in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                results.append(flat(encoder(*case)))
        torch.cuda.synchronize()
        for got, want in zip(results, truth, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_bad_input_is_refused_and_the_encoder_stays_usable(encoder, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Before anything is launched."""
    pixels = pixels_of(GRIDS["one"]).bfloat16()
    good = encoder(pixels, GRIDS["one"]).pooler_output
    for bad, grid, message in (
        (pixels, [[1, 16]], "shape"), (pixels, [[0, 16, 16]], "image 0"), (pixels, [[1, -16, -16]], "image 0"),
        (pixels, [[1, 15, 16]], "multiples"), (pixels, [[1, 16, 18]], "rows"), (pixels[:, :100], [[1, 16, 16]], "1536"),
        (pixels.int(), [[1, 16, 16]], "int32"), (pixels.cpu(), [[1, 16, 16]], "cpu"),
        (pixels, torch.rand(1, 3), "integers"),
    ):  # fmt: skip
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=message):
            patch.setattr(type(encoder), "_run_pack", lambda *_: pytest.fail("it was launched"))
            encoder(bad, grid)
    assert torch.equal(encoder(pixels, GRIDS["one"]).pooler_output, good)


def test_the_definition_on_the_gpu_agrees(reference, encoder) -> None:  # type: ignore[no-untyped-def]
    grid, pixels = GRIDS["mixed"], pixels_of(GRIDS["mixed"])
    exact = fused_vit.FusedViT.from_module(reference)
    want = define(exact.plan(), exact.weights, pixels, items(exact.spec, grid, len(pixels)))
    for a, b in zip(flat(exact(pixels, grid)), want, strict=True):
        assert relative(a, b) <= 1e-5


def test_a_bucket_is_a_choice(reference) -> None:  # type: ignore[no-untyped-def]
    vit = fused_vit.FusedViT.from_module(reference, dtype=torch.bfloat16, buckets=[300, Bucket(600, 4)])
    vit(pixels_of([[1, 16, 16]]).bfloat16(), [[1, 16, 16]])
    assert {name: used["replays"] for name, used in vit.stats()["buckets"].items()} == {"300x16": 1, "600x4": 0}
    vit.close()
