"""Demo: a photograph through a small Qwen3-VL tower, from safetensors to a picture, compared with Hugging Face.

python -m bench.demo [--out out/demo]

The weights are random and seeded, so the features mean nothing yet; shapes, names and the whole path are the real ones.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fused_vit
from fused_vit.images import processor, read_image
from fused_vit.parity import Peer, hf_tower
from fused_vit.pca import colours, picture, raster
from fused_vit.towers import find_tower
from fused_vit.weights.checkpoint import Checkpoint

SIDE = 1024  # pixels: 64 x 64 patches, a map fine enough to look at
VISION = {
    "depth": 4, "hidden_size": 256, "num_heads": 4, "intermediate_size": 1024, "out_hidden_size": 128,
    "deepstack_visual_indexes": [1, 2], "num_position_embeddings": 2304,
}  # fmt: skip
TEXT = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [12, 10, 10]},
}  # fmt: skip


def build_checkpoint(folder: Path) -> None:
    """A whole Qwen3-VL model, small, saved by transformers itself: config.json, an index and shards."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]

    torch.manual_seed(0)
    text = TEXT | {"rope_scaling": TEXT["rope_parameters"]}  # its name in transformers 4.57
    config = Qwen3VLConfig(vision_config=VISION, text_config=text)
    model: Any = Qwen3VLForConditionalGeneration(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, parameter in model.model.visual.named_parameters():
            if parameter.ndim > 1 and "pos_embed" not in name:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.05)
    model.save_pretrained(folder, max_shard_size="4MB")


def photograph() -> Path:
    """Eileen Collins, a NASA photograph in the public domain, from scikit-image's wheel."""
    import skimage.data

    return Path(skimage.data.__file__).parent / "astronaut.png"


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median of whole calls, the device idle at both ends."""
    times = []
    for _ in range(21 if device.type == "cuda" else 3):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    out = parser.parse_args().out
    console = Console()

    folder = out / "checkpoint"
    build_checkpoint(folder)
    opened = Checkpoint.open(folder)
    row = find_tower(opened.config)
    shards = sorted(folder.glob("*.safetensors"))
    held = sum(shard.stat().st_size for shard in shards) / 1e6

    vit = fused_vit.load(folder, dtype=torch.bfloat16 if torch.cuda.is_available() else None, max_tokens=4096).warmup()
    photo = read_image(photograph())
    prepare = processor(vit.spec, folder)
    batch = prepare(images=[photo.resize((SIDE, SIDE))], return_tensors="pt")
    pixels, grid = batch["pixel_values"].to(vit.device, vit.dtype), batch["image_grid_thw"].tolist()
    result = vit(pixels, grid)

    tower = hf_tower(opened, vit.device)
    peer = Peer(tower, vit, pixels, grid)
    compared = peer.outputs()
    ours = milliseconds(lambda: vit(pixels, grid), vit.device)
    theirs_tower = tower.to(vit.dtype)
    hf_grid = torch.tensor(grid, device=vit.device)
    with torch.no_grad():
        theirs = milliseconds(lambda: theirs_tower(pixels, grid_thw=hf_grid), vit.device)

    gpu = vit.device.type == "cuda"
    ran = "Triton kernels in CUDA graphs" if gpu else "the plan's definition in torch: no GPU here, so no kernel ran"
    table = Table(title="a photograph through a small Qwen3-VL tower", show_header=False, title_justify="left")
    table.add_row("ran", f"{ran} ({vit.device}, {str(vit.dtype).removeprefix('torch.')})")
    layout = row.layouts[0]
    of_tower = opened.tower(layout.prefixes, layout.expected(vit.spec)).bytes / 1e6
    table.add_row("checkpoint", f"{len(shards)} shards, {held:.1f} MB, of which the tower {of_tower:.1f} MB")
    table.add_row("photograph", f"{photo.width} x {photo.height}, encoded at {SIDE} x {SIDE}")
    table.add_row("tokens", f"{len(pixels)} patches {grid[0]} -> {len(result.split()[0])} merged")
    table.add_row("last_hidden_state", str(list(result.last_hidden_state.shape)))
    table.add_row("pooler_output", str(list(result.split()[0].shape)))
    table.add_row("deepstack_features", ", ".join(str(list(t.shape)) for t in result.deepstack_features))
    launches = len(vit.plan().steps)
    table.add_row("launches", f"{launches}" + (", replayed as one graph" if gpu else " on a GPU; none here"))
    table.add_row("time", f"{ours:.2f} ms; Hugging Face sdpa {theirs:.2f} ms, same device and dtype")
    for one in compared:
        table.add_row(f"error of {one.name}", f"{one.error:.1e} to Hugging Face in fp32; allowed {one.allowed:.1e}")
    console.print(table)
    if not all(one.ok for one in compared):
        raise SystemExit(f"error: not what Hugging Face computes; run: fused-vit check {folder}")

    colour = colours(raster(result.last_hidden_state, grid[0], vit.spec)[0])
    picture([photo], [colour], height=SIDE * 5 // 8).save(out / "pca.png")
    console.print(f"same as Hugging Face. Picture: {out / 'pca.png'} (the photograph beside its patches' PCA)")


if __name__ == "__main__":
    main()
