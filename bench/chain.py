"""Chain: the four matmuls between two attentions in one launch, beside five launches a block."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch

from bench.blocks import BLOCK, DEPTH, all_forced, loaded
from bench.cases import CASES
from bench.steps import Loaded
from bench.timing import require_gpu, script
from fused_vit.kernels import hopper_matmul
from fused_vit.kernels.config import HopperConfig, multiprocessors
from fused_vit.kernels.hopper_chain import Matmul, hopper_chain
from fused_vit.plan import Step

SMALL = HopperConfig(64, 64, 1, buffers=10)


def recorded(tower: Loaded, step: Step) -> tuple[Matmul, torch.Tensor]:
    """A step's matmul instead of its launch, and the count of rows."""
    found = []

    def record(a: Any, weight: Any, epilogue: Any, operands: Any, options: Any, **about: Any) -> None:
        matmul = Matmul(a, weight, epilogue, operands, options, about["columns"], about.get("places"), about["moments"])
        found.append((matmul, about["count"]))

    with mock.patch.object(hopper_matmul, "hopper_matmul", record):
        tower.launch(step)
    return found[0]


def microseconds(run: Callable[[], None], reset: Callable[[], None]) -> float:
    """Of a block: the median replay of a graph of DEPTH blocks."""
    run()
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        run()
    for _ in range(60):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        reset()
        torch.cuda.synchronize()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / DEPTH)
    return statistics.median(times)


def main(argv: Sequence[str] | None = None) -> None:
    programs = multiprocessors(require_gpu())
    for case in ("128²", "256²"):
        tower = loaded(CASES[case])
        steps = {step.name: step for step in tower.plan.steps}
        kept = {name: t.clone() for name, t in tower.buffers.items()}
        arrivals = torch.zeros(DEPTH, 4, -(-len(tower.buffers["x"]) // 64), dtype=torch.int32, device="cuda")
        chains = []
        for i in range(DEPTH):
            names = [f"block.{i}.{op}" for op in BLOCK[2:]] + [f"block.{i + 1}.qkv"] * (i + 1 < DEPTH)
            chains.append([recorded(tower, steps[name]) for name in names])

        def reset(tower: Loaded = tower, kept: dict[str, torch.Tensor] = kept) -> None:
            for name, t in kept.items():
                tower.buffers[name].copy_(t)

        def plain(tower: Loaded = tower, steps: dict[str, Step] = steps) -> None:
            for i in range(DEPTH):
                for op in BLOCK:
                    tower.launch(steps[f"block.{i}.{op}"])

        def chained(
            tower: Loaded = tower, steps: dict[str, Step] = steps, chains: Any = chains, arrivals: Any = arrivals
        ) -> None:
            arrivals.zero_()
            tower.launch(steps["block.0.qkv"])
            for i in range(DEPTH):
                tower.launch(steps[f"block.{i}.attention"])
                links = [matmul for matmul, _ in chains[i]]
                hopper_chain(links, arrivals[i], programs=programs, count=chains[i][0][1])

        used = int(tower.buffers["table"][0])
        with all_forced(SMALL):
            reset()
            plain()
            want = tower.buffers["x"][:used].clone()
        reset()
        chained()
        print(
            f"{case}: equal {torch.equal(want, tower.buffers['x'][:used])}; us a block: five launches "
            f"{microseconds(plain, reset):.1f}, attention and a chain {microseconds(chained, reset):.1f}"
        )


if __name__ == "__main__":
    script(main)
