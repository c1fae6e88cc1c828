"""Plan: a tower compiled into a flat tuple of steps over named buffers. Pure data; `str(plan)` is its listing.

The same plan is defined by torch, launched by Triton, captured into CUDA graphs (executor, graphs) and costed (cost).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .packing import Item
from .spec import TowerSpec

PAD = 64  # depths of our own buffers are padded to this, so that no kernel masks k; weights.pack says the same
SUM_COLUMNS = 64
ROWS, MERGED, TILES = 0, 1, 4  # places in the table's header where a step's row count lives

Dim = int | Literal["rows", "merged", "tiles", "table"]


@dataclass(frozen=True, slots=True)
class Buffer:
    """A tensor of the workspace; its symbolic dims get their size from a bucket."""

    name: str
    shape: tuple[Dim, ...]
    dtype: Literal["model", "float32", "int32"] = "model"


@dataclass(frozen=True, slots=True)
class Step:
    """One launch: op (a key of kernels.ops.OPS) over buffers and packed weights. count: header place of its rows."""

    name: str
    op: str
    writes: tuple[str, ...]
    reads: tuple[str, ...]
    weights: tuple[str | None, ...]
    count: int | None
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    spec: TowerSpec
    buffers: tuple[Buffer, ...]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]  # last_hidden_state, pooler_output, then the deepstack features in order

    def __str__(self) -> str:
        lines = [f"{len(self.steps)} launches over {len(self.buffers)} buffers"]
        for buffer in self.buffers:
            lines.append(f"  {buffer.name:<12} [{', '.join(map(str, buffer.shape))}] {buffer.dtype}")
        for step in self.steps:
            options = " ".join(f"{k}={v}" for k, v in step.options)
            lines.append(
                f"  {step.name:<18} {', '.join(step.writes)} = {step.op}({', '.join(step.reads)}) {options}".rstrip()
            )
        return "\n".join(lines)


def padded(width: int) -> int:
    return -(-width // PAD) * PAD


def build_plan(spec: TowerSpec) -> Plan:
    """The listing for a tower: unfold, patch embedding, five launches a block, two a merger."""
    att, merge = spec.attention, spec.merger.patches
    merged_width, centred = spec.width * merge, spec.norm.kind == "layer"
    norm = (("eps", spec.norm.eps), ("centred", centred))
    steps = [_unfold(spec), _patch_embed(spec)]
    outputs = ["x", "pooled"]
    for i in range(spec.depth):
        block = f"block.{i}"
        heads = (("head_dim", att.head_dim), ("rotated", att.heads + att.kv_heads if spec.rope else 0))
        steps += [
            Step(
                f"{block}.qkv", "qkv", ("qkv",), ("x", "sums", "cos", "sin"), _names(f"{block}.qkv", True), ROWS,
                (*heads, *norm),
            ),
            Step(f"{block}.attention", "attention", ("context",), ("qkv", "tiles"), (), TILES, (("heads", att.heads),)),
            Step(f"{block}.proj", "residual", ("x", "sums"), ("x", "context"), _names(f"{block}.proj"), ROWS),
            Step(
                f"{block}.fc1", "linear", ("hidden",), ("x", "sums"), _names(f"{block}.fc1", True), ROWS,
                (("merge", 1), ("groups", 1), *norm, ("activation", spec.mlp.activation)),
            ),
            Step(f"{block}.fc2", "residual", ("x", "sums"), ("x", "hidden"), _names(f"{block}.fc2"), ROWS),
        ]  # fmt: skip
        if i in spec.deepstack:
            k = spec.deepstack.index(i)
            outputs.append(f"deepstack.{k}")
            steps += _merger(spec, f"deepstack.{k}", f"deepstack.{k}", groups=1)
    steps += _merger(spec, "merger", "pooled", groups=merge)
    buffers = (
        Buffer("table", ("table",), "int32"),
        Buffer("pixels", ("rows", spec.patch.features)),
        Buffer("cos", ("rows", att.head_dim // 2), "float32"),
        Buffer("sin", ("rows", att.head_dim // 2), "float32"),
        Buffer("tap_index", ("rows", 4), "int32"),
        Buffer("tap_weight", ("rows", 4), "float32"),
        Buffer("tiles", ("tiles", 4), "int32"),
        Buffer("x", ("rows", spec.width)),
        Buffer("sums", (2, -(-spec.width // SUM_COLUMNS), "rows"), "float32"),
        Buffer("qkv", (att.heads + 2 * att.kv_heads, "rows", att.head_dim)),
        Buffer("context", ("rows", att.heads * att.head_dim)),
        Buffer("hidden", ("rows", padded(spec.mlp.width))),
        Buffer("merging", ("merged", merged_width)),
        Buffer("pooled", ("merged", spec.merger.out)),
        *(Buffer(f"deepstack.{k}", ("merged", spec.merger.out)) for k in range(len(spec.deepstack))),
    )
    return Plan(spec, buffers, tuple(steps), tuple(outputs))


def _names(step: str, normed: bool = False) -> tuple[str, ...]:
    return (f"{step}.weight", f"{step}.bias") + ((f"{step}.colsum",) if normed else ())


def _unfold(spec: TowerSpec) -> Step:
    writes = ("cos", "sin", "tap_index", "tap_weight", "tiles")
    options = (
        ("merge", spec.merger.size),
        ("raster", spec.patch.order == "raster"),
        ("interleaved", spec.rope is not None and spec.rope.layout == "w_h_interleaved"),
        ("side", spec.position.side if spec.position else 0),
    )
    return Step("unfold", "unfold", writes, ("table",), ("inv_freq",), None, options)


def _patch_embed(spec: TowerSpec) -> Step:
    weights = (*_names("patch_embed"), "position.weight")
    return Step("patch_embed", "patch_embed", ("x", "sums"), ("pixels", "tap_index", "tap_weight"), weights, ROWS)


def _merger(spec: TowerSpec, name: str, output: str, groups: int) -> list[Step]:
    """Two launches: norm + linear + GELU over merged rows, then linear. The patches of a merged row are neighbours."""
    norm = spec.merger.norm
    shared = (("eps", norm.eps), ("centred", norm.kind == "layer"))
    up = (("merge", spec.merger.patches), ("groups", groups), *shared, ("activation", "gelu"))
    down = (("merge", 1), ("groups", 0), *shared, ("activation", "none"))
    second = (f"{name}.fc2.weight", f"{name}.fc2.bias", None)
    return [
        Step(f"{name}.fc1", "linear", ("merging",), ("x", "sums"), _names(f"{name}.fc1", True), MERGED, up),
        Step(f"{name}.fc2", "linear", (output,), ("merging", ""), second, MERGED, down),
    ]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a step must do at the least: useful FLOPs (2 per multiply-add) and bytes through device memory."""

    flops: float
    bytes: float


