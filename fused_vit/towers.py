"""The table of supported towers: from a Hugging Face config.json to a TowerSpec and the checkpoint's tensor names.

Adding a family is adding a row to TOWERS; nothing outside this file knows a family's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import SpecError
from .spec import AttentionSpec, MergerSpec, MlpSpec, NormSpec, PatchSpec, PositionSpec, RopeSpec, TowerSpec


@dataclass(frozen=True, slots=True)
class Tower:
    """One family: how its config reads, what its checkpoint calls each tensor, which sizes were published."""

    family: str
    model_types: tuple[str, ...]  # of the whole model and of its vision_config
    hf_classes: tuple[str, ...]
    sizes: tuple[str, ...]
    prefixes: tuple[str, ...]  # tried in this order
    names: Mapping[str, str]  # our name of a part -> the checkpoint's, {i} standing for the block
    parse: Callable[[Mapping[str, Any]], TowerSpec]

    def name(self, part: str, i: int = 0) -> str:
        """The checkpoint's name of a tensor, e.g. name('block.qkv.weight', 3) == 'blocks.3.attn.qkv.weight'."""
        module, _, leaf = part.rpartition(".")
        return f"{self.names[module].format(i=i)}.{leaf}"

    def expected(self, spec: TowerSpec) -> dict[str, tuple[int, ...]]:
        """Every tensor of the tower, by the checkpoint's name without prefix, with its shape."""
        return {self.name(part, i): shape for part, i, shape in _tensors(spec)}


def find_tower(config: Mapping[str, Any]) -> Tower:
    """The row of TOWERS for a config.json (whole model or vision part). Raises SpecError with the supported types."""
    seen = [str(c.get("model_type")) for c in (config.get("vision_config"), config) if isinstance(c, Mapping)]
    for model_type in seen:
        for tower in TOWERS:
            if model_type in tower.model_types:
                return tower
    supported = ", ".join(t for tower in TOWERS for t in tower.model_types)
    raise SpecError(f"model_type is {' / '.join(seen) or 'missing'}; supported: {supported}")


def parse_config(config: Mapping[str, Any]) -> TowerSpec:
    """The spec of a config.json (whole model or vision part). Raises SpecError naming the field at fault."""
    tower = find_tower(config)
    vision = config.get("vision_config", config)
    if not isinstance(vision, Mapping):
        raise SpecError(f"vision_config is {type(vision).__name__}; expected an object")
    return tower.parse(vision)


def _tensors(spec: TowerSpec) -> list[tuple[str, int, tuple[int, ...]]]:
    """(part, block, shape) of every tensor, from the spec alone."""
    d, att, merged = spec.width, spec.attention, spec.width * spec.merger.patches
    norm = ("weight", "bias") if spec.norm.kind == "layer" else ("weight",)

    def linear(part: str, i: int, out: int, inp: int, bias: bool = True) -> list[tuple[str, int, tuple[int, ...]]]:
        return [(f"{part}.weight", i, (out, inp))] + ([(f"{part}.bias", i, (out,))] if bias else [])

    patch = spec.patch
    rows: list[tuple[str, int, tuple[int, ...]]] = [
        ("patch_embed.weight", 0, (d, patch.channels, patch.temporal, patch.size, patch.size))
    ]
    if patch.bias:
        rows.append(("patch_embed.bias", 0, (d,)))
    if spec.position:
        rows.append(("position.weight", 0, (spec.position.side**2, d)))
    for i in range(spec.depth):
        rows += [(f"block.norm{n}.{leaf}", i, (d,)) for n in (1, 2) for leaf in norm]
        rows += linear("block.qkv", i, att.qkv_width, d, att.bias)
        rows += linear("block.proj", i, d, att.heads * att.head_dim, att.bias)
        rows += linear("block.fc1", i, spec.mlp.width, d, spec.mlp.bias)
        rows += linear("block.fc2", i, d, spec.mlp.width, spec.mlp.bias)
    mergers = [("merger", 0, d)] + [("deepstack", i, merged) for i in range(len(spec.deepstack))]
    for part, i, normed in mergers:
        rows += [(f"{part}.norm.{leaf}", i, (normed,)) for leaf in norm]
        rows += linear(f"{part}.fc1", i, merged, merged) + linear(f"{part}.fc2", i, spec.merger.out, merged)
    return rows


# --- reading a vision config --------------------------------------------------


