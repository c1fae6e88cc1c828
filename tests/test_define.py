"""define(plan) is the tower: transformers' own, seeded random weights, fp32 on the CPU, every output to 1e-5."""

from __future__ import annotations

import pytest
import torch

import fused_vit
from fused_vit.executor import define, trace
from fused_vit.packing import items
from fused_vit.towers import find_tower
from fused_vit.weights.pack import pack_tower
from fused_vit.weights.read import reader
from tests.towers_hf import random_pixels, randomize, tiny_tower

GRIDS = {
    "one image": [[1, 8, 12]],
    "mixed odd grids": [[1, 6, 10], [1, 2, 2], [1, 14, 4], [1, 10, 22]],
    "video": [[5, 4, 6]],
    "several segments": [[3, 6, 4], [1, 8, 8], [2, 2, 10]],
}
SHAPES = {
    "heads of 16": {},
    "heads of 72": {"hidden_size": 144, "intermediate_size": 300, "num_position_embeddings": 64},
    "heads of 64, deepstack out of order": {"hidden_size": 128, "deepstack_visual_indexes": [2, 0]},
    "no deepstack, erf": {"deepstack_visual_indexes": [], "hidden_act": "gelu"},
}


def outputs(result) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    """Of a transformers 5 tower."""
    return [result.last_hidden_state, result.pooler_output, *result.deepstack_features]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_definition_is_transformers_tower(shape, grid) -> None:  # type: ignore[no-untyped-def]
    tower = tiny_tower(seed=3, **shape)
    vit = fused_vit.FusedViT.from_module(tower, device="cpu")
    pixels = random_pixels(grid, vit.spec.patch.features, 7)
    with torch.no_grad():
        want = outputs(tower(pixels, grid_thw=torch.tensor(grid)))
    out = vit(pixels, grid)
    got = outputs(out)
    assert len(got) == len(want) == 2 + len(vit.spec.deepstack)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and relative(a, b) <= 1e-5


def test_the_moe_models_tower_too() -> None:
    module = pytest.importorskip("transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe")
    config = pytest.importorskip("transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe").Qwen3VLMoeVisionConfig(
        depth=2, hidden_size=64, num_heads=4, intermediate_size=72, out_hidden_size=40, patch_size=4,
        num_position_embeddings=25, deepstack_visual_indexes=[1],
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    tower = randomize(module.Qwen3VLMoeVisionModel(config), 1)
    vit = fused_vit.FusedViT.from_module(tower, device="cpu")
    assert find_tower(config.to_dict()).family == "Qwen3-VL-MoE"
    pixels = random_pixels(GRIDS["several segments"], 96, 2)
    with torch.no_grad():
        want = outputs(tower(pixels, grid_thw=torch.tensor(GRIDS["several segments"])))
    for a, b in zip(outputs(vit(pixels, GRIDS["several segments"])), want, strict=True):
        assert relative(a, b) <= 1e-5


def test_fp64_agrees_far_below_fp32_noise() -> None:
    """In double precision the folded plan and the plain tower differ only by transformers' own fp32 rotary."""
    tower = tiny_tower(seed=5)
    layout = find_tower(tower.config.to_dict()).layouts[0]
    vit = fused_vit.FusedViT.from_module(tower, device="cpu")
    state = {k: v.double() for k, v in tower.state_dict().items()}
    weights = pack_tower(vit.spec, reader(layout, vit.spec, state), dtype=torch.float64)
    pixels = random_pixels(GRIDS["mixed odd grids"], 96, 1).double()
    pack = items(vit.spec, GRIDS["mixed odd grids"], len(pixels))
    exact = define(vit.plan(), weights, pixels, pack)
    with torch.no_grad():
        want = outputs(tower.double()(pixels, grid_thw=torch.tensor(GRIDS["mixed odd grids"])))
    for a, b in zip(exact, want, strict=True):
        assert a.dtype == torch.float64 and relative(a, b) <= 2e-7


def test_video_frames_are_images() -> None:
    vit = fused_vit.FusedViT.from_module(tiny_tower(seed=0), device="cpu")
    pixels = random_pixels([[3, 4, 6]], 96, 0)
    film, stills = vit(pixels, [[3, 4, 6]]), vit(pixels, [[1, 4, 6]] * 3)
    assert torch.equal(film.pooler_output, stills.pooler_output)


def test_trace_yields_every_step_in_order() -> None:
    vit = fused_vit.FusedViT.from_module(tiny_tower(seed=0), device="cpu")
    pixels = random_pixels([[1, 4, 4]], 96, 0)
    seen = [step.name for step, _ in trace(vit.plan(), vit.weights, pixels, items(vit.spec, [[1, 4, 4]], 16))]
    assert seen == [step.name for step in vit.plan().steps]
