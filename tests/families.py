"""One reference per family: its tower in transformers (or tests.moonvit), tiny and at one checkpoint's real sizes.

Nothing here imports fused_vit: what the tests compare with is what the model's own authors published.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests import moonvit
from tests.towers_hf import randomize

Grid = list[list[int]]
State = dict[str, torch.Tensor]
Hub = tuple[dict[str, Any], State]

STILLS: dict[str, Grid] = {"one": [[1, 8, 12]], "mixed": [[1, 6, 10], [1, 2, 2], [1, 14, 4], [1, 10, 22]]}
VIDEO: dict[str, Grid] = {**STILLS, "video": [[3, 6, 4], [1, 8, 8], [2, 2, 10]]}
RAGGED: dict[str, Grid] = {
    "one": [[1, 16, 8]], "mixed": [[1, 10, 14], [1, 18, 6], [1, 2, 2], [1, 16, 8]], "video": [[3, 10, 14], [1, 8, 18]],
}  # fmt: skip
CLIPS: dict[str, Grid] = {**STILLS, "video": [[3, 6, 4], [1, 8, 8], [4, 2, 10], [2, 6, 6]]}
FIXED: dict[str, Grid] = {
    "one": [[1, 6, 6]],
    "mixed": [[1, 6, 6], [1, 4, 9], [1, 5, 7], [1, 1, 1], [1, 8, 2]],  # 4 x 9: as many as 6 x 6
}


@dataclass(frozen=True)
class Family:
    """module and cls: the tower in transformers.models ("": tests.moonvit). tiny, real: fields of its config.

    takes: what the class wants, "rows" [rows, features], "patches" [rows, 3, p, p], "batch" of them, or "images".
    hub: whole config.json and tensors of a tower's checkpoint, under the names that the hub's have.
    """

    name: str
    module: str
    cls: str
    config: str
    tiny: Mapping[str, Any]
    real: Mapping[str, Any]
    grids: Mapping[str, Grid]
    hub: Callable[[nn.Module], Hub]
    takes: str = "rows"
    frames: int = 2  # of a patch
    together: bool = True  # clips of every length in one call; else clip by clip
    stills: bool = False  # frames of a clip as grid rows of their own

    def call(self, tower: nn.Module, pixels: torch.Tensor, grid: Grid) -> list[torch.Tensor]:
        """[last_hidden_state, pooler_output if any, *deepstack_features], rows flat; pixels [rows, features]."""
        pixels = pixels.to(next(tower.parameters()).dtype)
        if self.stills:
            grid = [[1, h, w] for t, h, w in grid for _ in range(t)]
        calls = [grid] if self.together else [[row] for row in grid]
        parts = pixels.split([sum(t * h * w for t, h, w in rows) for rows in calls])
        with torch.no_grad():
            outs = [self._one(tower, part, rows) for part, rows in zip(parts, calls, strict=True)]
        return [torch.cat([t.flatten(0, -2) for t in column]) for column in zip(*outs, strict=True)]

    def _one(self, tower: nn.Module, pixels: torch.Tensor, grid: Grid) -> list[torch.Tensor]:
        p = int((pixels.shape[1] / 3 / self.frames) ** 0.5)
        if not self.module:
            return list(tower(pixels.view(-1, 3, p, p), grid))
        if self.takes == "images":
            _, h, w = grid[0]
            image = pixels.view(h, w, 3, p, p).permute(2, 0, 3, 1, 4).reshape(1, 3, h * p, w * p)
            resized = {"interpolate_pos_encoding": True} if self.module == "siglip" else {}
            return [tower(image, **resized).last_hidden_state]
        shaped = pixels if self.takes == "rows" else pixels.view(-1, 3, p, p)
        if self.takes == "batch":
            shaped = shaped[None]
        last: list[torch.Tensor] = []
        merger = getattr(tower, "merger", None)
        hook = merger.register_forward_pre_hook(lambda _, args: last.append(args[0])) if merger else None
        out = tower(shaped, grid_thw=torch.tensor(grid, device=pixels.device))
        if hook:
            hook.remove()
        if isinstance(out, torch.Tensor):  # transformers 4: merged rows; what the merger read is the last hidden state
            return [last[0], out]
        if isinstance(out, tuple):
            return [last[0], out[0], *out[1]]
        found = [out.last_hidden_state, out.pooler_output, *(out.get("deepstack_features") or [])]
        return [t for t in found if t is not None]


def available(family: Family) -> bool:
    """Whether the installed transformers has the tower."""
    try:
        return not family.module or hasattr(_import(family, "modeling"), family.cls)
    except ImportError:
        return False


def _import(family: Family, kind: str) -> Any:
    return importlib.import_module(f"transformers.models.{family.module}.{kind}_{family.module}")


def build(family: Family, seed: int = 0, real: bool = False, device: str = "cpu") -> nn.Module:
    """The tower in fp32, sdpa, every parameter random; at real sizes made on `device`."""
    fields = family.real if real else family.tiny
    with torch.device(device):
        if family.module:
            config = getattr(_import(family, "configuration"), family.config)(**fields)
            config._attn_implementation = "sdpa"
            tower: nn.Module = getattr(_import(family, "modeling"), family.cls)(config)
        else:
            tower = moonvit.MoonViT(moonvit.Config(**fields))
    tower = tower.float().requires_grad_(False)
    return _large(tower.eval(), seed) if real else randomize(tower, seed)


def _large(tower: nn.Module, seed: int) -> nn.Module:
    """Noise as trained weights have it: rows that keep their scale through dozens of blocks."""
    torch.manual_seed(seed)
    for name, parameter in tower.named_parameters():
        noise = torch.randn_like(parameter)
        if "pos_emb" in name or "position_embedding" in name or "cls_token" in name:
            parameter.copy_(0.5 * noise)  # rows are added to patches: they are no fan-in
        elif "lambda" in name:
            parameter.copy_(0.3 * noise)
        elif parameter.ndim == 1 and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        elif parameter.ndim == 1:
            parameter.copy_(0.1 * noise)
        else:
            parameter.copy_(0.7 * noise * parameter[0].numel() ** -0.5)
    return tower


def pixels(family: Family, tower: nn.Module, grid: Grid, seed: int = 0) -> torch.Tensor:
    """Normal noise [rows, features]."""
    size = tower.config.patch_size  # type: ignore[union-attr]
    side: Any = size if isinstance(size, int) else size[0]  # type: ignore[index]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(t * h * w for t, h, w in grid), 3 * family.frames * side * side, generator=generator)


# --- checkpoints under the hub's names ---

LANGUAGE = {"lm_head.weight": torch.ones(2, 2), "model.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}


def _vision(tower: nn.Module, **more: Any) -> dict[str, Any]:
    fields = tower.config.to_dict()  # type: ignore[operator,union-attr]
    dropped = ("transformers_version", "dtype", "torch_dtype", "architectures", "_name_or_path")
    return {k: v for k, v in fields.items() if k not in dropped and not k.startswith("_")} | more


def under(
    prefix: str, model_type: str, vision_type: str | None = None, nested: bool = False
) -> Callable[[nn.Module], Hub]:
    """A checkpoint that has the module's own names behind a prefix."""

    def hub(tower: nn.Module) -> Hub:
        vision = _vision(tower, **({"model_type": vision_type} if vision_type else {}))
        config: dict[str, Any] = {"model_type": model_type, "vision_config": vision}
        if nested:
            config = {"model_type": model_type, "thinker_config": {**config, "model_type": f"{model_type}_thinker"}}
        return config, LANGUAGE | {prefix + name: t for name, t in tower.state_dict().items()}

    return hub


