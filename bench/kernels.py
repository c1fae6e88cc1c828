"""Kernels: every step of a block, the mergers and the patch embedding, beside cuBLAS and torch's attentions.

TFLOP/s, TB/s and the share of the measured ceiling, with the error in the same row; a wrong result has no speed.
Operands go round through more copies than the L2 holds, so that every launch finds them in device memory.

python -m bench.kernels --out bench/results/kernels.json        # or: fused-vit bench kernels
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.assembly import variable_length
from bench.cases import rectangle
from bench.steps import Loaded, kind, load, one_of_each, random_weights, used
from bench.timing import (
    BenchError,
    Roof,
    ceilings,
    copies,
    environment,
    floor_us,
    graph_us,
    judged,
    require_gpu,
    save,
    script,
    speed,
)
from fused_vit.buckets import choose, ladder
from fused_vit.executor import launch_step
from fused_vit.kernels.config import attention_config, device_arch
from fused_vit.kernels.ops import OPS
from fused_vit.packing import MERGED, items
from fused_vit.parity import exact_fp32, relative
from fused_vit.plan import Cost, Plan, Step, build_plan, cost
from fused_vit.spec import TowerSpec
from fused_vit.towers import parse_config
from tests.families import FAMILIES, build

Tensors = list[torch.Tensor]
ROWS = (256, 784, 4096, 8160, 16384)
BATCHES = (8, 16)  # of 448²: attention over equal segments
L2 = 50 << 20  # bytes; an H100's, where torch does not say


def tower(name: str) -> TowerSpec:
    """The spec of a family at one checkpoint's real sizes, from its config; no weights are made."""
    family = next(family for family in FAMILIES if family.name == name)
    config: Any = build(family, real=True, device="meta").config
    return parse_config(config.to_dict())


def cases(spec: TowerSpec, rows: Sequence[int]) -> Iterator[tuple[list[list[int]], bool]]:
    """Grids, and whether only attention is timed on them: one image of each size, then batches of 28 x 28 patches."""
    for n in rows:
        yield [rectangle(n, spec.merge)], False
    for images in BATCHES:
        yield [[1, 28, 28]] * images, True


class Bench:
    """The steps of one plan on one device, and its ceilings."""

    def __init__(self, spec: TowerSpec, dtype: torch.dtype, device: torch.device, roof: Roof) -> None:
        self.plan: Plan = build_plan(one_of_each(spec))
        self.weights, self.dtype, self.roof = random_weights(self.plan.spec, dtype, device), dtype, roof
        self.tile = attention_config(spec.attention.head_dim, dtype, device_arch(device)).block_m
        self.cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else L2

    def load(self, grids: Sequence[Sequence[int]]) -> Loaded:
        """In the bucket that the library would take, so that what is measured is what runs."""
        pack = items(self.plan.spec, grids, sum(t * h * w for t, h, w in grids))
        rows, segments = sum(i.rows for i in pack), sum(i.segments for i in pack)
        windowed = self.plan.spec.attention.windows is not None
        bucket = choose(ladder(max(rows, 16384), windowed), rows, segments)
        assert bucket is not None, "the ladder ends at or above these rows"
        return load(self.plan, self.weights, grids, bucket, self.tile)

    @torch.no_grad()
    def measure(self, grids: Sequence[Sequence[int]], attention_only: bool) -> Iterator[dict[str, Any]]:
        """A row of every kind of step: ours, then its peers. Steps run in the plan's order, so that inputs are real."""
        loaded, seen = self.load(grids), set()
        costs = cost(self.plan, loaded.pack, self.dtype.itemsize)
        for step in self.plan.steps:
            error, allowed = run_checked(step, loaded)
            if step.op == "unfold" or kind(step) in seen or (attention_only and step.op != "attention"):
                if not error <= allowed:
                    raise BenchError(f"{step.name} is wrong by {error:.1e}: what follows it has no inputs")
                continue
            seen.add(kind(step))
            yield self.row(step, loaded, costs[step.name], error, allowed)

    def row(self, step: Step, loaded: Loaded, least: Cost, error: float, allowed: float) -> dict[str, Any]:
        def fast(launches: Callable[[], Sequence[Callable[[], Any]]]) -> dict[str, Any]:
            return speed(graph_us(launches()), least.flops, least.bytes, self.roof)

        n = copies(least.bytes, self.cache)
        row = {
            "rows": sum(i.rows for i in loaded.pack), "segments": sum(i.segments for i in loaded.pack),
            "step": kind(step), "gflop": least.flops / 1e9, "mb": least.bytes / 1e6,
            "floor_us": floor_us(least.flops, least.bytes, self.roof),
            "fused_vit": judged(error, allowed, lambda: fast(partial(rotated, step, loaded, n))),
        }  # fmt: skip
        with exact_fp32():
            found = peers(step, loaded)
        for name, (call, operands, truth) in found.items():
            row[name] = beside(call, operands, truth, partial(fast, partial(turns, call, operands, n)))
        return row


