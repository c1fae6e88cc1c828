"""Whole towers: ours (eager, replay, whole call) beside every peer, in one process, the error beside each time.

python -m bench.encoder --out bench/results/encoder.json        # or: fused-vit bench encoder
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fused_vit
from bench.assembly import Captured
from bench.cases import CASES, COST_FOLLOWS, FILL, PEERS, partly, rectangle
from bench.peers import Missing, Peers, hf_call, outputs
from bench.steps import Loaded, load, roofline, times, without_attention_us
from bench.timing import (
    Roof,
    ceilings,
    device_ms,
    environment,
    floor_us,
    host_us,
    judged,
    require_gpu,
    save,
    script,
    wall_ms,
)
from fused_vit.buckets import Bucket, choose
from fused_vit.packing import items
from fused_vit.parity import exact_fp32, relative
from fused_vit.plan import cost
from fused_vit.spec import TowerSpec

Grids = list[list[int]]
SIZES: dict[str, dict[str, Any]] = {  # of Qwen3-VL's towers; 32B's are 8B's but for the mergers' width
    "8B": {"depth": 27, "out_hidden_size": 4096},
    "2B": {
        "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2048,
        "deepstack_visual_indexes": [5, 11, 17],
    },
}  # fmt: skip
STEP_CASES = ("448²", "1024²", "1080p", "8 x 448²")  # whose steps are timed one by one


def tower_8b(depth: int = 27) -> torch.nn.Module:
    return random_tower(SIZES["8B"] | {"depth": depth})


def random_tower(sizes: dict[str, Any]) -> torch.nn.Module:
    """A seeded random tower of Qwen3-VL with these fields in its config, fp32, on the GPU."""
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    torch.manual_seed(0)
    config = Qwen3VLVisionConfig(**sizes)
    config._attn_implementation = "sdpa"
    tower = Qwen3VLVisionModel(config).eval().requires_grad_(False)
    for name, parameter in tower.named_parameters():
        noise = torch.randn_like(parameter)
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(noise * (0.1 if parameter.ndim == 1 else 0.7 * parameter[0].numel() ** -0.5))
    return tower.cuda()


def worst(ours: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    """The largest relative error of any output; a NaN is larger than all."""
    errors = [relative(a, b) for a, b in zip(ours, truth, strict=True)]
    return next((error for error in errors if error != error), max(errors))


@dataclass(frozen=True, slots=True)
class Bench:
    """What every case needs: our tower, its peers and which of them to ask, and the device's ceilings."""

    vit: fused_vit.FusedViT
    peers: Peers
    asked: Sequence[str]
    roof: Roof

    def pixels(self, grids: Grids) -> torch.Tensor:
        rows = sum(t * h * w for t, h, w in grids)
        noise = torch.randn(rows, self.vit.spec.patch.features, generator=torch.Generator().manual_seed(0))
        return noise.to(self.vit.device, self.vit.dtype)

    def bucket(self, grids: Grids) -> Bucket:
        """The bucket that a call with these grids runs in."""
        pack = items(self.vit.spec, grids, sum(t * h * w for t, h, w in grids))
        bucket = choose(self.vit.buckets, sum(i.rows for i in pack), sum(i.segments for i in pack))
        assert bucket is not None, "a case fits the largest bucket"
        return bucket

    def load(self, grids: Grids, bucket: Bucket | None = None) -> Loaded:
        return load(self.vit.plan(), self.vit.weights, grids, bucket or self.bucket(grids), self.vit.tile)


@torch.no_grad()
def measure(bench: Bench, grids: Grids) -> dict[str, Any]:
    """One case: ours and every peer, none with a speed whose error is more than twice that of Hugging Face's sdpa."""
    vit, pixels = bench.vit, bench.pixels(grids)
    pack = items(vit.spec, grids, len(pixels))
    flops = sum(step.flops for step in cost(vit.plan(), pack).values())
    floor = floor_us(flops, vit.weight_bytes, bench.roof) / 1e3
    with exact_fp32():
        truth = hf_call(bench.peers.truth, grids)(pixels.float())
    allowed = 2 * worst(hf_call(bench.peers.hf_sdpa, grids)(pixels), truth) + 1e-6
    row: dict[str, Any] = {
        "tokens": len(pixels), "images": len(grids), "segments": sum(i.segments for i in pack),
        "tflop": flops / 1e12, "floor_ms": floor, "allowed": allowed,
    }  # fmt: skip
    for name in bench.asked:
        row[name] = peer(bench, name, grids, pixels, truth, allowed)
    return row | {"fused_vit": ours(bench, grids, pixels, truth, allowed)}