def renamed(names: Mapping[str, str], state: State) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        yield name, tensor


def _kimi_k25(tower: nn.Module) -> Hub:
    """wqkv is one tensor with rotation pairs in even and odd rows; the config has names of its own."""
    c: Any = tower.config
    state = dict(tower.state_dict())
    names = {
        "layers.": "encoder.blocks.", "norm1": "norm0", "norm2": "norm1", "mlp.fc1": "mlp.fc0", "mlp.fc2": "mlp.fc1",
        "attn.proj": "wo", "final_layernorm": "encoder.final_layernorm",
        "pos_emb.position_embeddings": "pos_emb.weight",
    }  # fmt: skip
    heads = c.num_attention_heads
    for i in range(c.num_hidden_layers):
        for leaf in ("weight", "bias"):
            q, k, v = (state.pop(f"layers.{i}.attn.{n}_proj.{leaf}") for n in "qkv")
            q, k = (t.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) for t in (q, k))
            state[f"encoder.blocks.{i}.wqkv.{leaf}"] = torch.cat([q, k, v])
    vision = {
        "vt_hidden_size": c.hidden_size, "vt_num_hidden_layers": c.num_hidden_layers, "vt_num_attention_heads": heads,
        "vt_intermediate_size": c.intermediate_size, "patch_size": c.patch_size,
        "init_pos_emb_height": c.pos_emb_height, "init_pos_emb_width": c.pos_emb_width,
        "init_pos_emb_time": c.pos_emb_time, "merge_kernel_size": [2, 2], "merge_type": "sd2_tpool",
        "pos_emb_type": "divided_fixed", "projector_ln_eps": 1e-5, "mm_hidden_size": c.hidden_size,
    }  # fmt: skip
    config = {"model_type": "kimi_k25", "vision_config": vision, "text_config": {"hidden_size": 40}}
    behind = {f"mm_projector.{n}": t for n, t in renamed({"linear_1": "proj.0", "linear_2": "proj.2"}, _behind(tower))}
    return config, LANGUAGE | behind | {f"vision_tower.{n}": t for n, t in renamed(names, state)}


