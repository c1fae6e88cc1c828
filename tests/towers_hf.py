"""Tiny seeded random Hugging Face towers and models, for transformers 5.x and 4.57.

Every parameter is random, norms and biases too: on freshly built ones (weight 1, bias 0) a folding mistake hides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

IMAGE, VIDEO, START, END = 90, 91, 92, 93  # token ids of the tiny vocabulary; text is below 90
Grid = Sequence[Sequence[int]]


def tiny_qwen3_vl_config(**overrides: Any) -> Any:
    """A Qwen3VLVisionConfig: 3 blocks of 2 heads of 16, patches of 4 x 4 x 2 frames, 6 x 6 positions."""
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

    fields = {
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 56,
        "patch_size": 4,
        "out_hidden_size": 24,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1],
    }
    return Qwen3VLVisionConfig(**(fields | overrides))


def tiny_tower(seed: int = 0, **overrides: Any) -> Any:
    """A Qwen3VLVisionModel, fp32, eval, sdpa."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    config = tiny_qwen3_vl_config(**overrides)
    config._attn_implementation = "sdpa"
    return randomize(Qwen3VLVisionModel(config), seed)


def tiny_config(**vision: Any) -> Any:
    """A Qwen3VLConfig of the tiny tower and a text model of 2 layers."""
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig

    visual = tiny_qwen3_vl_config(**vision)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {
        "vocab_size": 96,
        "hidden_size": visual.out_hidden_size,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "rope_scaling": rope,  # transformers 4
        "rope_parameters": rope | {"rope_theta": 10000.0},
    }
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    return Qwen3VLConfig(text_config=text, vision_config=visual.to_dict(), **ids)


def tiny_model(seed: int = 0, **vision: Any) -> Any:
    """A full Qwen3VLForConditionalGeneration, fp32, eval, sdpa; keywords override the vision config."""
    from transformers import Qwen3VLForConditionalGeneration

    return randomize(Qwen3VLForConditionalGeneration(tiny_config(**vision)), seed)


def randomize(module: nn.Module, seed: int) -> Any:
    """Seeded noise in every parameter: norm weights about 1, vectors 0.1, matrices so that rows keep their scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if "pos_emb" in name or "position_embedding" in name or "cls_token" in name:
                parameter.copy_(0.5 * noise)  # rows are added to patches: they are no fan-in
            elif "lambda" in name:
                parameter.copy_(0.3 * noise)
            elif parameter.ndim == 1 and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return module.eval()


def random_pixels(grid: Grid, features: int = 96, seed: int = 0) -> torch.Tensor:
    """pixel_values [patches, features] for grids of (t, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(t * h * w for t, h, w in grid), features, generator=generator)


def random_inputs(images: Grid = (), videos: Grid = (), *, seed: int = 0, features: int = 96) -> dict[str, Any]:
    """Keywords for the tiny model: one row of text with an image, then a video, between vision start and end tokens.

    A video is one span a frame, as Qwen3-VL's processor writes it.
    """
    generator = torch.Generator().manual_seed(seed)

    def text(count: int) -> list[int]:
        return torch.randint(3, 90, (count,), generator=generator).tolist()

    ids = text(3)
    for token, grids in ((IMAGE, images), (VIDEO, videos)):
        for t, h, w in grids:
            for _ in range(t):
                ids += [START] + [token] * (h * w // 4) + [END] + text(2)
    row = torch.tensor([ids])
    inputs: dict[str, Any] = {"input_ids": row, "attention_mask": torch.ones_like(row)}
    if images:
        inputs |= {"pixel_values": random_pixels(images, features, seed), "image_grid_thw": torch.tensor(images)}
    if videos:
        inputs |= {
            "pixel_values_videos": random_pixels(videos, features, seed + 1),
            "video_grid_thw": torch.tensor(videos),
        }
    if transformers_major() >= 5:
        inputs["mm_token_type_ids"] = (row == IMAGE).int() + 2 * (row == VIDEO).int()
    return inputs


def transformers_major() -> int:
    import transformers

    return int(transformers.__version__.partition(".")[0])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative error of a against b, in the 2-norm."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.double() - b.double()).norm() / b.double().norm())