def peer(
    bench: Bench, name: str, grids: Grids, pixels: torch.Tensor, truth: list[torch.Tensor], allowed: float
) -> dict[str, Any]:
    """A peer's error and time, or why it has none."""
    try:
        call = bench.peers.call(name, grids, pixels)
        error = worst(call(pixels), truth)
    except Missing as reason:
        return {"missing": str(reason)}
    except Exception as failure:  # of code that is not ours
        return {"missing": str(bench.peers.gone(name, failure))}

    def speed() -> dict[str, Any]:
        replay = {"replay_ms": device_ms(call.graph.replay)} if isinstance(call, Captured) else {}
        return {"wall_ms": wall_ms(lambda: call(pixels), 10), **replay}

    return judged(error, allowed, speed)


def ours(bench: Bench, grids: Grids, pixels: torch.Tensor, truth: list[torch.Tensor], allowed: float) -> dict[str, Any]:
    """Our error and times; a tower that gives other bits the second time is as wrong as one that is far off."""
    vit, bucket = bench.vit, bench.bucket(grids)
    known = torch.tensor(grids)
    grid = known.to(vit.device)
    first = outputs(vit(pixels, grid))
    same = all(
        all(map(torch.equal, first, outputs(vit(pixels, grid)))) for _ in range(3)
    )  # fresh tensors every call, so nothing is compared with itself
    rows = {"rows_asked": len(pixels), "rows_run": bucket.tokens, "bucket": [bucket.tokens, bucket.segments]}

    def speed() -> dict[str, Any]:
        loaded, _kept = bench.load(grids), vit(pixels, grid)  # a replay writes where the last call's outputs are
        return {
            "eager_ms": wall_ms(loaded.run)["median"],
            "replay_ms": device_ms(vit._graphs[bucket].replay),
            "wall_ms": wall_ms(lambda: vit(pixels, grid)),
            "host_us": host_us(lambda: vit(pixels, grid)),
            "host_in_a_burst_us": host_us(lambda: vit(pixels, known), 10, 8),
        }

    error = worst(first, truth)
    return {**rows, "bitwise": same} | (judged(error, allowed, speed) if same else {"error": error, "allowed": allowed})


def steps(bench: Bench, grids: Grids) -> dict[str, Any]:
    """The roofline of one case: every kind of step, and their sum beside the replay of the whole."""
    loaded = bench.load(grids)
    rows = roofline(times(loaded), loaded.plan, loaded.pack, bench.roof)
    return {"sum_ms": sum(row["launches"] * row["us"] for row in rows) / 1e3, "steps": rows}


def cost_follows(bench: Bench, capacity: int) -> dict[str, Any]:
    """What a call of FILL of a bucket's rows takes of one that fills it: in its own bucket, and in the same."""
    merge, vit = bench.vit.spec.merge, bench.vit
    found: dict[str, Any] = {"allowed": COST_FOLLOWS}
    whole = bench.bucket([rectangle(capacity, merge)])
    for name, grid in (("part", partly(capacity, FILL, merge)), ("full", rectangle(capacity, merge))):
        own, pixels = bench.bucket([grid]), bench.pixels([grid])
        _kept = vit(pixels, [grid])  # leaves the grid in its own bucket's table, and its outputs to be written again
        found[name] = {
            "rows": grid[1] * grid[2], "bucket": [own.tokens, own.segments],
            "replay_ms": device_ms(vit._graphs[own].replay),
            "without_attention_ms": without_attention_us(bench.load([grid], own)) / 1e3,
            "in_the_whole_bucket_ms": without_attention_us(bench.load([grid], whole)) / 1e3,
        }  # fmt: skip
    part, full = found["part"], found["full"]
    found["share"] = part["rows"] / full["rows"]
    found["ratio"] = part["without_attention_ms"] / full["without_attention_ms"]
    found["ratio_in_the_whole_bucket"] = part["in_the_whole_bucket_ms"] / full["in_the_whole_bucket_ms"]
    found["replay_ratio"] = part["replay_ms"] / full["replay_ms"]
    return found | {"ok": found["ratio"] <= COST_FOLLOWS}


def columns(table: Table) -> Table:
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def whole_table(cases: dict[str, Any]) -> Table:
    """Ours: where a call's time goes."""
    names = ("rows asked / run", "floor", "eager", "replay", "call", "host us, in a burst", "error", "same bits")
    table = Table("case", *names, title="fused_vit, ms")
    for name, row in cases.items():
        found = row["fused_vit"]
        known = "wall_ms" in found
        cells = [
            f"{found['eager_ms']:.2f}", f"{found['replay_ms']:.2f}", f"{found['wall_ms']['median']:.2f}",
            f"{found['host_us']:.0f}, {found['host_in_a_burst_us']:.0f}",
        ] if known else ["[bold red]wrong"] * 4  # fmt: skip
        rows = f"{found['rows_asked']} / {found['rows_run']}"
        same = "yes" if found["bitwise"] else "[bold red]no"
        table.add_row(name, rows, f"{row['floor_ms']:.2f}", *cells, f"{found['error']:.1e}", same)
    return columns(table)