def _kimi_vl(tower: nn.Module) -> Hub:
    config = {"model_type": "kimi_vl", "vision_config": _vision(tower), "text_config": {"hidden_size": 40}}
    behind = {f"multi_modal_projector.{n}": t for n, t in _behind(tower).items()}
    return config, LANGUAGE | behind | {f"vision_tower.{n}": t for n, t in tower.state_dict().items()}


def projector(seed: int, tower: nn.Module, out: int) -> nn.Module:
    """The projector behind a Kimi tower, whose tensors `hub` writes for seed 0 and out 40."""
    width: Any = tower.config.hidden_size
    return randomize(moonvit.Projector(width, out), seed).requires_grad_(False)  # type: ignore[no-any-return]


def _behind(tower: nn.Module) -> State:
    return projector(0, tower, 40).state_dict()


def _ernie(tower: nn.Module) -> Hub:
    """The hub's DFNRopeVisionTransformerConfig has a ratio for the MLP's width."""
    c: Any = tower.config
    config, state = under("vision_model.", "ernie4_5_moe_vl")(tower)
    config["vision_config"] = {
        "model_type": "DFNRope_vision_transformer", "depth": c.depth, "embed_dim": c.hidden_size,
        "num_heads": c.num_heads,
        "hidden_size": c.hidden_size, "hidden_act": "quick_gelu", "mlp_ratio": c.intermediate_size // c.hidden_size,
        "in_channels": 3, "patch_size": c.patch_size, "spatial_merge_size": 2,
    }  # fmt: skip
    return config, state


def _qwen2(model_type: str) -> Callable[[nn.Module], Hub]:
    """The hub's vision_config of Qwen2-VL and Qwen2.5-VL: no model_type, other names for what nobody reads."""

    def hub(tower: nn.Module) -> Hub:
        config, state = under("visual.", model_type)(tower)
        vision = config["vision_config"]
        kept = {k: v for k, v in vision.items() if k not in ("model_type", "in_channels", "rope_parameters")}
        if model_type == "qwen2_vl":
            kept.pop("hidden_act")
        config["vision_config"] = kept | {"in_chans": 3, "spatial_patch_size": vision["patch_size"]}
        return config, state

    return hub