def cost(plan: Plan, pack: Sequence[Item], itemsize: int = 2) -> dict[str, Cost]:
    """FLOPs and bytes of each step for a pack of images: matmuls and attention counted without padding."""
    spec = plan.spec
    rows = sum(item.rows for item in pack)
    merged = rows // spec.merger.patches
    pairs = sum(item.segments * (item.rows // item.segments) ** 2 for item in pack)
    att, wide = spec.attention, spec.width * spec.merger.patches
    shapes = {  # rows, columns, depth of a step's matmul
        "patch_embed": (rows, spec.width, spec.patch.features),
        "qkv": (rows, att.qkv_width, spec.width),
        "proj": (rows, spec.width, att.heads * att.head_dim),
        "fc1": (rows, spec.mlp.width, spec.width),
        "fc2": (rows, spec.width, spec.mlp.width),
    }
    costs = {}
    for step in plan.steps:
        kind = step.name.rpartition(".")[2]
        if step.count == MERGED:
            m, n, k = merged, wide if kind == "fc1" else spec.merger.out, wide
        elif step.op == "attention":
            width = att.heads * att.head_dim
            costs[step.name] = Cost(4.0 * pairs * width, itemsize * rows * (width + att.qkv_width))
            continue
        elif step.op == "unfold":
            costs[step.name] = Cost(0.0, 4.0 * rows * (att.head_dim + 8))
            continue
        else:
            m, n, k = shapes[kind]
        residual = m * n if step.op == "residual" else 0
        costs[step.name] = Cost(2.0 * m * n * k, itemsize * (m * k + n * k + m * n + residual))
    return costs