def peers_table(cases: dict[str, Any], asked: Sequence[str]) -> Table:
    """Every engine's whole call and error."""
    names = ["fused_vit", *asked]
    table = Table("case", *("fused_vit" if n == "fused_vit" else PEERS[n] for n in names), title="whole calls, ms")
    for name, row in cases.items():
        table.add_row(name, *(cell(row[engine]) for engine in names))
    return columns(table)


def cell(found: dict[str, Any]) -> str:
    """A call's median and its error; what is wrong or missing has no number."""
    if "missing" in found:
        return "missing"
    wall = found.get("wall_ms", {}).get("median")
    return "[bold red]wrong" + f" ({found['error']:.1e})" if wall is None else f"{wall:.2f} ({found['error']:.1e})"


def steps_table(name: str, found: dict[str, Any]) -> Table:
    """The roofline as a table."""
    heads = ("launches", "us", "TFLOP/s", "TB/s", "floor us", "x floor", "of the tower")
    table = Table("step", *heads, title=f"steps of {name}, sum {found['sum_ms']:.2f} ms")
    for row in found["steps"]:
        table.add_row(
            row["step"], f"{row['launches']}", f"{row['us']:.1f}", f"{row['tflops']:.0f}", f"{row['tbs']:.2f}",
            f"{row['floor_us']:.1f}", f"{row['ratio']:.2f}", f"{row['of_tower']:.1%}",
        )  # fmt: skip
    return columns(table)


def described(spec: TowerSpec) -> str:
    heads = f"{spec.attention.heads} heads of {spec.attention.head_dim}"
    return f"{spec.depth} x {spec.width}, {heads}, MLP {spec.mlp.width}, {len(spec.deepstack)} deepstack"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fused-vit bench encoder", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/encoder.json"))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--tower", choices=SIZES, default="8B", help="of Qwen3-VL")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="default all")
    parser.add_argument("--compile-seconds", type=float, default=40, help="no compilation is begun after these")
    parser.add_argument("--fill-bucket", type=int, default=8192, help="the bucket that is filled to 55 %% and whole")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    require_gpu()
    console, tower = Console(), random_tower(SIZES[arguments.tower])
    vit = fused_vit.FusedViT.from_module(tower, dtype=torch.bfloat16).warmup()
    bench = Bench(vit, Peers(tower, arguments.compile_seconds), arguments.peers, ceilings())
    report: dict[str, Any] = {
        "what": f"Qwen3-VL-{arguments.tower} vision tower ({described(vit.spec)}), random weights, bf16",
        "environment": environment(), "ceilings": bench.roof, "cases": {}, "roofline": {},
    }  # fmt: skip
    for name in arguments.cases:
        report["cases"][name] = measure(bench, CASES[name])
        if name in STEP_CASES and "wall_ms" in report["cases"][name]["fused_vit"]:
            report["roofline"][name] = steps(bench, CASES[name])
            console.print(steps_table(name, report["roofline"][name]))
        console.print(f"{name}: fused_vit {cell(report['cases'][name]['fused_vit'])}", highlight=False)
        save(report, arguments.out)
    report |= {"stats": vit.stats(), "missing": bench.peers.reasons}
    if all("wall_ms" in row["fused_vit"] for row in report["cases"].values()):
        report["cost_follows_tokens"] = cost_follows(bench, arguments.fill_bucket)
    save(report, arguments.out)
    summary(console, report, arguments.peers)


def summary(console: Console, report: dict[str, Any], asked: Sequence[str]) -> None:
    """What a run found, at its end."""
    console.print(whole_table(report["cases"]))
    console.print(peers_table(report["cases"], asked))
    for name, reason in report["missing"].items():
        console.print(f"{PEERS[name]}: missing, {reason}", highlight=False, markup=False)
    if follows := report.get("cost_follows_tokens"):
        verdict = "at most" if follows["ok"] else "MORE than"
        console.print(
            f"a call of {follows['share']:.0%} of {follows['full']['rows']} rows takes {follows['ratio']:.2f} of "
            f"the time of one of all, attention left out ({verdict} {follows['allowed']})",
            highlight=False,
        )


if __name__ == "__main__":
    script(main)
