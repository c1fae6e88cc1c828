"""vLLM's own tower of Qwen3-VL beside the one that the plug-in puts in its place, built by the same class of vLLM.

python -m bench.vllm --out bench/results/vllm.json
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.cases import CASES, PEERS
from bench.encoder import cell, columns, tower_8b, worst
from bench.peers import hf_call, rounded, vllm_tower
from bench.timing import BenchError, environment, judged, require_gpu, save, script, wall_ms
from fused_vit.parity import exact_fp32

Grids = list[list[int]]
ASKED = ("256²", "448²", "1024²", "8 x 448²", "mixed 8")


@torch.inference_mode()
def measure(truth: Any, half: Any, towers: Mapping[str, Any], grids: Grids) -> dict[str, Any]:
    """One case: every tower's error to `truth` and, where it is at most twice that of `half`, the time of its calls.

    truth, half: Hugging Face's tower in fp32 and rounded. A call is vLLM's: the grid comes from the host.
    """
    weight = next(half.parameters())
    size = half.config.in_channels * half.config.temporal_patch_size * half.config.patch_size**2
    noise = torch.randn(sum(t * h * w for t, h, w in grids), size, generator=torch.Generator().manual_seed(0))
    pixels = noise.to(weight.device, weight.dtype)
    with exact_fp32():
        wanted = hf_call(truth, grids)(pixels.float())
    allowed = 2 * worst(hf_call(half, grids)(pixels), wanted) + 1e-6
    found = {name: beside(tower, pixels, torch.tensor(grids), wanted, allowed) for name, tower in towers.items()}
    return {"tokens": len(pixels), "images": len(grids), **found}


def beside(
    tower: Any, pixels: torch.Tensor, grid: torch.Tensor, wanted: Sequence[torch.Tensor], allowed: float
) -> dict[str, Any]:
    """A tower's error and, if that is allowed, its time. Deepstack features stand beside the merged rows."""
    error = worst(tower(pixels, grid_thw=grid).split(wanted[0].shape[1], 1), wanted)
    return judged(error, allowed, lambda: {"wall_ms": wall_ms(lambda: tower(pixels, grid_thw=grid))})


def engine(own: Any) -> dict[str, Any]:
    """vLLM's version, the attention that its own tower runs, and which of its compiled extensions it loaded."""
    import vllm

    attention = own.blocks[0].attn.attn
    files = {name: getattr(module, "__file__", None) or "" for name, module in list(sys.modules.items())}
    return {
        "vllm": vllm.__version__,
        "attention": attention.attn_backend.name,
        "flash_attention": getattr(attention, "_fa_version", None),
        "extensions": sorted(n for n, file in files.items() if n.startswith("vllm.") and file.endswith(".so")),
    }


def table(cases: Mapping[str, Any]) -> Table:
    heads = ("patches", PEERS["vllm"], "fused_vit", "x faster")
    found = Table("case", *heads, title="calls in vLLM's process, ms (error)")
    for name, row in cases.items():
        theirs, ours = (row[tower].get("wall_ms", {}).get("median", float("nan")) for tower in ("vllm", "fused_vit"))
        cells = cell(row["vllm"]), cell(row["fused_vit"]), f"{theirs / ours:.2f}"
        found.add_row(name, f"{row['tokens']}", *cells)
    return columns(found)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.vllm", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/vllm.json"))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(ASKED), metavar="CASE", help=", ".join(CASES))
    arguments = parser.parse_args(argv)
    require_gpu()
    if importlib.util.find_spec("vllm") is None:
        raise BenchError("vLLM is not installed: pip install 'fused-vit[vllm]'")
    truth = tower_8b()
    half = rounded(truth)
    towers = {"vllm": vllm_tower(half), "fused_vit": vllm_tower(half, fused=True)}
    if type(towers["fused_vit"]).__name__ != "FusedTower":
        raise BenchError("vLLM built its own tower: the warning above says why")
    report: dict[str, Any] = {
        "what": "Qwen3-VL-8B vision tower (27 x 1152, 16 heads of 72, MLP 4304, 3 deepstack), random weights, bf16",
        "environment": environment() | engine(towers["vllm"]), "cases": {},
    }  # fmt: skip
    for name in arguments.cases:
        report["cases"][name] = measure(truth, half, towers, CASES[name])
        save(report, arguments.out)
    Console().print(report["environment"], table(report["cases"]))


if __name__ == "__main__":
    script(main)
