"""The plan: its listing, its launch count, its costs, and buffers that never overlap while both are alive."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fused_vit import executor
from fused_vit.batch import make_batch
from fused_vit.buckets import Bucket, ladder
from fused_vit.packing import CELLS, Item
from fused_vit.plan import Step, build_plan, cost
from fused_vit.spec import TowerSpec
from fused_vit.towers import parse_config
from fused_vit.workspace import Workspace, place, shapes
from tests.kernels import resources

UNFOLD = "merge=2 raster=False class_token=False window=0 side=6 align_corners=True taps=4"
PLAIN = "gated=False limit=None"
LISTING = """\
13 launches over 15 buffers
  table        [table] int32
  pixels       [rows, 96] model
  places       [2, rows] float32
  tap_index    [rows, 4] int32
  tap_weight   [rows, 4] float32
  tiles        [tiles, 4] int32
  x            [rows, 32] model
  sums         [2, 1, rows] float32
  qkv          [6, rows, 16] model
  context      [rows, 32] model
  hidden       [rows, 64] model
  normed       [merged, 128] model
  merging      [merged, 128] model
  pooled       [merged, 24] model
  deepstack.0  [merged, 24] model
  unfold             places, tap_index, tap_weight, tiles = unfold(table) UNFOLD
  patch_embed        x, sums = patch_embed(pixels, tap_index, tap_weight) features=96
  block.0.qkv        qkv = qkv(x, sums, places) head_dim=16 rotated=4 normed=0 head_eps=0.0 eps=1e-06 centred=True
  block.0.attention  context = attention(qkv, tiles) heads=2 head_dim=16 windowed=False
  block.0.proj       x, sums = residual(x, context)
  block.0.fc1        hidden = linear(x, sums) eps=1e-06 centred=True activation=gelu_tanh PLAIN
  block.0.fc2        x, sums = residual(x, hidden)
  deepstack.0.norm   normed = norm(x) eps=1e-06 centred=True activation=none merge=4 groups=1
  deepstack.0.fc1    merging = linear(normed) eps=0.0 centred=True activation=gelu PLAIN
  deepstack.0.fc2    deepstack.0 = linear(merging) eps=0.0 centred=True activation=none PLAIN
  merger.norm        normed = norm(x) eps=1e-06 centred=True activation=none merge=4 groups=4
  merger.fc1         merging = linear(normed) eps=0.0 centred=True activation=gelu PLAIN
  merger.fc2         pooled = linear(merging) eps=0.0 centred=True activation=none PLAIN"""


def spec_of(**vision: object) -> TowerSpec:
    return parse_config({"model_type": "qwen3_vl", "vision_config": {"out_hidden_size": 4096, **vision}})


TINY: Mapping[str, object] = {
    "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 56, "patch_size": 4, "out_hidden_size": 24,
    "num_position_embeddings": 36, "deepstack_visual_indexes": [0],
}  # fmt: skip


def test_the_listing() -> None:
    listing = str(build_plan(spec_of(**TINY)))
    wanted = LISTING.replace("10 launches", f"{2 + 5 + 2 * 2} launches")
    assert listing == wanted.replace("UNFOLD", UNFOLD).replace("PLAIN", PLAIN)


@pytest.mark.parametrize("spec", [spec_of(), spec_of(deepstack_visual_indexes=[])], ids=["8b", "no deepstack"])
def test_five_launches_a_block_three_a_merger(spec: TowerSpec) -> None:
    assert len(build_plan(spec).steps) == 2 + 5 * spec.depth + 3 * (1 + len(spec.deepstack))


def test_costs_are_the_towers_arithmetic() -> None:
    """0.91 GFLOP of matmul a patch, and 124.4 kFLOP of attention a patch and row of its segment, on the 8B's tower."""
    plan = build_plan(spec_of())
    costs = cost(plan, [Item(3, 64, 32, 1)])
    attention = sum(c.flops for name, c in costs.items() if name.endswith("attention"))
    linear = sum(c.flops for name, c in costs.items() if not name.endswith("attention"))
    assert attention == 124_416 * 2048 * 3 * 2048
    assert linear / (3 * 2048) == pytest.approx(0.906e9, rel=2e-3)
    assert set(costs) == {step.name for step in plan.steps}


