"""Whole towers: ours (graph call, replay alone, host) beside Hugging Face sdpa, in one process, error beside time.

python -m bench.encoder --out bench/results/encoder.json
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import fused_vit
from bench.timing import ceilings, device_ms, environment, host_us, wall_ms
from fused_vit.packing import items
from fused_vit.plan import cost

CASES: dict[str, list[list[int]]] = {  # name -> grids (t, h, w) of 16-pixel patches
    "224²": [[1, 14, 14]],
    "448²": [[1, 28, 28]],
    "768x1024": [[1, 48, 64]],
    "1024²": [[1, 64, 64]],
    "1080p": [[1, 68, 120]],
    "2048²": [[1, 128, 128]],
    "8 x 448²": [[1, 28, 28]] * 8,
    "mixed 8": [
        [1, 16, 16], [1, 28, 28], [1, 48, 64], [1, 20, 36], [1, 64, 64], [1, 32, 32], [1, 40, 24], [1, 28, 28],
    ],
    "video 16 x 448²": [[16, 28, 28]],
}  # fmt: skip


def tower_8b(depth: int = 27) -> torch.nn.Module:
    """A seeded random tower of Qwen3-VL-8B's sizes, fp32, on the GPU."""
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    torch.manual_seed(0)
    config = Qwen3VLVisionConfig(depth=depth, out_hidden_size=4096)
    config._attn_implementation = "sdpa"
    tower = Qwen3VLVisionModel(config).eval().requires_grad_(False)
    for name, parameter in tower.named_parameters():
        noise = torch.randn_like(parameter)
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(noise * (0.1 if parameter.ndim == 1 else 0.7 * parameter[0].numel() ** -0.5))
    return tower.cuda()


def rounded(tower: torch.nn.Module) -> torch.nn.Module:
    """The tower as a bf16 checkpoint loads: parameters rounded, rotary frequencies left in fp32."""
    peer = copy.deepcopy(tower)
    for parameter in peer.parameters():
        parameter.data = parameter.data.bfloat16()
    return peer


class LinearPatchEmbed(torch.nn.Module):
    """Hugging Face's patch embedding as a matmul: what its Conv3d-as-linear option computes."""

    def __init__(self, conv: torch.nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight.flatten(1), conv.bias

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.linear(pixels.to(self.weight.dtype), self.weight, self.bias)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def measure(
    grids: list[list[int]], towers: dict[str, Callable[..., Any]], vit: Any, roof: dict[str, float]
) -> dict[str, Any]:
    """One row of the table. No speed is given for a result whose error is more than twice Hugging Face's."""
    rows = sum(t * h * w for t, h, w in grids)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(rows, 1536, generator=generator).bfloat16().cuda()
    grid = torch.tensor(grids)
    pack = items(vit.spec, grids, rows)
    costs = cost(vit.plan(), pack).values()
    flops = sum(c.flops for c in costs)
    floor = 1e3 * max(flops / (roof["tflops"] * 1e12), vit.weight_bytes / (roof["tbs"] * 1e12))
    with torch.no_grad():
        truth = towers["fp32"](pixels.float(), grid_thw=grid.cuda()).pooler_output
        row: dict[str, Any] = {"tokens": rows, "images": len(grids), "tflop": flops / 1e12, "floor_ms": floor}
        for name in ("hf_sdpa", "hf_sdpa_linear"):
            result = towers[name](pixels, grid_thw=grid.cuda()).pooler_output
            row[name] = {"error": relative(result, truth)}
            on_device = grid.cuda()
            row[name]["wall_ms"] = wall_ms(lambda tower=towers[name], g=on_device: tower(pixels, grid_thw=g), 10)
    error = relative(vit(pixels, grid).pooler_output, truth)
    row["fused_vit"] = {"error": error}
    if error > 2 * row["hf_sdpa"]["error"] + 1e-6:
        return row
    row["fused_vit"]["wall_ms"] = wall_ms(lambda: vit(pixels, grid))
    bucket = next(b for b in vit.buckets if b.holds(rows, sum(i.segments for i in pack)))
    row["fused_vit"] |= {
        "replay_ms": device_ms(vit._graphs[bucket].replay),
        "host_us": host_us(lambda: vit(pixels, grid)),
        "bucket": [bucket.tokens, bucket.segments],
    }
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("bench/results/encoder.json"))
    out = parser.parse_args().out
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    tower = tower_8b()
    peer = rounded(tower)
    linear = copy.deepcopy(peer)
    linear.patch_embed = LinearPatchEmbed(peer.patch_embed.proj)  # type: ignore[arg-type,union-attr]
    vit = fused_vit.FusedViT.from_module(tower, dtype=torch.bfloat16).warmup()
    roof = ceilings()
    report: dict[str, Any] = {
        "what": "Qwen3-VL-8B vision tower (27 x 1152, 16 heads of 72, MLP 4304, 3 deepstack), random weights, bf16",
        "environment": environment(), "ceilings": roof, "stats": vit.stats(), "cases": {},
    }  # fmt: skip
    towers = {"fp32": tower, "hf_sdpa": peer, "hf_sdpa_linear": linear}
    for name, grids in CASES.items():
        report["cases"][name] = row = measure(grids, towers, vit, roof)
        ours, theirs = row["fused_vit"], row["hf_sdpa_linear"]
        wall = ours.get("wall_ms", {}).get("median", float("nan"))
        print(
            f"{name:16} {row['tokens']:6} tokens  floor {row['floor_ms']:6.2f}  ours {wall:7.2f} ms"
            f" (replay {ours.get('replay_ms', float('nan')):7.2f}, host {ours.get('host_us', 0):5.0f} us,"
            f" error {ours['error']:.2e})  hf {row['hf_sdpa']['wall_ms']['median']:7.2f}"
            f" / linear {theirs['wall_ms']['median']:7.2f} ms (error {theirs['error']:.2e})",
            flush=True,
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