def _paddleocr(tower: nn.Module) -> Hub:
    config, state = under("visual.", "paddleocr_vl")(tower)
    config["vision_config"]["temporal_patch_size"] = 2  # the hub's; its convolution has no frames
    width = tower.config.hidden_size  # type: ignore[union-attr]
    unused = {
        "visual.vision_model.head.probe": torch.ones(1, 1, width),  # type: ignore[call-overload]
        "visual.vision_model.embeddings.packing_position_embedding.weight": torch.ones(4, 4),
    }
    return config, state | unused


def _siglip_state(tower: nn.Module) -> State:
    """Without transformers 4's `vision_model.`, which checkpoints have in every version."""
    return {name.removeprefix("vision_model."): t for name, t in tower.state_dict().items()}


def _siglip(prefix: str, model_type: str) -> Callable[[nn.Module], Hub]:
    def hub(tower: nn.Module) -> Hub:
        config = {"model_type": model_type, "vision_config": _vision(tower), "text_config": {"hidden_size": 40}}
        return config, LANGUAGE | {prefix + name: t for name, t in _siglip_state(tower).items()}

    return hub


def _siglip_alone(tower: nn.Module) -> Hub:
    config, state = _siglip("vision_model.", "siglip")(tower)
    state = {n: t for n, t in state.items() if n not in LANGUAGE}
    others = {"vision_model.head.probe": torch.ones(1, 1, 4), "text_model.head.weight": torch.ones(2, 2)}
    return config, state | others | {"logit_scale": torch.ones(1)}


def _internvit(tower: nn.Module) -> Hub:
    """OpenGVLab's own layout, which InternVL2.5, 3 and 3.5 were published in."""
    c: Any = tower.config
    state = dict(tower.state_dict())
    for i in range(c.num_hidden_layers):
        for leaf in ("weight", "bias"):
            pieces = [state.pop(f"encoder.layer.{i}.attention.{n}_proj.{leaf}") for n in "qkv"]
            state[f"encoder.layer.{i}.attn.qkv.{leaf}"] = torch.cat(pieces)
    names = {
        "encoder.layer.": "encoder.layers.", "attention.projection_layer": "attn.proj", "lambda_": "ls",
        "layernorm_before": "norm1", "layernorm_after": "norm2", "embeddings.cls_token": "embeddings.class_embedding",
        "patch_embeddings.projection": "patch_embedding", "position_embeddings": "position_embedding",
    }  # fmt: skip
    vision = {
        "model_type": "intern_vit_6b", "hidden_size": c.hidden_size, "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads, "intermediate_size": c.intermediate_size, "hidden_act": "gelu",
        "image_size": c.image_size[0], "patch_size": c.patch_size[0], "num_channels": 3, "qkv_bias": True,
        "qk_normalization": False, "norm_type": "layer_norm", "layer_norm_eps": 1e-6, "use_flash_attn": True,
    }  # fmt: skip
    config = {"model_type": "internvl_chat", "vision_config": vision, "llm_config": {}}
    return config, LANGUAGE | {f"vision_model.{n}": t for n, t in renamed(names, state)}


# --- the families ---