@pytest.mark.parametrize("tokens", [4, 100, 256, 8160])
@pytest.mark.parametrize("tower", resources.TOWERS)
def test_no_step_overwrites_what_a_later_one_reads(tower: str, tokens: int) -> None:
    """Steps played through over the slab's bytes: what a step reads, and every output at the end, is still whole."""
    plan, bucket = resources.planned(tower, "meta")[0], Bucket(tokens, 16)
    offsets, total = place(plan, bucket, 2, 64)
    bytes_of = {"float32": 4, "int32": 4, "model": 2, "uint8": 1}
    shape = shapes(plan, bucket, 64)
    sizes = {b.name: bytes_of[b.dtype] * math.prod(shape[b.name]) for b in plan.buffers}
    assert all(offsets[name] % 256 == 0 and offsets[name] + sizes[name] <= total for name in sizes)
    whole = {"table", "pixels"}  # what a call fills
    for step in plan.steps:
        needed = {name for name in step.reads if name} | {"table"}
        assert needed <= whole, f"{step.name} reads {needed - whole}, which others have overwritten"
        for name in filter(None, step.writes):
            begin, end = offsets[name], offsets[name] + sizes[name]
            whole -= {other for other in whole if offsets[other] < end and begin < offsets[other] + sizes[other]}
            whole.add(name)
        assert needed <= whole, f"{step.name} overwrites what it reads"
    assert {name for name in plan.outputs if name} <= whole


@pytest.mark.parametrize("tower", resources.TOWERS)
def test_finals_are_the_outputs_that_no_matmul_reads(tower: str) -> None:
    """From their last writer on they are elsewhere; a lean workspace lacks their buffers, and no others."""
    plan, bucket = resources.planned(tower, "meta")[0], Bucket(8192, 64)
    outputs, finals, kept = set(filter(None, plan.outputs)), plan.finals(), {b.name for b in plan.lean().buffers}
    for name in outputs:
        last = max(i for i, step in enumerate(plan.steps) if name in step.writes)
        readers = [step for step in plan.steps[last + 1 :] if name in step.reads]
        assert (finals.get(name) == last) == all(step.op in ("norm", "pool") for step in readers)
        elsewhere = name in finals and sum(name in step.writes for step in plan.steps) == 1
        assert elsewhere == (name not in kept)
    assert kept | outputs == {b.name for b in plan.buffers} and set(finals) <= outputs and "pooled" not in kept
    assert place(plan.lean(), bucket, 2, 64)[1] <= place(plan, bucket, 2, 64)[1]


def test_what_is_two_outputs_has_no_one_address() -> None:
    """Without a final norm the last block's output is last_hidden_state, too: both are copies of one buffer."""
    plan = build_plan(dataclasses.replace(spec_of(), hidden_state=True))
    assert plan.outputs.count("x") == 2 and "x" not in plan.finals() and "pooled" in plan.finals()


def test_a_table_has_cells_for_sixteen_addresses() -> None:
    """One is for the pixels; outputs beyond the others stay in the workspace."""
    plan = build_plan(spec_of(depth=20, deepstack_visual_indexes=list(range(20))))
    assert len(plan.finals()) == CELLS - 1 and list(plan.finals()) == list(plan.outputs)[: CELLS - 1]


class Streams:
    """Stands in for torch.cuda: two streams that log who waits for whom, and what is launched on which."""

    def __init__(self) -> None:
        self.log: list[tuple[str, Any]] = []
        self.main, self.side = (SimpleNamespace(wait_stream=partial(self.wait, name)) for name in ("main", "side"))
        self.current = self.main

    def wait(self, waiting: str, other: object) -> None:
        self.log.append((f"{waiting} waits", None))

    def current_stream(self) -> Any:
        return self.current

    @contextmanager
    def stream(self, other: Any) -> Iterator[None]:
        self.current = other
        yield
        self.current = self.main

    def launch_step(self, step: Step, *_: object, **options: object) -> None:
        on_side = self.current is self.side
        assert on_side == step.aside == ("programs" in options)
        self.log.append(("side" if on_side else "main", step))


