"""What each family's own image processor returns goes in as it is, and comes out as transformers' tower has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_vit
from fused_vit.calls import call_of, flatten_call
from fused_vit.images import processor
from tests.families import FAMILIES, available, build
from tests.test_families import outputs, worst

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")
NAMES = {family.name: family for family in FAMILIES}
AREA, SQUARE = {"size": {"shortest_edge": 64, "longest_edge": 8192}}, {"size": {"height": 24, "width": 24}}
PROCESSORS = {
    "Qwen2-VL": ("Qwen2VLImageProcessor", AREA),
    "Qwen2.5-VL": ("Qwen2VLImageProcessor", AREA),
    "Qwen3-VL": ("Qwen2VLImageProcessorFast", AREA),
    "Qwen3.5": ("Qwen2VLImageProcessorFast", AREA),
    "GLM-4V": ("Glm4vImageProcessor", AREA),
    "GLM-OCR": ("Glm46VImageProcessor", AREA),
    "GLM-5.3-Flash": ("Glm5NextImageProcessor", AREA),
    "Kimi-K2.5": ("Kimi_K25ImageProcessor", {}),
    "PaddleOCR-VL": ("PaddleOCRVLImageProcessor", AREA),
    "ERNIE-4.5-VL": ("Ernie4_5_VLMoeImageProcessor", AREA),
    "InternVL": ("GotOcr2ImageProcessor", SQUARE | {"crop_to_patches": True}),
    "SigLIP": ("SiglipImageProcessor", SQUARE),
}


def photos() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((60, 44, 3), (33, 90, 3))
    return [Image.fromarray(torch.randint(0, 256, s, generator=generator, dtype=torch.uint8).numpy()) for s in shapes]


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processors_batch_is_a_call(name: str, tmp_path: Path) -> None:
    family, (kind, fields) = NAMES[name], PROCESSORS[name]
    if not available(family):
        pytest.skip(f"transformers has no {name}")
    tower = build(family, seed=1)
    vit = fused_vit.FusedViT.from_module(tower, device="cpu")
    size = {} if vit.spec.merge == 1 and vit.spec.rope is None else {"patch_size": vit.spec.patch.size}
    described = {"image_processor_type": kind, **fields, **size}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(described))
    try:
        prepare = processor(vit.spec, tmp_path)
        batch = prepare(images=photos(), return_tensors="pt")
    except ImportError as error:
        pytest.skip(f"{kind} cannot run here: {error}")
    except ValueError as error:
        if "has no" not in str(error):
            raise
        pytest.skip(str(error))
    pixels, grid = call_of(batch)
    rows, grids = flatten_call(vit.spec, pixels, grid)
    out = vit(pixels, grid)
    assert worst(outputs(out), family.call(tower, rows, grids)) <= 1e-5
    assert len(out.split()) == len(grids) and (grid is None or len(grids) == 2)
