"""The table of supported towers: from a Hugging Face config.json to a TowerSpec and the checkpoint's tensor names.

Adding a family is adding a row to TOWERS; nothing outside this file knows a family's name. docs/families.md shows how.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from .errors import SpecError
from .layouts import Layout, conv_merger, conv_patches
from .spec import (
    AttentionSpec,
    ConvMergerSpec,
    MergerSpec,
    MlpSpec,
    NormSpec,
    PatchSpec,
    PoolSpec,
    PositionSpec,
    RopeSpec,
    TowerSpec,
    WindowSpec,
)

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Projector:
    """A model's own merger behind the tower: on request it runs in the same plan. parse(whole config) -> its spec."""

    layout: Layout
    parse: Callable[[Config], MergerSpec]


@dataclass(frozen=True, slots=True)
class Tower:
    """One family: how its config reads, what its checkpoints call each tensor, which sizes were published."""

    family: str
    model_types: tuple[str, ...]  # of the whole model and of its vision_config
    hf_classes: tuple[str, ...]
    sizes: tuple[str, ...]
    layouts: tuple[Layout, ...]  # the first is transformers' own module
    parse: Callable[[Config], TowerSpec]
    pixels: Literal["rows", "patches", "batch", "images"] = "rows"  # as transformers' class takes them
    video: bool = True
    projector: Projector | None = None
    notes: str = ""


def find_tower(config: Config) -> Tower:
    """The row of TOWERS for a config.json (whole model or vision part). Raises SpecError with the supported types."""
    seen = [str(part.get("model_type")) for part in (config, vision_config(config)) if part.get("model_type")]
    for model_type in seen:
        for tower in TOWERS:
            if model_type in tower.model_types:
                return tower
    supported = ", ".join(sorted({t for tower in TOWERS for t in tower.model_types}))
    raise SpecError(f"model_type is {' / '.join(dict.fromkeys(seen)) or 'missing'}; supported: {supported}")


def vision_config(config: Config) -> Config:
    """The part of a config.json that describes the tower: config itself if it is only that."""
    whole = config.get("thinker_config", config)
    vision = whole.get("vision_config", whole) if isinstance(whole, Mapping) else whole
    if not isinstance(vision, Mapping):
        raise SpecError(f"vision_config is {type(vision).__name__}; expected an object")
    return vision


def parse_config(config: Config, *, projector: bool = False) -> TowerSpec:
    """The spec of a config.json (whole model or vision part). Raises SpecError naming the field at fault.

    projector: with the model's own merger behind the tower, where the family has one.
    """
    tower = find_tower(config)
    spec = tower.parse(vision_config(config))
    if not projector:
        return spec
    if tower.projector is None:
        having = ", ".join(row.family for row in TOWERS if row.projector)
        raise SpecError(f"projector=True, but {tower.family} has none; these families do: {having}")
    return replace(spec, merger=PoolSpec(tower.projector.parse(config)))


# --- reading a vision config --------------------------------------------------

LARGEST = 1 << 24  # of any number in a config: far above every tower, and products of a few stay exact floats


def _integer(config: Config, field: str, default: int | None = None) -> int:
    value = config.get(field, default)
    if isinstance(value, (list, tuple)) and value and all(v == value[0] for v in value):
        value = value[0]  # transformers 5 allows patch_size: [16, 16]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LARGEST:
        raise SpecError(f"vision_config.{field} is {value!r}; expected a positive integer up to {LARGEST}")
    return value


def _first(config: Config, *fields: str) -> str:
    """The first of several names of a field that the config has: hubs and transformers differ."""
    return next((field for field in fields if field in config), fields[0])


