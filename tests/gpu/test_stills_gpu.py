"""Photographs as bytes on the GPU: as right as normalised pixels are, from either kind of processor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fused_vit
from fused_vit.calls import call_of
from fused_vit.parity import exact_fp32, relative

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SIZES = ((448, 448), (96, 640), (333, 217))


@pytest.fixture(scope="module")
def tower() -> torch.nn.Module:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    torch.manual_seed(0)
    config = Qwen3VLVisionConfig(depth=3, out_hidden_size=512, deepstack_visual_indexes=[1])
    config._attn_implementation = "sdpa"
    return Qwen3VLVisionModel(config).eval().requires_grad_(False).cuda()


def processors() -> dict[str, Any]:
    import transformers

    def found(*names: str) -> Any:
        return next((getattr(transformers, n) for n in names if hasattr(transformers, n)), None)

    return {"PIL": found("Qwen2VLImageProcessorPil", "Qwen2VLImageProcessor"),
            "torchvision": found("Qwen2VLImageProcessorFast", "Qwen2VLImageProcessor")}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kind", ["PIL", "torchvision"])
def test_bytes_are_as_right_as_normalised_pixels(tower: torch.nn.Module, kind: str, dtype: torch.dtype) -> None:
    """Against the fp32 tower on the same processor's pixels; the normalised way's own error is the measure."""
    if kind == "torchvision":
        pytest.importorskip("torchvision")
    size = {"shortest_edge": 64 * 64, "longest_edge": 512 * 512}
    prepare = processors()[kind](patch_size=16, image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28], size=size)
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (h, w, 3), generator=generator, dtype=torch.uint8) for h, w in SIZES]
    given: list[Any] = images if kind == "torchvision" else [image.numpy() for image in images]
    place = {"device": "cuda"} if kind == "torchvision" else {}
    pixels, grid = call_of(prepare(images=given, return_tensors="pt", input_data_format="channels_last", **place))
    pixels = pixels.cuda()
    with exact_fp32():
        truth = tower(pixels, grid_thw=grid.cuda()).pooler_output
    vit = fused_vit.FusedViT.from_module(tower, dtype=dtype, buckets=[4096])
    plain, out = vit(pixels, grid), vit.encode_images([image.cuda() for image in images], prepare)
    floor = 1e-5 if dtype == torch.float32 else 0.0
    assert relative(out.pooler_output, truth) <= 1.5 * relative(plain.pooler_output, truth) + floor
    again = vit.encode_images(given, prepare)
    assert torch.equal(again.pooler_output, out.pooler_output) and out.merged_rows == plain.merged_rows
    alone = vit.encode_images(images[1:2], prepare)
    assert torch.equal(alone.pooler_output, out.split()[1])
    assert vit.stats()["calls"] == 4, "photographs as bytes count among the calls"
