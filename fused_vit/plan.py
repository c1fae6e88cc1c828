"""Plan: a tower compiled into a flat tuple of steps over named buffers. Pure data; `str(plan)` is its listing.

The same plan is defined by torch, launched by Triton, captured into CUDA graphs (executor, graphs) and costed (cost).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from .packing import CELLS, MERGED, ROWS, TILES, WINDOWS, Item
from .spec import ConvMergerSpec, MergerSpec, MlpSpec, NormSpec, PoolSpec, TowerSpec

PAD = 64  # depths of our own buffers are padded to this, so that no kernel masks k; weights.pack says the same
# Rows of pixels and of heads start at multiples of this: 588 pixels could not be read 16 bytes at a time, and the
# values of a head of 72 or 88 get a column for the softmax's denominator (kernels.attention)
ALIGN = 16
SUM_COLUMNS = 64

Dim = int | Literal["rows", "merged", "tiles", "windows", "table"]


@dataclass(frozen=True, slots=True)
class Buffer:
    """A tensor of the workspace; its symbolic dims get their size from a bucket."""

    name: str
    shape: tuple[Dim, ...]
    dtype: Literal["model", "float32", "int32", "uint8"] = "model"


@dataclass(frozen=True, slots=True)
class Step:
    """One launch: op (a key of kernels.ops.OPS) over buffers and packed weights; "" stands for an absent one.

    count: header place of its rows; matmul: useful columns and depth, for its cost; aside: may run beside what follows,
    until a step needs a buffer that it touches.
    """

    name: str
    op: str
    writes: tuple[str, ...]
    reads: tuple[str, ...]
    weights: tuple[str, ...]
    count: int | None
    options: tuple[tuple[str, Any], ...] = ()
    matmul: tuple[int, int] = (0, 0)
    aside: bool = False

    @property
    def touched(self) -> set[str]:
        """Buffers, but for the table, which every step reads."""
        return {*self.reads, *self.writes} - {"", "table"}


@dataclass(frozen=True, slots=True)
class Plan:
    """outputs: the buffers of last_hidden_state, pooler_output ("" where the tower has none), deepstack features,

    and, where the spec wants it, the last block's output.
    """

    spec: TowerSpec
    buffers: tuple[Buffer, ...]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.steps)} launches over {len(self.buffers)} buffers"]
        for buffer in self.buffers:
            lines.append(f"  {buffer.name:<12} [{', '.join(map(str, buffer.shape))}] {buffer.dtype}")
        for step in self.steps:
            options = " ".join(f"{k}={v}" for k, v in step.options)
            writes, reads = (", ".join(filter(None, names)) for names in (step.writes, step.reads))
            lines.append(f"  {step.name:<18} {writes} = {step.op}({reads}) {options}".rstrip())
        return "\n".join(lines)

    def output_buffers(self) -> list[Buffer | None]:
        """The buffer of each output, None where the tower has none."""
        by_name = {buffer.name: buffer for buffer in self.buffers}
        return [by_name.get(name) for name in self.outputs]

    def finals(self) -> dict[str, int]:
        """Outputs that a launch may leave elsewhere (kernels.address), and the step from which on: their last writer.

        Not those that a matmul reads afterwards, whose operands have their place from the start, nor one that is two
        outputs, nor more than the table has cells for, one of which is for the pixels.
        """
        last = {name: i for i, step in enumerate(self.steps) for name in step.writes}
        matmuls = [(i, step) for i, step in enumerate(self.steps) if step.matmul[0]]
        read = {name for i, step in matmuls for name in step.reads if last.get(name, i) < i}
        once = [name for name in self.outputs if name and name not in read and self.outputs.count(name) == 1]
        return {name: last[name] for name in once[: CELLS - 1]}

    def lean(self) -> Plan:
        """Without buffers for finals that are elsewhere from their only writer on."""
        written = Counter(name for step in self.steps for name in step.writes)
        gone = {name for name in self.finals() if written[name] == 1}
        return replace(self, buffers=tuple(buffer for buffer in self.buffers if buffer.name not in gone))


def padded(width: int) -> int:
    return -(-width // PAD) * PAD


def build_plan(spec: TowerSpec) -> Plan:
    """The listing for a tower: unfold, patch embedding, five launches a block, three a merger."""
    steps = [_unfold(spec), *_patch_embed(spec)]
    deepstack = []  # features come in the order of blocks, their mergers' names in the order of the list
    for i in range(spec.depth):
        steps += _block(spec, i)
        if i in spec.deepstack:
            name = f"deepstack.{spec.deepstack.index(i)}"
            deepstack.append(name)
            assert isinstance(spec.merger, MergerSpec), "deepstack mergers are like the last one"
            steps += _merger(spec, spec.merger, name, "x", name, whole=True)
    tail, last, pooled = _tail(spec)
    steps += tail
    touched = {name for step in steps for name in (*step.reads, *step.writes)} | {"table"}
    buffers = tuple(buffer for buffer in _buffers(spec, deepstack) if buffer.name in touched)
    hidden = ("x",) if spec.hidden_state else ()
    return Plan(spec, buffers, tuple(steps), (last, pooled, *deepstack, *hidden))


def _buffers(spec: TowerSpec, deepstack: Sequence[str]) -> list[Buffer]:
    """Every buffer that a tower may have; build_plan keeps those that its steps touch."""
    att, merger = spec.attention, spec.merger
    taps = _taps(spec)
    merged_width, out = spec.width * spec.patches, getattr(merger, "out", 0)
    if isinstance(merger, PoolSpec):
        out = merger.projector.out if merger.projector else 0
    gate = padded(merger.mlp.width) if isinstance(merger, ConvMergerSpec) else 0
    return [
        Buffer("table", ("table",), "int32"),
        Buffer("pixels", ("rows", -(-spec.patch.features // ALIGN) * ALIGN), "uint8" if spec.patch.bytes else "model"),
        Buffer("places", (2, "rows"), "float32"),
        Buffer("tap_index", ("rows", taps), "int32"),
        Buffer("tap_weight", ("rows", taps), "float32"),
        Buffer("source", ("rows",), "int32"),
        Buffer("tiles", ("tiles", 4), "int32"),
        Buffer("windows", ("windows", 4), "int32"),
        Buffer("x", ("rows", spec.width)),
        Buffer("sums", (2, -(-spec.width // SUM_COLUMNS), "rows"), "float32"),
        Buffer("qkv", (att.heads + 2 * att.kv_heads, "rows", -(-att.head_dim // ALIGN) * ALIGN)),
        Buffer("context", ("rows", att.heads * att.head_dim)),
        Buffer("hidden", ("rows", padded(spec.mlp.width))),
        Buffer("last", ("rows", spec.width)),
        Buffer("frames", ("merged", spec.patches, spec.width)),
        Buffer("normed", ("merged", merged_width)),
        Buffer("down", ("merged", out)),
        Buffer("merging", ("merged", out if gate else merged_width)),
        Buffer("gating", ("merged", gate)),
        Buffer("pooled", ("merged", out)),
        *(Buffer(name, ("merged", out)) for name in deepstack),
    ]


def _taps(spec: TowerSpec) -> int:
    """Table rows that a patch reads: 4 or 16 for its place, one more for its frame."""
    if spec.position is None:
        return 0
    return (4 if spec.position.mode == "bilinear" else 16) + (spec.position.frames > 0)


def _weights(step: str, normed: bool = False) -> tuple[str, ...]:
    return (f"{step}.weight", f"{step}.bias") + ((f"{step}.colsum",) if normed else ())


def _norm(norm: NormSpec) -> tuple[tuple[str, Any], ...]:
    return ("eps", norm.eps), ("centred", norm.kind == "layer")


def _unfold(spec: TowerSpec) -> Step:
    taps = ("tap_index", "tap_weight") if spec.position else ("", "")
    writes = (
        "places" if spec.rope else "", *taps, "source" if spec.gathers else "", "tiles",
        "windows" if spec.attention.windows else "",
    )  # fmt: skip
    windows, position = spec.attention.windows, spec.position
    options = (
        ("merge", spec.merge),
        ("raster", spec.patch.order == "raster"),
        ("class_token", spec.class_token),
        ("window", windows.side if windows else 0),
        ("side", position.side if position else 0),
        ("align_corners", position is not None and position.align_corners),
        ("taps", _taps(spec)),
    )
    return Step("unfold", "unfold", writes, ("table",), (), None, options)


def _patch_embed(spec: TowerSpec) -> list[Step]:
    """One launch; a norm between embedding and positions makes it two."""
    source = "source" if spec.gathers else ""
    taps = ("tap_index", "tap_weight") if spec.position else ("", "")
    positions = "position.weight" if spec.position else ""
    reads, weights = ("pixels", source), _weights("patch_embed")
    matmul, features = (spec.width, spec.patch.features), (("features", spec.patch.features),)
    name, writes = "patch_embed", ("x", "sums")
    if spec.patch.norm is None:
        return [Step(name, name, writes, (*reads, *taps), (*weights, positions), ROWS, features, matmul)]
    norm_weights = (*_norm_weights("patch_norm", spec.patch.norm), positions)
    options = (*_norm(spec.patch.norm), ("activation", "none"))
    return [
        Step(name, name, writes, (*reads, "", ""), (*weights, ""), ROWS, features, matmul),
        Step("patch_norm", "norm", writes, ("x", "", *taps), norm_weights, ROWS, options),
    ]


def _norm_weights(name: str, norm: NormSpec) -> tuple[str, str]:
    return f"{name}.weight", f"{name}.bias" if norm.kind == "layer" else ""


def _block(spec: TowerSpec, i: int) -> list[Step]:
    att, mlp, block, norm = spec.attention, spec.mlp, f"block.{i}", _norm(spec.norm)
    places, frequencies = ("places", "frequencies") if spec.rope else ("", "")
    gain = f"{block}.qkv.gain" if att.qk_norm else ""
    heads = (
        ("head_dim", att.head_dim),
        ("rotated", att.heads + att.kv_heads if spec.rope else 0),
        ("normed", att.heads + att.kv_heads if att.qk_norm else 0),
        ("head_eps", att.qk_norm.eps if att.qk_norm else 0.0),
    )
    windowed = att.windows is not None and i not in att.windows.full
    tiles, count = ("windows", WINDOWS) if windowed else ("tiles", TILES)
    context = att.heads * att.head_dim
    return [
        Step(
            f"{block}.qkv", "qkv", ("qkv",), ("x", "sums", places),
            (*_weights(f"{block}.qkv", True), gain, frequencies), ROWS, (*heads, *norm), (att.qkv_width, spec.width),
        ),
        Step(
            f"{block}.attention", "attention", ("context",), ("qkv", tiles), (), count,
            (("heads", att.heads), ("head_dim", att.head_dim), ("windowed", windowed)),
        ),
        Step(
            f"{block}.proj", "residual", ("x", "sums"), ("x", "context"), _weights(f"{block}.proj"), ROWS, (),
            (spec.width, context),
        ),
        Step(
            f"{block}.fc1", "linear", ("hidden",), ("x", "sums", ""), _weights(f"{block}.fc1", True), ROWS,
            _linear(spec.norm, mlp), ((1 + mlp.gated) * mlp.width, spec.width),
        ),
        Step(
            f"{block}.fc2", "residual", ("x", "sums"), ("x", "hidden"), _weights(f"{block}.fc2"), ROWS, (),
            (spec.width, mlp.width),
        ),
    ]  # fmt: skip


def _linear(norm: NormSpec | None = None, act: MlpSpec | str = "none") -> tuple[tuple[str, Any], ...]:
    """Options of a linear step; a norm is only a number and a kind to one that has no row sums."""
    gated, limit = (act.gated, act.limit) if isinstance(act, MlpSpec) else (False, None)
    return (
        *_norm(norm or NormSpec("layer", 0.0)), ("activation", act.activation if isinstance(act, MlpSpec) else act),
        ("gated", gated), ("limit", limit),
    )  # fmt: skip


def _tail(spec: TowerSpec) -> tuple[list[Step], str, str]:
    """What follows the blocks, and the buffers of last_hidden_state and pooler_output ("": none)."""
    last, steps = "x", []
    if spec.final_norm:
        last = "last"  # in the order of pixel_values, as a raster tower returns it
        source = "source" if spec.patch.order == "raster" and spec.merge > 1 else ""
        options = (*_norm(spec.final_norm), ("activation", "none"))
        weights = (*_norm_weights("final_norm", spec.final_norm), "")
        steps.append(Step("final_norm", "norm", ("last", ""), ("x", source, "", ""), weights, ROWS, options))
    if isinstance(spec.merger, MergerSpec):
        scatter = "source" if spec.attention.windows else ""
        return steps + _merger(spec, spec.merger, "merger", "x", "pooled", scatter), last, "pooled"
    if isinstance(spec.merger, ConvMergerSpec):
        return steps + _conv_merger(spec, spec.merger), "down", "pooled"
    if isinstance(spec.merger, PoolSpec):
        projector = spec.merger.projector
        source = "source" if spec.gathers else ""
        pool = (("patches", spec.patches),)
        steps.append(Step("pool", "pool", ("frames",), ("last", source, "table"), (), MERGED, pool))
        if projector is None:
            return steps, last, "frames"
        return steps + _merger(spec, projector, "merger", "frames", "pooled"), last, "pooled"
    return steps, last, ""


def _merger(
    spec: TowerSpec, merger: MergerSpec, name: str, x: str, output: str, scatter: str = "", whole: bool = False
) -> list[Step]:
    """Three launches over merged rows: norm, linear + GELU, linear. The patches of a merged row are neighbours.

    whole: a deepstack merger's: the norm is of the merged row, not of each patch, and blocks follow. scatter: the order
    in which merged rows are stored, where it is not the order in which they run.
    """
    wide = spec.width * spec.patches
    up, down = _linear(None, "gelu"), (*_linear(), ("scatter", spec.patches)) if scatter else _linear()
    first, second = ((*_weights(f"{name}.{n}"), "") for n in ("fc1", "fc2"))
    return [
        _merger_norm(spec, merger.norm, f"{name}.norm", x, whole),
        Step(f"{name}.fc1", "linear", ("merging",), ("normed", "", ""), first, MERGED, up, (wide, wide), aside=whole),
        Step(
            f"{name}.fc2", "linear", (output,), ("merging", "", scatter), second, MERGED, down, (merger.out, wide),
            aside=whole,
        ),
    ]  # fmt: skip


def _merger_norm(spec: TowerSpec, norm: NormSpec, name: str, x: str, whole: bool = False) -> Step:
    """Of each patch, or of the whole merged row, into merged rows; its gamma and beta are in the linear behind it."""
    options = (*_norm(norm), ("activation", "none"), ("merge", spec.patches), ("groups", 1 if whole else spec.patches))
    return Step(name, "norm", ("normed", ""), (x, "", "", ""), ("", "", ""), MERGED, options)


def _conv_merger(spec: TowerSpec, merger: ConvMergerSpec) -> list[Step]:
    """Six launches of GLM-4V's merger; its convolution reads merged rows as one, like any merger."""
    wide, out, mlp = spec.width * spec.patches, merger.out, merger.mlp

    def linear(name: str, y: str, x: str, options: tuple[tuple[str, Any], ...], matmul: tuple[int, int]) -> Step:
        return Step(name, "linear", (y,), (x, "", ""), (*_weights(name), ""), MERGED, options, matmul)

    norm = (*_norm(merger.post_norm), ("activation", "gelu"))
    norm_weights = (*_norm_weights("merger.post_norm", merger.post_norm), "")
    return [
        _merger_norm(spec, merger.norm, "merger.norm", "x"),
        linear("merger.down", "down", "normed", _linear(), (out, wide)),
        linear("merger.proj", "merging", "down", _linear(), (out, out)),
        Step("merger.post_norm", "norm", ("merging", ""), ("merging", "", "", ""), norm_weights, MERGED, norm),
        linear("merger.fc1", "gating", "merging", _linear(None, mlp), (2 * mlp.width, out)),
        linear("merger.fc2", "pooled", "gating", _linear(), (out, mlp.width)),
    ]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a step must do at the least: useful FLOPs (2 per multiply-add) and bytes through device memory."""

    flops: float
    bytes: float


def cost(plan: Plan, pack: Sequence[Item], itemsize: int = 2) -> dict[str, Cost]:
    """FLOPs and bytes of each step for a pack of images: matmuls and attention counted without padding."""
    spec, att = plan.spec, plan.spec.attention
    rows, merged = sum(item.rows for item in pack), sum(item.merged for item in pack)
    context = att.heads * att.head_dim
    dims = {"rows": rows, "merged": merged}
    sizes = {
        b.name: math.prod(d if isinstance(d, int) else dims[d] for d in b.shape)
        for b in plan.buffers
        if b.dtype == "model"
    }
    costs = {}
    for step in plan.steps:
        m = merged if step.count == MERGED else rows
        n, k = step.matmul
        if step.op == "attention":
            windowed = dict(step.options)["windowed"]
            pairs = sum(item.pairs(windowed, att.windows.side if att.windows else 0) for item in pack)
            costs[step.name] = Cost(4.0 * pairs * context, itemsize * m * (context + att.qkv_width))
        elif n:
            residual = m * n if step.op == "residual" else 0
            costs[step.name] = Cost(2.0 * m * n * k, itemsize * (m * k + n * k + m * n + residual))
        elif step.op == "unfold":
            costs[step.name] = Cost(0.0, 4.0 * rows * (att.head_dim + 2 * _taps(spec)))
        else:  # norm, pool: every row in and out once
            costs[step.name] = Cost(0.0, 1.0 * itemsize * (sizes[step.reads[0]] + sizes[step.writes[0]]))
    return costs
