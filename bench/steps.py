"""Steps: the launches of one plan over random data, each timed and set beside what it must do at the least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from bench.timing import Roof, floor_us, graph_us, speed
from fused_vit.buckets import Bucket
from fused_vit.executor import launch, launch_step
from fused_vit.layouts import parts
from fused_vit.packing import TILES, WINDOWS, Item, items, table
from fused_vit.plan import Plan, Step, cost
from fused_vit.spec import TowerSpec
from fused_vit.weights.pack import pack_tower
from fused_vit.workspace import Workspace

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A plan with weights, and a pack in buffers of a bucket's size that, unlike a workspace's, share no memory.

    So a step can run again, alone, long after others have run.
    """

    plan: Plan
    weights: Tensors
    buffers: dict[str, torch.Tensor]
    tile: int
    pack: Sequence[Item]

    def launch(self, step: Step) -> None:
        launch_step(step, self.weights, self.buffers, self.tile)

    def run(self) -> None:
        """What a captured graph replays, launch by launch."""
        launch(self.plan, self.weights, self.buffers, self.tile)


def load(plan: Plan, weights: Tensors, grids: Sequence[Sequence[int]], bucket: Bucket, tile: int) -> Loaded:
    """Random pixels of these grids in a bucket, nothing run yet."""
    weight = weights["patch_embed.weight"]
    pixels = sum(t * h * w for t, h, w in grids)
    pack = items(plan.spec, grids, pixels)
    views = Workspace(plan, [bucket], weight.dtype, weight.device, tile).buffers(bucket)
    buffers = {name: torch.zeros_like(view) for name, view in views.items()}
    features = plan.spec.patch.features
    noise = torch.randn(pixels, features, generator=torch.Generator().manual_seed(0))
    buffers["pixels"][:pixels, :features].copy_(noise)
    integers = torch.tensor(table(pack, tile), dtype=torch.int32)
    buffers["table"][: len(integers)].copy_(integers)
    return Loaded(plan, weights, buffers, tile, pack)


def random_weights(spec: TowerSpec, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """Seeded weights of a spec, of sizes that keep rows at their scale."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = {(part.name, part.block): part.shape for part in parts(spec)}

    def read(part: str, block: int) -> torch.Tensor:
        shape = shapes[part, block]
        noise = torch.randn(shape, generator=generator, device=device)
        if len(shape) == 1:
            return 1 + 0.1 * noise if part.endswith("weight") else 0.1 * noise
        return noise * noise[0].numel() ** -0.5

    return pack_tower(spec, read, dtype=dtype, device=device)


def one_of_each(spec: TowerSpec) -> TowerSpec:
    """The tower with the fewest blocks that have every kind of step: one, or two where windows alternate."""
    deepstack, windows = (0,) if spec.deepstack else (), spec.attention.windows
    if windows is None:
        return replace(spec, depth=1, deepstack=deepstack)
    attention = replace(spec.attention, windows=replace(windows, full=(1,)))
    return replace(spec, depth=2, deepstack=deepstack, attention=attention)


def kind(step: Step) -> str:
    """A step's name without the numbers of blocks and mergers; windows are another kind of attention."""
    name = ".".join(part for part in step.name.split(".") if not part.isdecimal())
    return f"{name}, windows" if dict(step.options).get("windowed") else name


def kinds(plan: Plan) -> dict[str, list[Step]]:
    """Steps that do the same with other weights, in the plan's order."""
    found: dict[str, list[Step]] = {}
    for step in plan.steps:
        found.setdefault(kind(step), []).append(step)
    return found


def used(loaded: Loaded, name: str, step: Step) -> torch.Tensor:
    """The part of a buffer that holds data: what lies behind it is the bucket's room."""
    shape = next(buffer.shape for buffer in loaded.plan.buffers if buffer.name == name)
    merged = sum(item.merged for item in loaded.pack)
    tiles, windows = loaded.buffers["table"][[TILES, WINDOWS]].tolist()
    counts = {"rows": sum(item.rows for item in loaded.pack), "merged": merged, "tiles": tiles, "windows": windows}
    if name == "pixels":
        counts["rows"] = sum(item.pixel_rows for item in loaded.pack)
    buffer = loaded.buffers[name]
    for dim, symbol in enumerate(shape):
        if symbol in counts:
            buffer = buffer.narrow(dim, 0, counts[str(symbol)])
    return buffer


def times(loaded: Loaded) -> dict[str, float]:
    """Microseconds of one launch of every kind, each from a graph of the plan's own: every block's weights in turn."""
    loaded.run()
    return {
        name: graph_us([partial(loaded.launch, step) for step in steps]) for name, steps in kinds(loaded.plan).items()
    }


def roofline(us: Mapping[str, float], plan: Plan, pack: Sequence[Item], roof: Roof) -> list[dict[str, Any]]:
    """What each kind of step takes, beside what it must do at the least and how much of the tower's time it is."""
    costs, groups = cost(plan, pack), kinds(plan)
    total = sum(len(steps) * us[name] for name, steps in groups.items())
    rows = []
    for name, steps in groups.items():
        least = costs[steps[0].name]
        achieved = speed(us[name], least.flops, least.bytes, roof)
        floor = floor_us(least.flops, least.bytes, roof)
        rows.append(
            {"step": name, "launches": len(steps), **achieved, "floor_us": floor, "ratio": us[name] / floor}
            | {"of_tower": len(steps) * us[name] / total}
        )
    return rows


def without_attention_us(loaded: Loaded) -> float:
    """The plan's launches, attention left out, as one graph."""
    steps = [step for step in loaded.plan.steps if step.op != "attention"]
    loaded.run()

    def all_of_them() -> None:
        for step in steps:
            loaded.launch(step)

    return graph_us([all_of_them], least=1)
