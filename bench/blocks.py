"""Blocks: what each form of a matmul on Hopper takes among the other launches of a tower.

Alone in a graph a kernel finds its code in the instruction cache and its operands in the L2: fc1 of 4096 rows took
71 us alone and 86 in a tower, whose other kernels' code came in between. So kernels/config.py has its times from here.

python -m bench.blocks --out bench/results/blocks.json
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.cases import CASES
from bench.steps import Loaded, load, random_weights
from bench.timing import BenchError, environment, require_gpu, save, script
from bench.tune import forced
from fused_vit.buckets import choose, ladder
from fused_vit.kernels import config, linear, qkv, residual
from fused_vit.kernels.config import HopperConfig
from fused_vit.packing import items
from fused_vit.plan import build_plan
from fused_vit.towers import parse_config

DEPTH = 8  # blocks whose weights go round
TOWER = {"model_type": "qwen3_vl", "depth": DEPTH, "out_hidden_size": 4096, "deepstack_visual_indexes": [0]}
FORMS = {name.strip("_").lower(): form for name, form in vars(config).items() if isinstance(form, HopperConfig)}
BLOCK, MERGER = ("qkv", "attention", "proj", "fc1", "fc2"), ("norm", "fc1", "fc2")


@contextmanager
def all_forced(form: HopperConfig) -> Iterator[None]:
    """Every matmul in this form."""
    with ExitStack() as stack:
        for module in (linear, qkv, residual):
            stack.enter_context(forced(module, form))
        yield


def medians(durations: Sequence[float], period: int) -> list[float]:
    """Of launches that come round every `period`: the median of each."""
    if not durations or len(durations) % period:
        raise ValueError(f"{len(durations)} launches are no multiple of {period}")
    return [statistics.median(durations[first::period]) for first in range(period)]


def durations(launches: Sequence[Callable[[], None]], replays: int = 3) -> list[float]:
    """Microseconds of each launch in replays of a graph of them all, as the profiler saw it on the device."""
    for launch in launches:
        launch()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [e.time_range.elapsed_us() for e in sorted(events, key=lambda e: e.time_range.start)]


def loaded(grids: Sequence[Sequence[int]]) -> Loaded:
    spec = parse_config(TOWER)
    weights = random_weights(spec, torch.bfloat16, torch.device("cuda"))
    pack = items(spec, grids, sum(t * h * w for t, h, w in grids))
    bucket = choose(ladder(16384), sum(i.rows for i in pack), sum(i.segments for i in pack))
    assert bucket is not None, "a case fits the largest bucket"
    tile = config.attention_config(spec.attention.head_dim, torch.bfloat16, 90).block_m
    tower = load(build_plan(spec), weights, grids, bucket, tile)
    tower.run()  # unfolds the table: on attention tiles that nobody wrote a launch does not end
    return tower


def measure(case: str) -> list[dict[str, Any]]:
    """A row for every form: the steps of a block, and those of the two kinds of merger."""
    tower = loaded(CASES[case])
    steps = {step.name: step for step in tower.plan.steps}
    rows = []
    for name, form in FORMS.items():
        with all_forced(form):
            blocks = [lambda s=steps[f"block.{i}.{op}"]: tower.launch(s) for i in range(DEPTH) for op in BLOCK]
            mergers = [
                lambda s=steps[f"{m}.{op}"]: tower.launch(s) for m in ("deepstack.0", "merger") for op in MERGER
            ] * DEPTH
            found = dict(zip(BLOCK, medians(durations(blocks), len(BLOCK)), strict=True))
            merging = medians(durations(mergers), 2 * len(MERGER))
        names = [f"{m}.{op}" for m in ("deepstack", "merger") for op in MERGER]
        rows.append({"case": case, "form": name, **found, **dict(zip(names, merging, strict=True))})
    return rows


def best(rows: Sequence[dict[str, Any]]) -> Table:
    """The fastest form of every step of every case."""
    steps = [key for key in rows[0] if key not in ("case", "form")] if rows else []
    table = Table("case", *steps, title="us, the fastest form")
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        fastest = (min(mine, key=lambda row: row[step]) for step in steps)
        table.add_row(case, *(f"{row[step]:.1f} {row['form']}" for step, row in zip(steps, fastest, strict=True)))
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/blocks.json"))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["768x1024", "1024²", "1080p", "8 x 448²"])
    arguments = parser.parse_args(argv)
    if config.device_arch(require_gpu()) != 90 or not config.has_gluon():
        raise BenchError("the Gluon forms of the matmuls are for Hopper GPUs and the Gluon of triton 3.6")
    rows = [row for case in arguments.cases for row in measure(case)]
    save({"environment": environment(), "forms": {n: asdict(f) for n, f in FORMS.items()}, "rows": rows}, arguments.out)
    Console().print(best(rows))


if __name__ == "__main__":
    script(main)