def _integer(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = config.get(field, default)
    if isinstance(value, (list, tuple)) and len(set(value)) == 1:  # transformers 5 allows patch_size: [16, 16]
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise SpecError(f"vision_config.{field} is {value!r}; expected a positive integer")
    return value


def _one_of(config: Mapping[str, Any], field: str, supported: Mapping[str, str], default: str) -> str:
    value = config.get(field, default)
    if value not in supported:
        raise SpecError(f"vision_config.{field} is {value!r}; supported: {', '.join(sorted(supported))}")
    return supported[value]


def _theta(config: Mapping[str, Any]) -> float:
    rope = config.get("rope_parameters") or {}
    kind, theta = rope.get("rope_type", "axial"), rope.get("rope_theta", 10000.0)
    if kind not in ("axial", "default"):
        raise SpecError(f"vision_config.rope_parameters.rope_type is {kind!r}; supported: axial, default")
    if not isinstance(theta, (int, float)) or theta <= 1:
        raise SpecError(f"vision_config.rope_parameters.rope_theta is {theta!r}; expected a number above 1")
    return float(theta)


def _parse_qwen3_vl(config: Mapping[str, Any]) -> TowerSpec:
    """transformers Qwen3VLVisionConfig (Qwen3VLVisionModel); norm eps is fixed at 1e-6 in that class."""
    width, heads = _integer(config, "hidden_size", 1152), _integer(config, "num_heads", 16)
    if width % heads or width // heads % 4:
        raise SpecError(
            f"vision_config.hidden_size is {width} with num_heads {heads}; expected equal heads, a multiple of 4 wide"
        )
    positions = _integer(config, "num_position_embeddings", 2304)
    side = math.isqrt(positions)
    if side * side != positions:
        raise SpecError(f"vision_config.num_position_embeddings is {positions}; expected a square such as 2304")
    deepstack = config.get("deepstack_visual_indexes", (8, 16, 24))
    if not isinstance(deepstack, (list, tuple)) or not all(type(i) is int for i in deepstack):
        raise SpecError(f"vision_config.deepstack_visual_indexes is {deepstack!r}; expected a list of block numbers")
    norm = NormSpec("layer", 1e-6)
    return TowerSpec(
        depth=_integer(config, "depth", 27),
        width=width,
        patch=PatchSpec(
            size=_integer(config, "patch_size", 16),
            temporal=_integer(config, "temporal_patch_size", 2),
            channels=_integer(config, "in_channels", 3),
        ),
        position=PositionSpec(side),
        norm=norm,
        attention=AttentionSpec(heads, heads, width // heads),
        rope=RopeSpec(_theta(config)),
        mlp=MlpSpec(
            _integer(config, "intermediate_size", 4304),
            _one_of(config, "hidden_act", {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}, "gelu_pytorch_tanh"),  # type: ignore[arg-type]
        ),
        merger=MergerSpec(_integer(config, "spatial_merge_size", 2), _integer(config, "out_hidden_size", 3584), norm),
        deepstack=tuple(deepstack),
    )


_QWEN3_VL_NAMES = {
    "patch_embed": "patch_embed.proj",
    "position": "pos_embed",
    "block.norm1": "blocks.{i}.norm1",
    "block.norm2": "blocks.{i}.norm2",
    "block.qkv": "blocks.{i}.attn.qkv",
    "block.proj": "blocks.{i}.attn.proj",
    "block.fc1": "blocks.{i}.mlp.linear_fc1",
    "block.fc2": "blocks.{i}.mlp.linear_fc2",
    "merger.norm": "merger.norm",
    "merger.fc1": "merger.linear_fc1",
    "merger.fc2": "merger.linear_fc2",
    "deepstack.norm": "deepstack_merger_list.{i}.norm",
    "deepstack.fc1": "deepstack_merger_list.{i}.linear_fc1",
    "deepstack.fc2": "deepstack_merger_list.{i}.linear_fc2",
}

TOWERS: tuple[Tower, ...] = (
    Tower(
        family="Qwen3-VL",
        model_types=("qwen3_vl", "qwen3_vl_vision"),
        hf_classes=("Qwen3VLVisionModel",),
        sizes=("2B", "4B", "8B", "32B"),
        prefixes=("model.visual.", "visual.", ""),
        names=_QWEN3_VL_NAMES,
        parse=_parse_qwen3_vl,
    ),
    Tower(
        family="Qwen3-VL-MoE",
        model_types=("qwen3_vl_moe", "qwen3_vl_moe_vision"),
        hf_classes=("Qwen3VLMoeVisionModel",),
        sizes=("30B-A3B", "235B-A22B"),
        prefixes=("model.visual.", "visual.", ""),
        names=_QWEN3_VL_NAMES,
        parse=_parse_qwen3_vl,
    ),
)
