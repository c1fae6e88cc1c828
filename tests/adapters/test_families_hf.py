"""attach in the parent model of every family that has one: the same image features, the same classes and shapes.

Parents touch their tower in their own ways (grids or whole images, pooler_output or hidden_states), so each is asked
through its own get_image_features.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import fused_vit
from fused_vit.errors import SpecError
from tests.towers_hf import randomize

TEXT = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "intermediate_size": 32, "moe_intermediate_size": 16, "num_experts": 2, "num_experts_per_tok": 1,
    "n_routed_experts": 2, "vocab_size": 128, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
AUDIO = {
    "encoder_layers": 1, "d_model": 16, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "num_mel_bins": 8,
    "output_dim": 32, "downsample_hidden_size": 8,
}  # fmt: skip
QWEN = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 52, "out_hidden_size": 32, "patch_size": 4}
WINDOWS = {"window_size": 32, "fullatt_block_indexes": [1]}
POSITIONS = {"num_position_embeddings": 36}
CLIP = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 56, "patch_size": 4}
SIGLIP = {"model_type": "siglip_vision_model", **CLIP, "image_size": 24, "vision_use_head": False}
MROPE = {"rope_scaling": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
GRID = [[1, 10, 14], [1, 4, 4], [1, 2, 8]]


@dataclass(frozen=True)
class Parent:
    """A model class of transformers.models.<module> and its tiny config. kind: how it takes pixels."""

    family: str
    module: str
    config: str
    model: str
    vision: Mapping[str, Any]
    kind: str = "rows"
    text: Mapping[str, Any] = field(default_factory=dict)
    rest: Mapping[str, Any] = field(default_factory=dict)


PARENTS = (
    Parent("Qwen2-VL", "qwen2_vl", "Qwen2VLConfig", "Qwen2VLModel", {**QWEN, "embed_dim": 32}),
    Parent("Qwen2.5-VL", "qwen2_5_vl", "Qwen2_5_VLConfig", "Qwen2_5_VLModel", QWEN | WINDOWS),
    Parent(
        "Qwen2.5-Omni", "qwen2_5_omni", "Qwen2_5OmniThinkerConfig", "Qwen2_5OmniThinkerForConditionalGeneration",
        QWEN | WINDOWS, rest={"audio_config": AUDIO},
    ),
    Parent(
        "Qwen3-VL-MoE", "qwen3_vl_moe", "Qwen3VLMoeConfig", "Qwen3VLMoeModel",
        QWEN | POSITIONS | {"deepstack_visual_indexes": [0]}, text=MROPE,
    ),
    Parent(
        "Qwen3-Omni", "qwen3_omni_moe", "Qwen3OmniMoeThinkerConfig", "Qwen3OmniMoeThinkerForConditionalGeneration",
        QWEN | POSITIONS | {"deepstack_visual_indexes": [0]}, text=MROPE,
        rest={"audio_config": AUDIO},
    ),
    Parent("Qwen3.5", "qwen3_5", "Qwen3_5Config", "Qwen3_5Model", QWEN | POSITIONS),
    Parent("Qwen3.5-MoE", "qwen3_5_moe", "Qwen3_5MoeConfig", "Qwen3_5MoeModel", QWEN | POSITIONS),
    Parent("Qwen4-Exp", "qwen4_exp", "Qwen4ExpConfig", "Qwen4ExpModel", QWEN | POSITIONS),
    Parent("GLM-4V", "glm4v", "Glm4vConfig", "Glm4vModel", QWEN | {"image_size": 24}),
    Parent("GLM-4V-MoE", "glm4v_moe", "Glm4vMoeConfig", "Glm4vMoeModel", QWEN | {"image_size": 24}),
    Parent("GLM-OCR", "glm_ocr", "GlmOcrConfig", "GlmOcrModel", QWEN),
    Parent(
        "GLM-5.3-Flash", "glm5_next", "Glm5NextConfig", "Glm5NextModel",
        QWEN | {"projection_intermediate_size": 40, "swiglu_limit": 0.5}, text={"num_key_value_heads": 2},
    ),
    Parent(
        "Kimi-K2.5", "kimi_k25", "Kimi_K25Config", "Kimi_K25Model", CLIP | {"pos_emb_height": 6, "pos_emb_width": 6},
        "patches", rest={"projection_hidden_size": 32},
    ),
    Parent(
        "PaddleOCR-VL", "paddleocr_vl", "PaddleOCRVLConfig", "PaddleOCRVLModel", CLIP | {"image_size": 24}, "patches"
    ),
    Parent(
        "ERNIE-4.5-VL", "ernie4_5_vl_moe", "Ernie4_5_VLMoeConfig", "Ernie4_5_VLMoeModel", QWEN,
        text={
            "moe_intermediate_size": [16, 16], "moe_num_experts": 2, "moe_k": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 4]},
        },
    ),
    Parent(
        "EXAONE-4.5", "exaone4_5", "Exaone4_5_Config", "Exaone4_5_Model",
        QWEN | WINDOWS | {"hidden_size": 64, "num_heads": 4, "num_key_value_heads": 2},
    ),
    Parent(
        "InternVL", "internvl", "InternVLConfig", "InternVLModel",
        {**CLIP, "model_type": "internvl_vision", "patch_size": [4, 4], "image_size": [24, 24], "attention_bias": True},
        "images",
    ),
    Parent("SigLIP", "gemma3", "Gemma3Config", "Gemma3Model", SIGLIP, "images", rest={"mm_tokens_per_image": 9}),
    Parent(
        "SigLIP", "llava_onevision", "LlavaOnevisionConfig", "LlavaOnevisionModel", SIGLIP, "tiles",
        rest={"image_grid_pinpoints": [[24, 24], [24, 48]]},
    ),
)  # fmt: skip


def build(parent: Parent) -> nn.Module:
    try:
        modeling = importlib.import_module(f"transformers.models.{parent.module}.modeling_{parent.module}")
    except ImportError:
        pytest.skip(f"transformers has no {parent.module}")
    configuration = importlib.import_module(f"transformers.models.{parent.module}.configuration_{parent.module}")
    config = getattr(configuration, parent.config)(
        vision_config=dict(parent.vision), text_config=TEXT | parent.text, **parent.rest
    )
    config._attn_implementation = "sdpa"
    model: nn.Module = randomize(getattr(modeling, parent.model)(config), 0)
    return model


def call(parent: Parent, model: Any) -> dict[str, Any]:
    """Arguments of get_image_features."""
    generator = torch.Generator().manual_seed(1)
    if parent.kind == "images":
        return {"pixel_values": torch.randn(2, 3, 24, 24, generator=generator)}
    if parent.kind == "tiles":
        pixels = torch.randn(2, 3, 3, 24, 24, generator=generator)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[24, 48], [24, 48]])}
    rows = sum(t * h * w for t, h, w in GRID)
    frames = 1 if parent.kind == "patches" or "ernie" in parent.module else 2
    pixels = torch.randn(rows, 3 * frames * 4 * 4, generator=generator)
    if parent.kind == "patches":
        pixels = pixels.view(rows, 3, 4, 4)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor(GRID)}


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)


@pytest.mark.parametrize("parent", PARENTS, ids=[f"{p.family}-{p.module}" for p in PARENTS])
def test_image_features_are_the_same_and_detach_restores(parent: Parent) -> None:
    model = build(parent)
    arguments = call(parent, model)
    before = dict(model.named_modules())
    with torch.no_grad():
        want = model.get_image_features(**arguments)  # type: ignore[operator]
        encoder = fused_vit.attach(model)
        got = model.get_image_features(**arguments)  # type: ignore[operator]
    assert encoder.stats()["calls"] > 0 and type(got) is type(want)
    if isinstance(want, Mapping):  # hidden states of single layers do not exist
        want, got = ({k: v for k, v in out.items() if k not in ("hidden_states", "attentions")} for out in (want, got))
        assert list(got) == list(want)
    pairs = list(zip(tensors(got), tensors(want), strict=True))
    assert pairs and all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    assert max(float((a - b).norm() / b.norm()) for a, b in pairs) <= 2e-5
    fused_vit.detach(model)
    assert all(module is before[name] for name, module in model.named_modules())


def test_a_parent_that_reads_earlier_layers_is_refused() -> None:
    parent = next(p for p in PARENTS if p.module == "llava_onevision")
    model = build(parent)
    model.config.vision_feature_layer = -2  # type: ignore[union-attr]
    with pytest.raises(SpecError, match="vision_feature_layer is -2; supported: -1"):
        fused_vit.attach(model)