def run_checked(step: Step, loaded: Loaded) -> tuple[float, float]:
    """Launch a step as the executor does. Error of its first output to the definition in fp32, and what is allowed.

    That is twice the definition's own error in this dtype, plus a rounding. A later output that is wrong stands for it.
    """
    before = {name: used(loaded, name, step).clone() for name in step.reads if name}
    loaded.launch(step)
    wide = {name: t.float() if t.is_floating_point() else t for name, t in before.items()}
    exact = {name: loaded.weights[name].float() for name in step.weights if name}
    with exact_fp32():
        truths = definition(step, loaded, wide, exact)
    owns = definition(step, loaded, before, {name: loaded.weights[name] for name in step.weights if name})
    floor = torch.finfo(loaded.weights["patch_embed.weight"].dtype).eps / 4
    found = [
        (difference(used(loaded, name, step), truth, name), 2 * difference(own, truth, name) + floor)
        for name, truth, own in zip(step.writes, truths, owns, strict=True)
        if name
    ]
    return next(((error, allowed) for error, allowed in found if not error <= allowed), found[0])


def definition(
    step: Step, loaded: Loaded, reads: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    options = dict(step.options) | ({"tile": loaded.tile} if step.op == "unfold" else {})
    arguments = [*(reads.get(name) for name in step.reads), *(weights.get(name) for name in step.weights)]
    written = OPS[step.op].ref(*arguments, **options)
    return written if isinstance(written, tuple) else (written,)


def difference(a: torch.Tensor, b: torch.Tensor, name: str) -> float:
    """Relative; row sums come in as many parts as a kernel likes."""
    return relative(*(t.sum(1) if name == "sums" else t for t in (a, b)))


def rotated(step: Step, loaded: Loaded, n: int) -> Sequence[Callable[[], None]]:
    """The step's launch over n copies of its operands."""
    names = {*step.reads, *step.writes} - {"", "table"}
    launches = []
    for _ in range(n):
        buffers = loaded.buffers | {name: loaded.buffers[name].clone() for name in names}
        weights = {name: loaded.weights[name].clone() for name in step.weights if name}
        launches.append(partial(launch_step, step, weights, buffers, loaded.tile))
    return launches


# --- peers: a call, its operands, and the truth in fp32 ---

Peer = tuple[Callable[..., torch.Tensor], Tensors, torch.Tensor]


def peers(step: Step, loaded: Loaded) -> dict[str, Peer]:
    if step.op == "attention" and not dict(step.options)["windowed"]:
        return attention_peers(loaded)
    if step.op != "attention" and step.matmul[0]:
        return {"cublas": linear_peer(step, loaded)}
    return {}


def linear_peer(step: Step, loaded: Loaded) -> Peer:
    """The bare product and its bias, at the same useful sizes: no norm, activation, rotation or residual."""
    m = sum(item.merged if step.count == MERGED else item.rows for item in loaded.pack)
    n, k = step.matmul
    like = loaded.weights["patch_embed.weight"]
    x, weight, bias = (torch.randn(*s, device=like.device) for s in ((m, k), (n, k), (n,)))
    operands = [t.to(like.dtype) for t in (x, weight * k**-0.5, bias)]
    return F.linear, operands, F.linear(*(t.float() for t in operands))


def attention_peers(loaded: Loaded) -> dict[str, Peer]:
    """Equal segments, each peer with the layout it likes best; groups of heads are spread out beforehand."""
    att, lengths = loaded.plan.spec.attention, [item.frame_rows for item in loaded.pack for _ in range(item.t)]
    like = loaded.weights["patch_embed.weight"]
    if loaded.plan.spec.attention.segments == "clip":
        lengths = [item.rows for item in loaded.pack]
    shape = (len(lengths), att.heads, lengths[0], att.head_dim)
    batched = [torch.randn(shape, device=like.device).to(like.dtype) for _ in range(3)]
    truth = F.scaled_dot_product_attention(*(t.float() for t in batched))
    packed = [t.transpose(1, 2).flatten(0, 1).contiguous() for t in batched]
    varlen = variable_length(lengths, like.device) or absent
    return {
        "sdpa_flash": (partial(sdpa, SDPBackend.FLASH_ATTENTION), batched, truth),
        "sdpa_cudnn": (partial(sdpa, SDPBackend.CUDNN_ATTENTION), batched, truth),
        "varlen": (varlen, packed, truth.transpose(1, 2).flatten(0, 1)),
    }


def sdpa(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def absent(*_: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("this torch has no torch.nn.attention.varlen")


def turns(call: Callable[..., Any], operands: Tensors, n: int) -> list[Callable[[], Any]]:
    """A peer's call over n copies of its operands."""
    return [partial(call, *(t.clone() for t in operands)) for _ in range(n)]


def beside(
    call: Callable[..., torch.Tensor], operands: Tensors, truth: torch.Tensor, fast: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """A peer's entry in a row: held to the rounding of the truth in its dtype, as ours is; or why it has none."""
    try:
        error = relative(call(*operands), truth)
        dtype = operands[0].dtype
        allowed = 2 * relative(truth.to(dtype), truth) + torch.finfo(dtype).eps / 4
        return judged(error, allowed, fast)
    except (RuntimeError, ValueError) as failure:
        return {"missing": " ".join(str(failure).split())[:200]}


# --- output ---

PEERS = {"cublas": "F.linear", "sdpa_flash": "SDPA flash", "sdpa_cudnn": "SDPA cuDNN", "varlen": "varlen_attn"}


def rich_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Ours in full; of each peer its time, error, and how many times ours it takes."""
    heads = ("step", "us", "TFLOP/s", "TB/s", "of ceiling", "error", "peers: us (error), peer / ours")
    table = Table("rows", *heads)
    for column in table.columns[2:7]:
        column.justify = "right"
    for row in rows:
        ours = row["fused_vit"]
        speeds = [f"{ours['us']:.1f}", f"{ours['tflops']:.0f}", f"{ours['tbs']:.2f}", f"{ours['share']:.0%}"]
        cells = speeds if "us" in ours else ["[bold red]wrong", "", "", ""]
        others = [f"{PEERS[name]} {peer_cell(row[name], ours)}" for name in PEERS if name in row]
        size = f"{row['rows']}" if row["segments"] == 1 else f"{row['segments']} x {row['rows'] // row['segments']}"
        table.add_row(size, row["step"], *cells, f"{ours['error']:.1e}", "; ".join(others))
    return table


def peer_cell(found: dict[str, Any], ours: dict[str, Any]) -> str:
    if "missing" in found:
        return "missing"
    if "us" not in found:
        return f"wrong ({found['error']:.1e})"
    ratio = f", {found['us'] / ours['us']:.2f}x" if "us" in ours else ""
    return f"{found['us']:.1f} ({found['error']:.1e}){ratio}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    names = [family.name for family in FAMILIES]
    parser = argparse.ArgumentParser(prog="fused-vit bench kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/kernels.json"))
    parser.add_argument("--tower", choices=names, default="Qwen3-VL", metavar="FAMILY", help=", ".join(names))
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="patches of one image")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    device = require_gpu()
    spec, console = tower(arguments.tower), Console()
    work, roof = list(cases(spec, arguments.rows)), ceilings()  # rows that make no image fail before anything runs
    bench = Bench(spec, torch.bfloat16, device, roof)
    report: dict[str, Any] = {
        "what": f"steps of {arguments.tower}'s tower, random weights, bf16, operands in device memory",
        "environment": environment(), "ceilings": roof, "rows": [],
    }  # fmt: skip
    for grids, attention_only in work:
        rows = list(bench.measure(grids, attention_only))
        report["rows"] += rows
        console.print(rich_table(rows))
        save(report, arguments.out)


if __name__ == "__main__":
    script(main)
