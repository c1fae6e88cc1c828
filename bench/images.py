"""Images: photographs as uint8 tensors to features, by processor and tower, and by the tower that takes bytes.

python -m bench.images --out bench/results/images.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fused_vit
from bench.encoder import tower_8b
from bench.timing import BenchError, environment, host_us, require_gpu, save, script, wall_ms
from fused_vit.calls import call_of
from fused_vit.parity import exact_fp32, relative

CASES = {"256²": [(256, 256)], "448²": [(448, 448)], "1000 x 700": [(1000, 700)], "8 x 448²": [(448, 448)] * 8}
PLACES = ("cuda", "cpu")  # where the photographs lie


def processor() -> Any:
    """Of torchvision's kind, which works on the GPU; Qwen3-VL's numbers."""
    import transformers

    try:
        import torchvision  # noqa: F401
    except ImportError as error:
        raise BenchError(f"the processor that works on a GPU needs torchvision ({error})") from error
    kind = getattr(transformers, "Qwen2VLImageProcessorFast", None) or transformers.Qwen2VLImageProcessor
    size = {"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096}
    return kind(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, size=size)


def processed(prepare: Any, images: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """pixel_values and the grid, of a processor on the GPU."""
    found: tuple[torch.Tensor, torch.Tensor] = call_of(
        prepare(images=list(images), return_tensors="pt", device="cuda", input_data_format="channels_last")
    )
    return found


@torch.no_grad()
def measure(tower: torch.nn.Module, vit: fused_vit.FusedViT, prepare: Any, name: str, place: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.randint(0, 256, (h, w, 3), generator=generator, dtype=torch.uint8).to(place) for h, w in CASES[name]
    ]
    pixels, grid = processed(prepare, images)
    with exact_fp32():
        truth = tower(pixels, grid_thw=grid.to(pixels.device)).pooler_output
    calls: dict[str, Callable[[], Any]] = {
        "processor and tower": lambda: vit(*processed(prepare, images)),
        "tower of bytes": lambda: vit.encode_images(images, prepare),
    }
    row: dict[str, Any] = {"case": name, "images on": place, "patches": len(pixels)}
    for way, call in calls.items():
        error = relative(call().pooler_output, truth)
        row[way] = {"error": error, "wall_ms": wall_ms(call, 30)["median"], "host_us": host_us(call)}
    row["processor alone, ms"] = wall_ms(lambda: processed(prepare, images), 30)["median"]
    row["tower alone, ms"] = wall_ms(lambda: vit(pixels, grid), 30)["median"]
    return row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/images.json"))
    arguments = parser.parse_args(argv)
    require_gpu()
    prepare, tower = processor(), tower_8b()
    vit = fused_vit.FusedViT.from_module(tower, dtype=torch.bfloat16)
    rows = [measure(tower, vit, prepare, name, place) for name in CASES for place in PLACES]
    save({"environment": environment(), "rows": rows}, arguments.out)
    table = Table(
        "case", "images on", "processor and tower", "tower of bytes", "processor alone", "tower alone", title="ms"
    )
    for row in rows:
        ways = [f"{row[w]['wall_ms']:.2f} ({row[w]['error']:.1e})" for w in ("processor and tower", "tower of bytes")]
        alone = [f"{row[w]:.2f}" for w in ("processor alone, ms", "tower alone, ms")]
        table.add_row(row["case"], row["images on"], *ways, *alone)
    Console().print(table)


if __name__ == "__main__":
    script(main)
