"""Models of the vLLM that is installed: their configs, their loader, and their code that asks a tower."""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import torch

import fused_vit.vllm as plugin
from tests.families import Family

MODELS = {  # family -> module and class of the model that holds the tower
    "Qwen2-VL": ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
    "Qwen2.5-VL": ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    "Qwen3-VL": ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
    "Qwen3-VL-MoE": ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"),
    "Qwen3.5": ("qwen3_5", "Qwen3_5ForConditionalGeneration"),
    "Qwen3.5-MoE": ("qwen3_5", "Qwen3_5MoeForConditionalGeneration"),
    "GLM-4V": ("glm4_1v", "Glm4vForConditionalGeneration"),
    "GLM-4V-MoE": ("glm4_1v", "Glm4vMoeForConditionalGeneration"),
    "Kimi-VL": ("kimi_vl", "KimiVLForConditionalGeneration"),
    "Kimi-K2.5": ("kimi_k25", "KimiK25ForConditionalGeneration"),
}
MOST = 0.02  # of vLLM's own error: 0.20 and 0.23 misplace some frames of GLM's clips, which is no measure for ours


def vllm_config(family: Family, config: Any, hub: dict[str, Any]) -> Any:
    """The config class that this vLLM has of its own for a family, if any."""
    fields = {name.removeprefix("vt_"): value for name, value in hub["vision_config"].items() if name != "model_type"}
    configs = "vllm.transformers_utils.configs."
    if family.name == "Kimi-VL":
        made = importlib.import_module(f"{configs}moonvit").MoonViTConfig(**fields)
        made._attn_implementation = "sdpa"
        return made
    if family.name == "Kimi-K2.5" and importlib.util.find_spec(f"{configs}kimi_k25"):  # up to 0.23
        return importlib.import_module(f"{configs}kimi_k25").KimiK25VisionConfig(**fields)
    return config


def load(tower: Any, weights: dict[str, torch.Tensor]) -> None:
    """As vLLM's loader does: through its AutoWeightsLoader, every parameter accounted for."""
    from vllm.model_executor.models.utils import AutoWeightsLoader

    model = torch.nn.Module()
    model.visual = tower
    loaded = AutoWeightsLoader(model).load_weights((f"visual.{name}", t) for name, t in weights.items())
    assert {name for name, _ in model.named_parameters()} <= loaded
    for module in tower.modules():
        if hasattr(getattr(module, "quant_method", None), "process_weights_after_loading"):
            module.quant_method.process_weights_after_loading(module)


class Projector(torch.nn.Module):
    """Kimi-K2.5's, but for its arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.pre_norm = torch.nn.LayerNorm(1, dtype=torch.bfloat16)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.flatten(1)


def ask(family: Family, tower: Any, pixels: torch.Tensor, grid: list[list[int]], parallel: bool) -> list[torch.Tensor]:
    """Features of every item, by the code of vLLM's model."""
    module, name = MODELS[family.name]
    loaded = importlib.import_module(plugin.MODELS + module)
    rows = torch.tensor(grid)
    patches = pixels.view(-1, 3, 4, 4) if family.name.startswith("Kimi") else pixels
    with torch.inference_mode():
        if family.name == "Kimi-K2.5":
            return list(loaded.vision_tower_forward(tower, patches, rows, Projector(), parallel))
        model = getattr(loaded, name)
        if family.name == "Kimi-VL":
            inputs = {"pixel_values": patches, "image_grid_hws": rows[:, 1:]}
            holder = SimpleNamespace(vision_tower=tower, use_data_parallel=parallel)
            return list(model._process_image_pixels(holder, inputs))
        kind = "video" if grid[0][0] > 1 else "image"
        values = "pixel_values_videos" if kind == "video" else "pixel_values"
        inputs = {"type": values, values: patches, f"{kind}_grid_thw": rows}
        holder = SimpleNamespace(visual=tower, use_data_parallel=parallel)
        return list(getattr(model, f"_process_{kind}_input")(holder, inputs))
