"""Weights that are no numbers, or none of the dtype: one error that names every tensor at fault, by the name it has."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fused_vit
from fused_vit.errors import CheckpointError, SpecError
from fused_vit.source import pack
from fused_vit.towers import find_tower, parse_config
from fused_vit.weights.read import reader
from tests.towers_hf import tiny_tower
from tests.weights.hostile import CONFIG, PREFIX, VISION, good_tensors

BAD = {"NaN": math.nan, "Inf": math.inf, "-Inf": -math.inf}
WHOLE: dict[str, Any] = {"model_type": "qwen3_vl", "vision_config": VISION}
FC1 = "blocks.0.mlp.linear_fc1.weight"


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    (folder / CONFIG).write_text(json.dumps(WHOLE))
    save_file(tensors, folder / "model.safetensors")
    return folder


def spoiled(key: str, value: float, at: int) -> dict[str, torch.Tensor]:
    tensors = good_tensors()
    tensors[PREFIX + key].view(-1)[at] = value
    return tensors


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_element_of_any_tensor_is_named(tmp_path: Path, value: str, dtype: torch.dtype) -> None:
    keys = [name.removeprefix(PREFIX) for name in good_tensors()]
    assert len(keys) > 15
    for i, key in enumerate(keys):
        write(tmp_path, spoiled(key, BAD[value], -1 if i % 2 else 0))
        with pytest.raises(CheckpointError) as caught:
            fused_vit.load(tmp_path, device="cpu", dtype=dtype)
        assert f"{tmp_path}: NaN or infinity in 1 tensors: {key}; expected finite" in str(caught.value)


def test_all_are_named_up_to_eight(tmp_path: Path) -> None:
    write(tmp_path, {key: torch.full_like(value, math.nan) for key, value in good_tensors().items()})
    with pytest.raises(CheckpointError) as caught:
        fused_vit.load(tmp_path, device="cpu")
    assert f"in {len(good_tensors())} tensors: patch_embed" in str(caught.value)
    assert f" and {len(good_tensors()) - 8} more;" in str(caught.value)


def test_a_live_module_is_told_the_same() -> None:
    tower = tiny_tower(seed=0)
    with torch.no_grad():
        tower.get_parameter("blocks.1.attn.qkv.bias")[7] = math.nan
    with pytest.raises(SpecError, match=r"NaN or infinity in 1 tensors: blocks\.1\.attn\.qkv\.bias; expected finite"):
        fused_vit.FusedViT.from_module(tower, device="cpu")


@pytest.mark.parametrize("key", [FC1, "blocks.0.attn.proj.weight", "patch_embed.proj.weight", "pos_embed.weight"])
def test_a_number_beyond_the_dtype_is_named(tmp_path: Path, key: str) -> None:
    write(tmp_path, spoiled(key, 1e6, 3))
    with pytest.raises(CheckpointError) as caught:
        fused_vit.load(tmp_path, device="cpu", dtype=torch.float16)
    said = str(caught.value)
    assert f"in 1 tensors: {key}. Give a dtype of a wider range" in said and "float16 (65504.0)" in said
    for dtype in (torch.bfloat16, torch.float32):
        assert fused_vit.load(tmp_path, device="cpu", dtype=dtype).dtype == dtype


def test_a_product_beyond_the_dtype_is_named(tmp_path: Path) -> None:
    """Of a norm's weight and a matmul's, each of which fits."""
    tensors = spoiled(FC1, 6e4, 0)
    tensors[f"{PREFIX}blocks.0.norm2.weight"].fill_(2)
    with pytest.raises(CheckpointError, match=rf"in \d tensors: {FC1}\. Give"):
        fused_vit.load(write(tmp_path, tensors), device="cpu", dtype=torch.float16)


def test_what_stays_in_fp32_may_be_large(tmp_path: Path) -> None:
    write(tmp_path, spoiled("blocks.0.attn.proj.bias", 1e6, 0))
    assert fused_vit.load(tmp_path, device="cpu", dtype=torch.float16).dtype == torch.float16


def test_a_plain_reader_has_its_parts_named() -> None:
    """As of vLLM, which hands tensors over under names of its own."""
    layout, spec = find_tower(WHOLE).layouts[0], parse_config(WHOLE)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in spoiled(FC1, math.nan, 0).items()}
    with pytest.raises(CheckpointError, match=r"the tower: NaN or infinity in 1 tensors: block\.0\.fc1\.weight;"):
        pack(spec, reader(layout, spec, tensors), torch.float32, torch.device("cpu"))