@pytest.mark.parametrize("tokens", [4, 64, 256])
def test_steps_aside_share_no_memory_with_what_runs_beside_them(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph's launches played through: until it is waited for, no byte that a step aside touches is touched."""
    plan, bucket, streams = build_plan(spec_of()), Bucket(tokens, 16), Streams()
    monkeypatch.setattr(executor, "launch_step", streams.launch_step)
    monkeypatch.setattr(torch, "cuda", streams)
    executor.launch(plan, {}, {}, 64, streams.side)
    offsets, _ = place(plan, bucket, 2, 64)
    shape, bytes_of = shapes(plan, bucket, 64), {"float32": 4, "int32": 4, "model": 2}
    sizes = {b.name: bytes_of[b.dtype] * math.prod(shape[b.name]) for b in plan.buffers}

    def ranges(step: Step) -> list[tuple[int, int]]:
        return [(offsets[name], offsets[name] + sizes[name]) for name in step.touched]

    running: list[tuple[int, int]] = []
    fresh = False  # the side stream has waited for the step before
    for what, step in streams.log:
        if what == "main waits":
            running = []
        elif what == "side":
            assert fresh
            running += ranges(step)
        elif what == "main":
            taken = [a for a in ranges(step) for b in running if a[0] < b[1] and b[0] < a[1]]
            assert not taken, f"{step.name} touches what a step aside still uses"
        fresh = what == "side waits"
    assert not running, "the graph ends before its steps aside"
    assert [step.name for _, step in streams.log if step] == [step.name for step in plan.steps]
    assert sum(what == "side" for what, _ in streams.log) == 2 * 3


@pytest.mark.parametrize("tower", resources.TOWERS)
def test_buffers_of_steps_aside_live_until_they_are_waited_for(tower: str) -> None:
    """Of those that are no outputs, the last to touch one is not aside: executor.launch waits before it does."""
    plan = resources.planned(tower, "meta")[0]
    last = {name: step for step in plan.steps for name in step.touched}
    for step in plan.steps:
        if step.aside:
            assert all(name in plan.outputs or not last[name].aside for name in step.touched), step.name


def test_a_workspace_holds_the_largest_of_its_buckets_which_may_not_have_the_most_rows() -> None:
    plan = build_plan(spec_of())
    buckets = [Bucket(64, 40000), Bucket(128, 16)]
    assert place(plan, buckets[0], 2, 64)[1] > place(plan, buckets[1], 2, 64)[1]
    workspace = Workspace(plan, buckets, torch.bfloat16, torch.device("cpu"), 64)
    assert all(workspace.buffers(bucket) for bucket in buckets)


def test_the_slab_is_smaller_than_its_buffers() -> None:
    plan, bucket = build_plan(spec_of()), Bucket(8192, 128)
    bytes_of = {"float32": 4, "int32": 4, "model": 2, "uint8": 1}
    apart = sum(math.prod(shapes(plan, bucket, 64)[b.name]) * bytes_of[b.dtype] for b in plan.buffers)
    assert place(plan, bucket, 2, 64)[1] < 0.87 * apart


def test_a_workspace_made_in_inference_mode_serves_calls_outside_it() -> None:
    with torch.inference_mode():  # where vLLM makes its first call
        workspace = Workspace(build_plan(spec_of(**TINY)), [Bucket(256, 4)], torch.float32, torch.device("cpu"), 64)
        inside = workspace.buffers(Bucket(64, 2))["x"]
    outside = workspace.buffers(Bucket(64, 2))["x"]
    outside.copy_(torch.ones_like(outside))
    inside.copy_(2 * outside)
    assert (outside == 2).all()


def test_a_workspace_that_does_not_fit_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    plan, bucket = build_plan(spec_of(**TINY)), Bucket(256, 4)
    size = place(plan, bucket, 4, 64)[1]
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(torch.OutOfMemoryError, match=f"256 tokens, 4 segments, takes {size} bytes.*max_tokens"):
        Workspace(plan, [bucket], torch.float32, torch.device("cpu"), 64)


def test_tables_are_on_the_host_whatever_the_default_device() -> None:
    with torch.device("meta"):
        batch = make_batch(spec_of(), ladder(1024, False), 64, [[1, 4, 4]], 16)
    assert batch.packs[0].table.device.type == "cpu" and len(batch.packs[0].cells) == CELLS