QWEN = {"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 52, "out_hidden_size": 24, "patch_size": 4}
WINDOWS = {"depth": 4, "window_size": 32, "fullatt_block_indexes": [1, 3]}
TABLE = {"num_position_embeddings": 36}
STACK = {"deepstack_visual_indexes": [0, 1]}
LARGE = {
    "depth": 27, "hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304, "patch_size": 16,
    "num_position_embeddings": 2304,
}  # fmt: skip
LARGE_STACK = LARGE | {"deepstack_visual_indexes": [8, 16, 24]}
QWEN2_5 = {
    "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 3584,
    "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
GLM = {
    "depth": 24, "hidden_size": 1536, "num_heads": 12, "out_hidden_size": 4096, "patch_size": 14, "image_size": 336,
}  # fmt: skip
GLM_OCR = {"depth": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096, "patch_size": 14}
CLIP = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 52, "patch_size": 4}
SO400M = {
    "num_hidden_layers": 27, "hidden_size": 1152, "num_attention_heads": 16, "intermediate_size": 4304,
    "patch_size": 14,
}  # fmt: skip
MOON = {"init_pos_emb_height": 6, "init_pos_emb_width": 6}
INTERN = {"attention_bias": True, "norm_type": "layer_norm", "layer_norm_eps": 1e-6}


FAMILIES: tuple[Family, ...] = (
    Family(
        "Qwen2-VL", "qwen2_vl", "Qwen2VisionTransformerPretrainedModel", "Qwen2VLVisionConfig",
        {"depth": 3, "embed_dim": 32, "num_heads": 2, "hidden_size": 24, "patch_size": 4},
        {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536, "patch_size": 14},
        VIDEO, _qwen2("qwen2_vl"),
    ),
    Family(
        "Qwen2.5-VL", "qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel", "Qwen2_5_VLVisionConfig",
        QWEN | WINDOWS, QWEN2_5, RAGGED, _qwen2("qwen2_5_vl"),
    ),
    Family(
        "Qwen2.5-Omni", "qwen2_5_omni", "Qwen2_5OmniVisionEncoder", "Qwen2_5OmniVisionEncoderConfig",
        QWEN | WINDOWS, QWEN2_5, RAGGED, under("thinker.visual.", "qwen2_5_omni", nested=True),
    ),
    Family(
        "Qwen3-VL", "qwen3_vl", "Qwen3VLVisionModel", "Qwen3VLVisionConfig",
        QWEN | TABLE | STACK, LARGE_STACK | {"out_hidden_size": 4096},
        VIDEO, under("model.visual.", "qwen3_vl", "qwen3_vl"),
    ),
    Family(
        "Qwen3-VL-MoE", "qwen3_vl_moe", "Qwen3VLMoeVisionModel", "Qwen3VLMoeVisionConfig",
        QWEN | TABLE | STACK, LARGE_STACK | {"out_hidden_size": 2048},
        VIDEO, under("model.visual.", "qwen3_vl_moe", "qwen3_vl_moe"),
    ),
    Family(
        "Qwen3-Omni", "qwen3_omni_moe", "Qwen3OmniMoeVisionEncoder", "Qwen3OmniMoeVisionEncoderConfig",
        QWEN | TABLE | STACK, LARGE_STACK | {"out_hidden_size": 2048},
        VIDEO, under("thinker.visual.", "qwen3_omni_moe", nested=True),
    ),
    Family(
        "Qwen3.5", "qwen3_5", "Qwen3_5VisionModel", "Qwen3_5VisionConfig", QWEN | TABLE,
        LARGE | {"depth": 12, "hidden_size": 768, "num_heads": 12, "intermediate_size": 3072, "out_hidden_size": 1024},
        VIDEO, under("model.visual.", "qwen3_5"),
    ),
    Family(
        "Qwen3.5-MoE", "qwen3_5_moe", "Qwen3_5MoeVisionModel", "Qwen3_5MoeVisionConfig",
        QWEN | TABLE, LARGE | {"out_hidden_size": 2048}, VIDEO, under("model.visual.", "qwen3_5_moe"),
    ),
    Family(
        "GLM-4V", "glm4v", "Glm4vVisionModel", "Glm4vVisionConfig",
        QWEN | {"image_size": 24, "out_hidden_size": 40}, GLM | {"intermediate_size": 13696},
        VIDEO, under("model.visual.", "glm4v"), stills=True,
    ),
    Family(
        "GLM-4V-MoE", "glm4v_moe", "Glm4vMoeVisionModel", "Glm4vMoeVisionConfig",
        QWEN | {"image_size": 24, "out_hidden_size": 40}, GLM | {"intermediate_size": 10944},
        VIDEO, under("model.visual.", "glm4v_moe"), stills=True,
    ),
    Family(
        "GLM-OCR", "glm_ocr", "GlmOcrVisionModel", "GlmOcrVisionConfig",
        QWEN, GLM_OCR | {"out_hidden_size": 1536}, VIDEO, under("model.visual.", "glm_ocr"), stills=True,
    ),
    Family(
        "GLM-5.3-Flash", "glm5_next", "Glm5NextVisionModel", "Glm5NextVisionConfig",
        QWEN | {"projection_intermediate_size": 40, "swiglu_limit": 0.5},
        GLM_OCR | {"out_hidden_size": 4096, "projection_intermediate_size": 10240, "swiglu_limit": 10.0},
        VIDEO, under("model.visual.", "glm5_next", "glm_ocr_vision"), stills=True,
    ),
    Family(
        "Kimi-VL", "", "MoonViT", "Config", CLIP | MOON,
        SO400M | {"init_pos_emb_height": 64, "init_pos_emb_width": 64}, STILLS, _kimi_vl, frames=1,
    ),
    Family(
        "Kimi-K2.5", "kimi_k25", "Kimi_K25VisionModel", "Kimi_K25VisionConfig",
        CLIP | {"pos_emb_height": 6, "pos_emb_width": 6},
        SO400M | {"pos_emb_height": 64, "pos_emb_width": 64, "pos_emb_time": 4},
        CLIPS, _kimi_k25, takes="patches", frames=1, together=False,
    ),
    Family(
        "PaddleOCR-VL", "paddleocr_vl", "PaddleOCRVisionModel", "PaddleOCRVisionConfig",
        CLIP | {"image_size": 24}, SO400M | {"image_size": 384}, STILLS, _paddleocr, takes="batch", frames=1,
    ),
    Family(
        "ERNIE-4.5-VL", "ernie4_5_vl_moe", "Ernie4_5_VLMoeVisionTransformerPretrainedModel",
        "Ernie4_5_VLMoeVisionConfig",
        {"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 96, "patch_size": 4},
        {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 5120, "patch_size": 14},
        VIDEO, _ernie, frames=1,
    ),
    Family(
        "EXAONE-4.5", "exaone4_5", "Exaone4_5_VisionModel", "Exaone4_5_VisionConfig",
        QWEN | WINDOWS | {"hidden_size": 64, "num_heads": 4, "num_key_value_heads": 2},
        QWEN2_5 | {"hidden_size": 2048, "num_heads": 32, "num_key_value_heads": 8, "intermediate_size": 5120},
        RAGGED, under("model.visual.", "exaone4_5"),
    ),
    Family(
        "InternVL", "internvl", "InternVLVisionModel", "InternVLVisionConfig",
        CLIP | INTERN | {"patch_size": [4, 4], "image_size": [24, 24]},
        INTERN | {
            "num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096,
            "patch_size": [14, 14], "image_size": [448, 448],
        },
        FIXED, under("vision_tower.", "internvl"), takes="images", frames=1, together=False,
    ),
    Family(
        "SigLIP", "siglip", "SiglipVisionModel", "SiglipVisionConfig",
        CLIP | {"image_size": 24, "vision_use_head": False},
        SO400M | {"image_size": 378, "vision_use_head": False},
        FIXED, _siglip("vision_tower.vision_model.", "gemma3"), takes="images", frames=1, together=False,
    ),
    Family(
        "Qwen4-Exp", "qwen4_exp", "Qwen4ExpVisionModel", "Qwen4ExpVisionConfig",
        QWEN | TABLE, LARGE | {"out_hidden_size": 4096}, VIDEO, under("model.visual.", "qwen4_exp"),
    ),
)  # fmt: skip

OTHER_HUB_LAYOUTS: Mapping[str, list[Callable[[nn.Module], Hub]]] = {
    "SigLIP": [_siglip_alone, _siglip("vision_tower.vision_model.", "llava_onevision")],
    "InternVL": [_internvit],
    "Kimi-VL": [lambda tower: (_vision(tower), tower.state_dict())],  # MoonViT-SO-400M alone
}
