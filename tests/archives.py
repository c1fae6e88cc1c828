"""A tiny checkpoint and archives of photographs in every form, for the tests of embedding."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

VISION = {
    "depth": 2, "hidden_size": 128, "num_heads": 2, "intermediate_size": 256, "out_hidden_size": 32,
    "deepstack_visual_indexes": [0], "num_position_embeddings": 64,
}  # fmt: skip
SIZE = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}  # pixels: 4 to 64 patches, which cost nothing


def checkpoint(folder: Path, seed: int = 0) -> Path:
    """A seeded Qwen3-VL tower of two blocks under the real names, and a processor that makes small images of all."""
    import transformers

    torch.manual_seed(seed)
    tower = transformers.Qwen3VLVisionModel(transformers.Qwen3VLConfig(vision_config=VISION).vision_config)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.visual.{name}": torch.randn_like(t) * 0.1 for name, t in tower.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    whole = {"model_type": "qwen3_vl", "vision_config": {**VISION, "model_type": "qwen3_vl"}}
    (folder / "config.json").write_text(json.dumps(whole))
    described = {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.3, 0.2], "size": SIZE,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(described))
    return folder


def picture(seed: int) -> Any:
    """A PIL image of its own size and content."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    width, height = rng.integers(40, 140, 2)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def data(seed: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, kind)
    return buffer.getvalue()


def photographs(folder: Path, seeds: Sequence[int]) -> list[Path]:
    """Files 000.png and so on, of those seeds, every third in a folder below."""
    paths = []
    for seed in seeds:
        path = folder / ("below" if seed % 3 == 2 else "") / f"{seed:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data(seed))
        paths.append(path)
    return paths


def place(folder: Path) -> Path:
    """A checkpoint and 120 photographs, in folders of these names."""
    checkpoint(folder / "checkpoint")
    photographs(folder / "photos", range(120))
    return folder


def video(path: Path, frames: int = 12, side: int = 64, fps: int = 8) -> np.ndarray:
    """A clip whose frames are of one grey each; returns the greys. Lossless but for the way through YUV."""
    import av

    greys = np.linspace(20, 220, frames).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for grey in greys:
            image = np.full((side, side, 3), grey, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return greys
