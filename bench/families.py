"""Every family at real sizes: images of 128² to 1080p, a mixed batch; ours beside transformers and the floor.

python -m bench.families --out bench/results/families.json
Families that are not measured again keep what the report says of them, with its commit and the card's ceilings then.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
from pathlib import Path
from typing import Any

import torch

import fused_vit
from bench.cases import CASES
from bench.timing import ceilings, device_ms, environment, floor_us, host_us, save, wall_ms
from fused_vit.packing import items
from fused_vit.parity import exact_fp32, relative
from fused_vit.plan import cost
from tests.families import FAMILIES, Family, available, build

Grid = list[list[int]]
BY_16: dict[str, Grid] = {name: CASES[name] for name in ("128²", "256²", "448²", "4 x 256²", "1080p", "mixed 8")}
BY_14: dict[str, Grid] = {
    "128²": [[1, 10, 10]],
    "256²": [[1, 18, 18]],
    "448²": [[1, 32, 32]],
    "4 x 256²": [[1, 18, 18]] * 4,
    "1080p": [[1, 78, 138]],
    "mixed 8": [
        [1, 18, 18], [1, 32, 32], [1, 54, 74], [1, 22, 40], [1, 74, 74], [1, 36, 36], [1, 46, 28], [1, 32, 32],
    ],
}  # fmt: skip
TILES = {"SigLIP": 10, "InternVL": 13}  # what their models cut a 1080p image into, beside its thumbnail


def cases(family: Family, vit: fused_vit.FusedViT) -> dict[str, Grid]:
    """The case set of a tower: its patch size decides, or its only resolution."""
    spec = vit.spec
    if family.name in TILES and spec.position:
        tile = [1, spec.position.side, spec.position.side]
        return {"448²": [tile], "1080p": [tile] * TILES[family.name], "mixed 8": [tile] * 8}
    return BY_16 if spec.patch.size == 16 else BY_14


def measure(family: Family, roof: dict[str, float]) -> dict[str, Any]:
    tower = build(family, seed=0, real=True, device="cuda")
    peer = copy.deepcopy(tower)
    for parameter in peer.parameters():
        parameter.data = parameter.data.bfloat16()
    vit = fused_vit.FusedViT.from_module(tower, dtype=torch.bfloat16)
    grids = cases(family, vit)
    tokens = [sum(i.rows for i in items(vit.spec, g, sum(t * h * w for t, h, w in g))) for g in grids.values()]
    buckets = {next(b for b in vit.buckets if b.tokens >= n) for n in tokens}
    vit = fused_vit.FusedViT(vit.spec, vit.weights, buckets=buckets).warmup()
    report: dict[str, Any] = {"weight_bytes": vit.weight_bytes, "cases": {}}
    for name, grid in grids.items():
        report["cases"][name] = case(family, tower, peer, vit, grid, roof)
    return report


@torch.no_grad()
def case(
    family: Family,
    tower: torch.nn.Module,
    peer: torch.nn.Module,
    vit: fused_vit.FusedViT,
    grid: Grid,
    roof: dict[str, float],
) -> dict[str, Any]:
    """One row. No speed is given for a result whose error is more than twice transformers' own."""
    rows = sum(t * h * w for t, h, w in grid)
    pack = items(vit.spec, grid, rows)
    flops = sum(c.flops for c in cost(vit.plan(), pack).values())
    pixels = torch.randn(rows, vit.spec.patch.features, generator=torch.Generator().manual_seed(0)).bfloat16().cuda()
    with exact_fp32():
        truth = family.call(tower, pixels.float(), grid)[-1]
    theirs = relative(family.call(peer, pixels, grid)[-1], truth)
    out = vit(pixels, grid)
    ours = relative(
        [out.last_hidden_state, out.pooler_output, *out.deepstack_features][_last(out)].flatten(0, -2), truth
    )
    row = {
        "rows": sum(i.rows for i in pack), "images": len(grid), "tflop": flops / 1e12,
        "floor_ms": floor_us(flops, vit.weight_bytes, roof) / 1e3,
        "error": ours, "hf_error": theirs,
    }  # fmt: skip
    if ours > 2 * theirs + 1e-6:
        return row
    row["hf_wall_ms"] = wall_ms(lambda: family.call(peer, pixels, grid), 5, 2)["median"]
    row["wall_ms"] = wall_ms(lambda: vit(pixels, grid))["median"]
    bucket = next(b for b in vit.buckets if b.holds(row["rows"], sum(i.segments for i in pack)))
    out = vit(pixels, grid)  # whose memory is written again
    row["replay_ms"] = device_ms(vit._graphs[bucket].replay)
    row["host_us"] = host_us(lambda: vit(pixels, grid))
    return row


def _last(out: fused_vit.VisionOutput) -> int:
    """Which output tests.families' call gives last: the deepest there is."""
    if out.deepstack_features:
        return -1
    return 0 if out.pooler_output is None else 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("bench/results/families.json"))
    parser.add_argument("--family", action="append", help="only this one; may be repeated")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    roof = ceilings()
    report: dict[str, Any] = {"environment": environment(), "families": {}}
    if arguments.out.exists():
        report["families"] = json.loads(arguments.out.read_text())["families"]
    for family in FAMILIES:
        if not available(family) or (arguments.family and family.name not in arguments.family):
            continue
        measured = {"commit": report["environment"]["commit"], "ceilings": roof} | measure(family, roof)
        report["families"][family.name] = measured
        for name, row in measured["cases"].items():
            wall, floor = row.get("wall_ms", float("nan")), row["floor_ms"]
            print(
                f"{family.name:14} {name:8} {row['rows']:6} rows  floor {floor:6.2f}  ours {wall:7.2f} ms"
                f" = {wall / floor:4.1f}x (replay {row.get('replay_ms', 0):7.2f}, host {row.get('host_us', 0):5.0f} us,"
                f" error {row['error']:.1e})  hf {row.get('hf_wall_ms', 0):7.2f} ms (error {row['hf_error']:.1e})",
                flush=True,
            )
        save(report, arguments.out)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
