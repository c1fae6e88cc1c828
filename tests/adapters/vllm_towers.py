"""Towers as vLLM's models build, load and call them, for vLLM's own classes and for those of fake_vllm alike."""

from __future__ import annotations

import importlib
from typing import Any

import torch

import fused_vit.vllm as plugin
from tests.families import FAMILIES, Family, available

MODULES = {
    "Qwen2-VL": "qwen2_vl", "Qwen2.5-VL": "qwen2_5_vl", "Qwen3-VL": "qwen3_vl", "Qwen3-VL-MoE": "qwen3_vl",
    "Qwen3.5": "qwen3_vl", "Qwen3.5-MoE": "qwen3_vl", "GLM-4V": "glm4_1v", "GLM-4V-MoE": "glm4_1v",
    "Kimi-VL": "moonvit", "Kimi-K2.5": "kimi_k25_vit",
}  # fmt: skip
SERVED = [family for family in FAMILIES if family.name in MODULES and available(family)]


def tower_class(family: Family) -> Any:
    module = importlib.import_module(plugin.MODELS + MODULES[family.name])
    return getattr(module, plugin.TOWERS[module.__name__])


def construct(family: Family, config: Any, **changed: Any) -> Any:
    """A tower as vLLM's model of the family builds it."""
    cls = tower_class(family)
    if family.name.startswith("Kimi"):
        return cls(config, **({"prefix": "vision_tower"} | changed))
    head = (None,) if family.name.startswith("GLM") else ()
    eps = 1e-5 if family.name.startswith("GLM") else 1e-6
    return cls(*head, config, **({"norm_eps": eps, "quant_config": None, "prefix": "visual"} | changed))


def weights_of(family: Family, tower: Any) -> dict[str, torch.Tensor]:
    """What vLLM's loader hands to the tower of a checkpoint: the hub's names without prefix."""
    _, state = family.hub(tower)
    prefix = next(p for p in ("model.visual.", "visual.", "vision_tower.") if any(n.startswith(p) for n in state))
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def call(family: Family, tower: Any, pixels: torch.Tensor, grid: list[list[int]], form: str = "tensor") -> Any:
    """A call of the tower as vLLM's model of the family makes it; form: of the grid."""
    rows: Any = grid if form == "lists" else torch.tensor(grid)
    if family.name == "Kimi-VL":
        return tower(pixels.view(-1, 3, 4, 4), rows[:, 1:])
    if family.name == "Kimi-K2.5":
        metadata = tower.encoder.prepare_encoder_metadata(grid, device=pixels.device)
        return tower(pixels.view(-1, 3, 4, 4), grid, encoder_metadata=metadata)
    return tower(pixels, grid_thw=rows)


def expected(family: Family, reference: Any, pixels: torch.Tensor, grid: list[list[int]]) -> torch.Tensor:
    """All rows of a call, deepstack features beside the merged rows."""
    outs = family.call(reference, pixels, grid)[1:]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