def _number(config: Config, field: str, default: float) -> float:
    value = config.get(field, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= LARGEST:
        raise SpecError(f"vision_config.{field} is {value!r}; expected a positive number up to {LARGEST}")
    return float(value)


def _flag(config: Config, field: str, default: bool) -> bool:
    value = config.get(field, default)
    if not isinstance(value, bool):
        raise SpecError(f"vision_config.{field} is {value!r}; expected true or false")
    return value


def _blocks(config: Config, field: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value = config.get(field, default)
    if not isinstance(value, (list, tuple)) or not all(type(i) is int for i in value):
        raise SpecError(f"vision_config.{field} is {value!r}; expected a list of block numbers")
    return tuple(value)


def _only(config: Config, field: str, supported: object, default: object = None) -> None:
    """A field for which there is one supported value."""
    value = config.get(field, supported if default is None else default)
    if value != supported:
        raise SpecError(f"vision_config.{field} is {value!r}; supported: {supported!r}")


ACTIVATIONS: Mapping[str, Any] = {
    "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu", "silu": "silu",
}  # fmt: skip


def _activation(config: Config, default: str) -> Any:
    value = config.get("hidden_act", default)
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise SpecError(f"vision_config.hidden_act is {value!r}; supported: {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[value]


def _theta(config: Config) -> float:
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise SpecError(f"vision_config.rope_parameters is {rope!r}; expected an object")
    kind, theta = rope.get("rope_type", "axial"), rope.get("rope_theta", 10000.0)
    if kind not in ("axial", "default"):
        raise SpecError(f"vision_config.rope_parameters.rope_type is {kind!r}; supported: axial, default")
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 1 < theta < 1e30:
        raise SpecError(f"vision_config.rope_parameters.rope_theta is {theta!r}; expected a number above 1")
    return float(theta)


def _attention(width: int, heads: int, kv_heads: int = 0, multiple: int = 4, **rest: Any) -> AttentionSpec:
    """Heads that share the width, as every family so far has them. multiple: rotary halves need 4."""
    if width % heads or width // heads % multiple:
        raise SpecError(
            f"vision_config.hidden_size is {width} with {heads} heads; expected equal heads, each {multiple}n wide"
        )
    return AttentionSpec(heads, kv_heads or heads, width // heads, **rest)


def _side(config: Config, field: str, positions: int) -> int:
    side = math.isqrt(positions)
    if side * side != positions:
        raise SpecError(f"vision_config.{field} is {positions}; expected a square such as 2304")
    return side


def _patch(config: Config, size: int, bias: bool, **rest: Any) -> PatchSpec:
    """Qwen's and GLM's patches of two frames, rows in merge blocks."""
    return PatchSpec(
        size=_integer(config, "patch_size", size),
        temporal=_integer(config, "temporal_patch_size", 2),
        channels=_integer(config, "in_channels", 3),
        bias=bias,
        **rest,
    )


LN6, RMS6 = NormSpec("layer", 1e-6), NormSpec("rms", 1e-6)


def _parse_qwen2_vl(config: Config) -> TowerSpec:
    """transformers Qwen2VLVisionConfig: hidden_size is the language model's width; norm eps is fixed at 1e-6."""
    width = _integer(config, "embed_dim", 1280)
    return TowerSpec(
        depth=_integer(config, "depth", 32),
        width=width,
        patch=_patch(config, 14, bias=False),
        position=None,
        norm=LN6,
        attention=_attention(width, _integer(config, "num_heads", 16)),
        rope=RopeSpec(_theta(config)),
        mlp=MlpSpec(int(width * _number(config, "mlp_ratio", 4)), _activation(config, "quick_gelu")),
        merger=MergerSpec(_integer(config, "hidden_size", 3584), LN6),
        merge=_integer(config, "spatial_merge_size", 2),
    )


def _parse_qwen2_5_vl(config: Config) -> TowerSpec:
    """transformers Qwen2_5_VLVisionConfig, and Exaone4_5_VisionConfig, which adds num_key_value_heads."""
    width, heads = _integer(config, "hidden_size", 1280), _integer(config, "num_heads", 16)
    patch = _patch(config, 14, bias=False)
    window = _integer(config, "window_size", 112)
    if window % patch.size:
        raise SpecError(f"vision_config.window_size is {window}; expected a multiple of patch_size ({patch.size})")
    windows = WindowSpec(window // patch.size, _blocks(config, "fullatt_block_indexes", (7, 15, 23, 31)))
    kv_heads = _integer(config, "num_key_value_heads", heads)
    return TowerSpec(
        depth=_integer(config, "depth", 32),
        width=width,
        patch=patch,
        position=None,
        norm=RMS6,
        attention=_attention(width, heads, kv_heads, windows=windows),
        rope=RopeSpec(_theta(config)),
        mlp=MlpSpec(_integer(config, "intermediate_size", 3420), _activation(config, "silu"), gated=True),
        merger=MergerSpec(_integer(config, "out_hidden_size", 3584), RMS6),
        merge=_integer(config, "spatial_merge_size", 2),
    )


def _parse_exaone(config: Config) -> TowerSpec:
    return _parse_qwen2_5_vl({"num_key_value_heads": 8, **config})


def _parse_qwen3_vl(config: Config) -> TowerSpec:
    """transformers Qwen3VLVisionConfig (Qwen3VLVisionModel); norm eps is fixed at 1e-6 in that class."""
    width = _integer(config, "hidden_size", 1152)
    positions = _integer(config, "num_position_embeddings", 2304)
    return TowerSpec(
        depth=_integer(config, "depth", 27),
        width=width,
        patch=_patch(config, 16, bias=True),
        position=PositionSpec(_side(config, "num_position_embeddings", positions)),
        norm=LN6,
        attention=_attention(width, _integer(config, "num_heads", 16)),
        rope=RopeSpec(_theta(config)),
        mlp=MlpSpec(_integer(config, "intermediate_size", 4304), _activation(config, "gelu_pytorch_tanh")),
        merger=MergerSpec(_integer(config, "out_hidden_size", 3584), LN6),
        merge=_integer(config, "spatial_merge_size", 2),
        deepstack=_blocks(config, "deepstack_visual_indexes", (8, 16, 24)),
    )


def _parse_qwen3_5(config: Config) -> TowerSpec:
    """transformers Qwen3_5VisionConfig: Qwen3-VL's tower without deepstack."""
    return _parse_qwen3_vl({"deepstack_visual_indexes": (), **config})


def _parse_glm4v(config: Config) -> TowerSpec:
    """transformers Glm4vVisionConfig: blocks' MLPs are out_hidden_size wide, the merger's intermediate_size."""
    width, out = _integer(config, "hidden_size", 1536), _integer(config, "out_hidden_size", 4096)
    norm, act = NormSpec("rms", _number(config, "rms_norm_eps", 1e-5)), _activation(config, "silu")
    patch = _patch(config, 14, bias=True, norm=norm)
    positions = (_integer(config, "image_size", 336) // patch.size) ** 2
    bias = _flag(config, "attention_bias", False)
    return TowerSpec(
        depth=_integer(config, "depth", 24),
        width=width,
        patch=patch,
        position=PositionSpec(_side(config, "image_size", positions), "bicubic", align_corners=False),
        norm=norm,
        attention=_attention(width, _integer(config, "num_heads", 12), bias=bias),
        rope=RopeSpec(_theta(config)),
        mlp=MlpSpec(out, act, gated=True, bias=False),
        merger=ConvMergerSpec(
            out, norm, MlpSpec(_integer(config, "intermediate_size", 13696), act, gated=True, bias=False)
        ),
        merge=_integer(config, "spatial_merge_size", 2),
    )


def _parse_glm_ocr(config: Config) -> TowerSpec:
    """transformers GlmOcrVisionConfig; with swiglu_limit and projection_intermediate_size Glm5NextVisionConfig."""
    width, out = _integer(config, "hidden_size", 1024), _integer(config, "out_hidden_size", 1536)
    norm, act = NormSpec("rms", _number(config, "rms_norm_eps", 1e-5)), _activation(config, "silu")
    limit = _number(config, "swiglu_limit", 10.0) if "swiglu_limit" in config else None
    patch, bias = _patch(config, 14, bias=True), _flag(config, "attention_bias", True)
    context = _integer(config, "projection_intermediate_size", out * patch.channels)
    return TowerSpec(
        depth=_integer(config, "depth", 24),
        width=width,
        patch=patch,
        position=None,
        norm=norm,
        attention=_attention(width, _integer(config, "num_heads", 16), bias=bias, qk_norm=norm),
        rope=RopeSpec(_theta(config)),
        mlp=MlpSpec(_integer(config, "intermediate_size", 4096), act, gated=True, limit=limit),
        merger=ConvMergerSpec(out, norm, MlpSpec(context, act, gated=True, bias=False, limit=limit)),
        merge=_integer(config, "spatial_merge_size", 2),
    )


def _parse_glm5(config: Config) -> TowerSpec:
    return _parse_glm_ocr({"swiglu_limit": 10.0, "projection_intermediate_size": 10240, **config})


def _parse_moonvit(config: Config) -> TowerSpec:
    """MoonViT (arXiv 2504.07491): the hub's MoonViTConfig; Kimi_K25VisionConfig under the hub's names or its own."""
    width = _integer(config, _first(config, "vt_hidden_size", "hidden_size"), 1152)
    heads = _integer(config, _first(config, "vt_num_attention_heads", "num_attention_heads"), 16)
    high, wide = (
        _integer(config, _first(config, f"init_pos_emb_{side}", f"pos_emb_{side}"), 64) for side in ("height", "width")
    )
    if high != wide:
        raise SpecError(f"vision_config.init_pos_emb_height x width is {high} x {wide}; supported: squares")
    frames = _first(config, "init_pos_emb_time", "pos_emb_time")
    norm = NormSpec("layer", 1e-5)
    return TowerSpec(
        depth=_integer(config, _first(config, "vt_num_hidden_layers", "num_hidden_layers"), 27),
        width=width,
        patch=PatchSpec(_integer(config, "patch_size", 14), order="raster"),
        position=PositionSpec(high, "bicubic", False, _integer(config, frames) if frames in config else 0),
        norm=norm,
        attention=_attention(width, heads, segments="clip"),
        rope=RopeSpec(_theta(config), "w_h_interleaved"),
        mlp=MlpSpec(
            _integer(config, _first(config, "vt_intermediate_size", "intermediate_size"), 4304),
            _activation(config, "gelu_pytorch_tanh"),
        ),
        merger=PoolSpec(),
        merge=_integer(config, "merge_kernel_size", 2),
        final_norm=norm,
    )


def _parse_kimi_k25(config: Config) -> TowerSpec:
    _only(config, "merge_type", "sd2_tpool")
    _only(config, "pos_emb_type", "divided_fixed")
    return _parse_moonvit({_first(config, "init_pos_emb_time", "pos_emb_time"): 4, **config})


def _parse_moonvit_projector(config: Config) -> MergerSpec:
    """KimiVLMultiModalProjector, Kimi_K25MultimodalProjection: as wide as the language model."""
    text = config.get("text_config")
    if not isinstance(text, Mapping) or type(text.get("hidden_size")) is not int:
        raise SpecError("text_config.hidden_size is missing; a projector needs the config.json of the whole model")
    eps = _number(vision_config(config), "projector_ln_eps", 1e-5)
    return MergerSpec(text["hidden_size"], NormSpec("layer", eps))


def _parse_paddleocr(config: Config) -> TowerSpec:
    """transformers PaddleOCRVisionConfig; positions as that class reads them (align_corners)."""
    norm = NormSpec("layer", _number(config, "layer_norm_eps", 1e-6))
    size = _integer(config, "patch_size", 14)
    return TowerSpec(
        **_plain(config, (1152, 27, 16, 4304), norm, rotary=True),
        patch=PatchSpec(size, channels=_integer(config, "num_channels", 3), order="raster"),
        position=PositionSpec(_integer(config, "image_size", 384) // size, align_corners=_paddle_align_corners()),
        rope=RopeSpec(_theta(config)),
    )


def _plain(config: Config, defaults: tuple[int, int, int, int], norm: NormSpec, rotary: bool = False) -> dict[str, Any]:
    """The fields that CLIP's descendants share: rows in raster order, no merger, a norm at the end."""
    width = _integer(config, "hidden_size", defaults[0])
    heads = _integer(config, "num_attention_heads", defaults[2])
    return {
        "depth": _integer(config, "num_hidden_layers", defaults[1]),
        "width": width,
        "norm": norm,
        "attention": _attention(width, heads, multiple=4 if rotary else 1),
        "mlp": MlpSpec(_integer(config, "intermediate_size", defaults[3]), _activation(config, "gelu_pytorch_tanh")),
        "merger": None,
        "merge": 1,
        "final_norm": norm,
    }


def _paddle_align_corners() -> bool:
    """transformers before 5.23 reads PaddleOCR-VL's positions with aligned corners, unlike the hub's code."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        major, minor = version("transformers").split(".")[:2]
    except PackageNotFoundError:
        return False
    return (int(major), int(minor)) < (5, 23)


def _parse_ernie(config: Config) -> TowerSpec:
    """transformers Ernie4_5_VLMoeVisionConfig: Qwen2-VL's blocks without merger; the resampler stays outside."""
    width = _integer(config, _first(config, "hidden_size", "embed_dim"), 1280)
    norm = NormSpec("layer", _number(config, "rms_norm_eps", 1e-6))
    ratio = _number(config, "mlp_ratio", 4)
    return TowerSpec(
        depth=_integer(config, "depth", 32),
        width=width,
        patch=PatchSpec(
            _integer(config, "patch_size", 14),
            channels=_integer(config, _first(config, "in_channels", "in_chans"), 3),
            bias=False,
        ),
        position=None,
        norm=norm,
        attention=_attention(width, _integer(config, "num_heads", 16)),
        rope=RopeSpec(_theta(config)),
        mlp=MlpSpec(_integer(config, "intermediate_size", int(width * ratio)), _activation(config, "quick_gelu")),
        merger=None,
        merge=_integer(config, "spatial_merge_size", 2),
        final_norm=norm,
    )


def _parse_siglip(config: Config) -> TowerSpec:
    """transformers SiglipVisionConfig, without its attention-pooling head."""
    norm = NormSpec("layer", _number(config, "layer_norm_eps", 1e-6))
    size = _integer(config, "patch_size", 16)
    return TowerSpec(
        **_plain(config, (768, 12, 12, 3072), norm),
        patch=PatchSpec(size, channels=_integer(config, "num_channels", 3), order="raster"),
        position=PositionSpec(_integer(config, "image_size", 224) // size, "bicubic", align_corners=False),
        rope=None,
    )


def _parse_internvit(config: Config) -> TowerSpec:
    """transformers InternVLVisionConfig, the hub's InternVisionConfig (300M: the 6B has a q/k norm over all heads)."""
    if config.get("use_qk_norm", config.get("qk_normalization", False)):
        raise SpecError("vision_config.use_qk_norm is true, over all heads at once; supported: false (InternViT-300M)")
    kind = config.get("norm_type", "layer_norm")
    if kind not in ("layer_norm", "rms_norm"):
        raise SpecError(f"vision_config.norm_type is {kind!r}; supported: layer_norm, rms_norm")
    norm = NormSpec("layer" if kind == "layer_norm" else "rms", _number(config, "layer_norm_eps", 1e-6))
    _only(config, "use_mean_pooling", True)
    _only(config, "use_absolute_position_embeddings", True)
    if not config.get("qkv_bias", config.get("attention_bias", False)):
        raise SpecError("vision_config.attention_bias is false; supported: true, as in every published InternViT-300M")
    size = _integer(config, "patch_size", 14)
    return replace(
        TowerSpec(
            **_plain({"hidden_act": "gelu", **config}, (1024, 24, 16, 4096), norm),
            patch=PatchSpec(size, channels=_integer(config, "num_channels", 3), order="raster"),
            position=PositionSpec(_integer(config, "image_size", 448) // size, "bicubic", align_corners=False),
            rope=None,
            class_token=True,
            layer_scale=True,
        ),
        final_norm=None,
    )


# --- what checkpoints call the parts ---

Names = dict[str, str | tuple[str, ...]]

_BLOCK: Names = {
    "block.norm1": "blocks.{i}.norm1",
    "block.norm2": "blocks.{i}.norm2",
    "block.proj": "blocks.{i}.attn.proj",
}
_QKV: Names = {"block.qkv": "blocks.{i}.attn.qkv"}
_PATCH: Names = {"patch_embed": "patch_embed.proj"}
_FC: Names = {"block.fc1": "blocks.{i}.mlp.fc1", "block.fc2": "blocks.{i}.mlp.fc2"}
_GATED: Names = {
    "block.fc1": ("blocks.{i}.mlp.gate_proj", "blocks.{i}.mlp.up_proj"), "block.fc2": "blocks.{i}.mlp.down_proj",
}  # fmt: skip
_QWEN2_MERGER: Names = {"merger.norm": "merger.ln_q", "merger.fc1": "merger.mlp.0", "merger.fc2": "merger.mlp.2"}
_CONV = {"patch_embed.weight": conv_patches}

_QWEN2 = Layout(("visual.", "model.visual.", ""), {**_PATCH, **_BLOCK, **_QKV, **_FC, **_QWEN2_MERGER}, _CONV)
_QWEN2_5 = replace(_QWEN2, names={**_QWEN2.names, **_GATED})
_QWEN2_5_OMNI = Layout(
    ("thinker.visual.", "visual.", ""),
    {**_QWEN2_5.names, "block.qkv": tuple(f"blocks.{{i}}.attn.{n}" for n in "qkv")},
    _CONV,
)
_QWEN3_BLOCKS: Names = {
    **_PATCH, **_BLOCK, **_QKV, "position": "pos_embed",
    "block.fc1": "blocks.{i}.mlp.linear_fc1", "block.fc2": "blocks.{i}.mlp.linear_fc2",
}  # fmt: skip
_QWEN3 = Layout(
    ("model.visual.", "visual.", ""),
    {
        **_QWEN3_BLOCKS,
        "merger.norm": "merger.norm", "merger.fc1": "merger.linear_fc1", "merger.fc2": "merger.linear_fc2",
        "deepstack.norm": "deepstack_merger_list.{i}.norm",
        "deepstack.fc1": "deepstack_merger_list.{i}.linear_fc1",
        "deepstack.fc2": "deepstack_merger_list.{i}.linear_fc2",
    },
    _CONV,
)  # fmt: skip
_QWEN3_OMNI = Layout(
    ("thinker.visual.", "visual.", ""),
    {
        **_QWEN3_BLOCKS, **_QWEN2_MERGER,
        "deepstack.norm": "merger_list.{i}.ln_q",
        "deepstack.fc1": "merger_list.{i}.mlp.0", "deepstack.fc2": "merger_list.{i}.mlp.2",
    },
    _CONV,
)  # fmt: skip
_GLM = Layout(
    ("model.visual.", "visual.", ""),
    {
        **_PATCH, **_BLOCK, **_QKV, **_GATED,
        "patch_norm": "post_conv_layernorm", "position": "embeddings.position_embedding",
        "block.q_norm": "blocks.{i}.attn.q_norm", "block.k_norm": "blocks.{i}.attn.k_norm",
        "merger.norm": "post_layernorm", "merger.down": "downsample", "merger.proj": "merger.proj",
        "merger.post_norm": "merger.post_projection_norm",
        "merger.fc1": ("merger.gate_proj", "merger.up_proj"), "merger.fc2": "merger.down_proj",
    },
    _CONV | {"merger.down.weight": conv_merger},
)  # fmt: skip


def _grid_positions(spec: TowerSpec) -> tuple[int, ...]:
    assert spec.position is not None
    return (spec.position.side, spec.position.side, spec.width)


def _one_row_more(spec: TowerSpec) -> tuple[int, ...]:
    assert spec.position is not None
    return (1, spec.position.side**2 + 1, spec.width)


_KIMI_SHAPES = _CONV | {"position.weight": _grid_positions}
_MOONVIT = Layout(
    ("vision_tower.", "model.vision_tower.", ""),
    {
        **_PATCH, "position": "patch_embed.pos_emb",
        "block.norm1": "encoder.blocks.{i}.norm0", "block.norm2": "encoder.blocks.{i}.norm1",
        "block.qkv": "encoder.blocks.{i}.wqkv", "block.proj": "encoder.blocks.{i}.wo",
        "block.fc1": "encoder.blocks.{i}.mlp.fc0", "block.fc2": "encoder.blocks.{i}.mlp.fc1",
        "final_norm": "encoder.final_layernorm",
    },
    _KIMI_SHAPES,
    even_odd=True,
    unused=("patch_embed.pos_emb.time_weight",),
)  # fmt: skip
_KIMI_K25 = Layout(
    ("model.vision_tower.", "vision_tower.", ""),
    {
        **_PATCH, "position.weight": "patch_embed.pos_emb.position_embeddings",
        "block.norm1": "layers.{i}.norm1", "block.norm2": "layers.{i}.norm2",
        "block.qkv": tuple(f"layers.{{i}}.attn.{n}_proj" for n in "qkv"), "block.proj": "layers.{i}.attn.proj",
        "block.fc1": "layers.{i}.mlp.fc1", "block.fc2": "layers.{i}.mlp.fc2", "final_norm": "final_layernorm",
    },
    _KIMI_SHAPES,
)  # fmt: skip
_KIMI_VL_PROJECTOR = Projector(
    Layout(
        ("multi_modal_projector.",), {"merger.norm": "pre_norm", "merger.fc1": "linear_1", "merger.fc2": "linear_2"}
    ),
    _parse_moonvit_projector,
)
_KIMI_K25_PROJECTOR = Projector(
    Layout(("mm_projector.",), {"merger.norm": "pre_norm", "merger.fc1": "proj.0", "merger.fc2": "proj.2"}),
    _parse_moonvit_projector,
)
_SIGLIP_NAMES: Names = {
    "patch_embed": "embeddings.patch_embedding", "position": "embeddings.position_embedding",
    "block.norm1": "encoder.layers.{i}.layer_norm1", "block.norm2": "encoder.layers.{i}.layer_norm2",
    "block.qkv": tuple(f"encoder.layers.{{i}}.self_attn.{n}_proj" for n in "qkv"),
    "block.proj": "encoder.layers.{i}.self_attn.out_proj",
    "block.fc1": "encoder.layers.{i}.mlp.fc1", "block.fc2": "encoder.layers.{i}.mlp.fc2",
    "final_norm": "post_layernorm",
}  # fmt: skip
_SIGLIP = Layout(
    (
        "vision_tower.vision_model.", "model.vision_tower.vision_model.", "vision_tower.", "model.vision_tower.",
        "vision_model.", "",
    ),
    _SIGLIP_NAMES, _CONV, unused=("head.",),
)  # fmt: skip
_PADDLEOCR = Layout(
    ("visual.vision_model.", "model.visual.vision_model.", "vision_model.", ""),
    _SIGLIP_NAMES, _CONV, unused=("head.", "embeddings.packing_position_embedding."),
)  # fmt: skip
_ERNIE = Layout(
    ("vision_model.", "model.vision_model.", "model.vision_tower.", "vision_tower.", ""),
    {**_PATCH, **_BLOCK, **_QKV, **_FC, "final_norm": "ln"},
)
_CLASS_SHAPES = _CONV | {"class_token": lambda spec: (1, 1, spec.width), "position.weight": _one_row_more}
_INTERNVL = Layout(
    ("vision_tower.", "model.vision_tower.", ""),
    {
        "patch_embed": "embeddings.patch_embeddings.projection", "class_token": "embeddings.cls_token",
        "position.weight": "embeddings.position_embeddings",
        "block.norm1": "encoder.layer.{i}.layernorm_before", "block.norm2": "encoder.layer.{i}.layernorm_after",
        "block.qkv": tuple(f"encoder.layer.{{i}}.attention.{n}_proj" for n in "qkv"),
        "block.proj": "encoder.layer.{i}.attention.projection_layer",
        "block.scale1": "encoder.layer.{i}.lambda_1", "block.scale2": "encoder.layer.{i}.lambda_2",
        "block.fc1": "encoder.layer.{i}.mlp.fc1", "block.fc2": "encoder.layer.{i}.mlp.fc2",
    },
    _CLASS_SHAPES,
)  # fmt: skip
_INTERNVIT = Layout(
    ("vision_model.", ""),
    {
        "patch_embed": "embeddings.patch_embedding", "class_token": "embeddings.class_embedding",
        "position.weight": "embeddings.position_embedding",
        "block.norm1": "encoder.layers.{i}.norm1", "block.norm2": "encoder.layers.{i}.norm2",
        "block.qkv": "encoder.layers.{i}.attn.qkv", "block.proj": "encoder.layers.{i}.attn.proj",
        "block.scale1": "encoder.layers.{i}.ls1", "block.scale2": "encoder.layers.{i}.ls2",
        "block.fc1": "encoder.layers.{i}.mlp.fc1", "block.fc2": "encoder.layers.{i}.mlp.fc2",
    },
    _CLASS_SHAPES,
)  # fmt: skip

TOWERS: tuple[Tower, ...] = (
    Tower(
        "Qwen2-VL", ("qwen2_vl", "qwen2_vl_vision"), ("Qwen2VisionTransformerPretrainedModel",),
        ("2B", "7B", "72B"), (_QWEN2,), _parse_qwen2_vl,
    ),
    Tower(
        "Qwen2.5-VL", ("qwen2_5_vl", "qwen2_5_vl_vision"), ("Qwen2_5_VisionTransformerPretrainedModel",),
        ("3B", "7B", "32B", "72B", "MiMo-VL-7B"), (_QWEN2_5,), _parse_qwen2_5_vl,
        notes="last_hidden_state is in window order, as in transformers",
    ),
    Tower(
        "Qwen2.5-Omni",
        ("qwen2_5_omni", "qwen2_5_omni_thinker", "qwen2_5_omni_vision_encoder"), ("Qwen2_5OmniVisionEncoder",),
        ("3B", "7B"), (_QWEN2_5_OMNI,), _parse_qwen2_5_vl,
        notes="last_hidden_state is in window order, as in transformers",
    ),
    Tower(
        "Qwen3-VL", ("qwen3_vl", "qwen3_vl_vision"), ("Qwen3VLVisionModel",),
        ("2B", "4B", "8B", "32B"), (_QWEN3,), _parse_qwen3_vl,
    ),
    Tower(
        "Qwen3-VL-MoE", ("qwen3_vl_moe", "qwen3_vl_moe_vision"), ("Qwen3VLMoeVisionModel",),
        ("30B-A3B", "235B-A22B"), (_QWEN3,), _parse_qwen3_vl,
    ),
    Tower(
        "Qwen3-Omni",
        ("qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_omni_moe_vision_encoder"), ("Qwen3OmniMoeVisionEncoder",),
        ("30B-A3B",), (_QWEN3_OMNI,), _parse_qwen3_vl,
    ),
    Tower(
        "Qwen3.5", ("qwen3_5", "qwen3_5_vision"), ("Qwen3_5VisionModel",),
        ("0.8B", "2B", "4B", "9B", "27B", "3.6-27B"), (_QWEN3,), _parse_qwen3_5,
    ),
    Tower(
        "Qwen3.5-MoE", ("qwen3_5_moe", "qwen3_5_moe_vision"), ("Qwen3_5MoeVisionModel",),
        ("35B-A3B", "122B-A10B", "397B-A17B"), (_QWEN3,), _parse_qwen3_5,
    ),
    Tower(
        "GLM-4V", ("glm4v", "glm4v_vision"), ("Glm4vVisionModel",),
        ("4.1V-9B", "4.6V-Flash"), (_GLM,), _parse_glm4v,
        notes="clips of many frames too, where transformers wants one grid row a frame",
    ),
    Tower(
        "GLM-4V-MoE", ("glm4v_moe", "glm4v_moe_vision"), ("Glm4vMoeVisionModel",),
        ("4.5V", "4.6V"), (_GLM,), _parse_glm4v,
        notes="clips of many frames too, where transformers wants one grid row a frame",
    ),
    Tower(
        "GLM-OCR", ("glm_ocr", "glm_ocr_vision"), ("GlmOcrVisionModel",), ("0.9B",), (_GLM,), _parse_glm_ocr,
    ),
    Tower(
        "GLM-5.3-Flash", ("glm5_next", "glm5_next_vision"), ("Glm5NextVisionModel",), ("5.3-Flash",),
        (_GLM,), _parse_glm5,
    ),
    Tower(
        "Kimi-VL", ("kimi_vl", "moonvit"), (), ("A3B", "MoonViT-SO-400M"), (_MOONVIT,), _parse_moonvit,
        pixels="patches", video=False, projector=_KIMI_VL_PROJECTOR, notes="not in transformers: `load`, not `attach`",
    ),
    Tower(
        "Kimi-K2.5", ("kimi_k25", "kimi_k25_vision"), ("Kimi_K25VisionModel",),
        ("K2.5", "K2.6"), (_KIMI_K25, _MOONVIT), _parse_kimi_k25, pixels="patches",
        projector=_KIMI_K25_PROJECTOR, notes="clips of up to 4 frames, of mixed lengths in one call",
    ),
    Tower(
        "PaddleOCR-VL", ("paddleocr_vl", "paddleocr_vl_vision"), ("PaddleOCRVisionModel",), ("0.9B",),
        (_PADDLEOCR,), _parse_paddleocr, pixels="batch", video=False, notes="the projector stays outside",
    ),
    Tower(
        "ERNIE-4.5-VL", ("ernie4_5_moe_vl", "ernie4_5_vl_moe", "ernie4_5_vl_moe_vision", "DFNRope_vision_transformer"),
        ("Ernie4_5_VLMoeVisionTransformerPretrainedModel",), ("28B-A3B", "424B-A47B"),
        (_ERNIE,), _parse_ernie, notes="the resampler stays outside",
    ),
    Tower(
        "EXAONE-4.5", ("exaone4_5", "exaone4_5_vision"), ("Exaone4_5_VisionModel",), ("33B",),
        (_QWEN2_5,), _parse_exaone,
        notes="last_hidden_state is in window order, as in transformers; measured at guessed sizes",
    ),
    Tower(
        "InternVL", ("internvl", "internvl_vision", "internvl_chat", "intern_vit_6b"), ("InternVLVisionModel",),
        ("InternViT-300M (InternVL2.5, 3, 3.5)",), (_INTERNVL, _INTERNVIT), _parse_internvit,
        pixels="images", video=False, notes="images [B, 3, H, W] or patches; a class token before the patches",
    ),
    Tower(
        "SigLIP", ("siglip", "siglip_vision_model"), ("SiglipVisionModel",),
        ("so400m (Gemma 3, LLaVA-OneVision)", "base", "large"), (_SIGLIP,), _parse_siglip,
        pixels="images", video=False, notes="images [B, 3, H, W] or patches; without the pooling head",
    ),
    Tower(
        "Qwen4-Exp", ("qwen4_exp", "qwen4_exp_vision"), ("Qwen4ExpVisionModel",), (),
        (_QWEN3,), _parse_qwen3_5,
    ),
)  # fmt: skip
