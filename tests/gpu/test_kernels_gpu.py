"""Every kernel on the GPU at real sizes, bf16 and fp16, against its definition in fp32; buffers poisoned with NaN."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch

from fused_vit.buckets import Bucket
from fused_vit.executor import launch_step
from fused_vit.packing import MERGED, Item, items, table
from fused_vit.plan import Plan, Step, build_plan
from fused_vit.spec import (
    AttentionSpec,
    MergerSpec,
    MlpSpec,
    NormSpec,
    PatchSpec,
    PoolSpec,
    PositionSpec,
    RopeSpec,
    TowerSpec,
)
from fused_vit.towers import parse_config
from fused_vit.workspace import Workspace
from tests.gpu.towers import random_weights
from tests.kernels.resources import TOWERS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
NORM = NormSpec("layer", 1e-6)
GRIDS = {
    "one": [[1, 28, 28]],
    "odd": [[1, 6, 10], [3, 14, 22], [1, 2, 2], [1, 36, 54]],
    "video": [[4, 8, 14], [2, 16, 16], [4, 8, 14]],
}


def tower(width: int, heads: int, mlp: int, out: int, head_dim: int | None = None) -> TowerSpec:
    return TowerSpec(
        depth=1, width=width, patch=PatchSpec(16, 2), position=PositionSpec(48), norm=NORM,
        attention=AttentionSpec(heads, heads, head_dim or width // heads), rope=RopeSpec(),
        mlp=MlpSpec(mlp, "gelu_tanh"),
        merger=MergerSpec(out, NORM), deepstack=(0,),
    )  # fmt: skip


SPECS = {
    "8b": tower(1152, 16, 4304, 4096),
    "2b": tower(1024, 16, 4096, 2048),
    "d80": tower(1280, 16, 5120, 1536),
    "d128": tower(1536, 12, 4096, 4096),
    "d96": tower(768, 8, 3072, 1024),
    "d88": tower(704, 8, 2816, 1024),
    **{
        name: parse_config(fields, projector="text_config" in fields)
        for name, fields in TOWERS.items()
        if name not in ("8B", "2B", "Qwen3.5-0.8B")
    },
}
CASES = [
    (spec, grid, dtype)
    for spec in SPECS
    for grid, dtypes in (("odd", ("bfloat16", "float16", "float32")), ("one", ("bfloat16",)), ("video", ("bfloat16",)))
    for dtype in dtypes
]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize(("name", "grid", "kind"), CASES)
def test_each_step_matches_its_definition(name: str, grid: str, kind: str) -> None:
    """Step by step from the same inputs: error to fp32 at most twice the definition's own error in this dtype."""
    from fused_vit.kernels.config import attention_config, device_arch
    from fused_vit.kernels.ops import OPS

    torch.manual_seed(1)
    spec, dtype = SPECS[name], getattr(torch, kind)
    plan, weights = build_plan(spec), random_weights(spec, dtype)
    patches = sum(t * h * w for t, h, w in GRIDS[grid])
    pack = items(spec, GRIDS[grid], patches)
    tile = attention_config(spec.attention.head_dim, dtype, device_arch(torch.device("cuda", 0))).block_m
    bucket = Bucket(sum(item.rows for item in pack) + 4 * 77, sum(item.segments for item in pack) + 9)
    workspace = Workspace(plan, [bucket], dtype, torch.device("cuda", 0), tile)
    workspace.slab.fill_(0xFF)
    buffers = workspace.buffers(bucket)
    integers = torch.tensor(table(pack, tile), dtype=torch.int32, device="cuda")
    buffers["table"].zero_()[: len(integers)] = integers
    buffers["pixels"][:patches, : spec.patch.features] = torch.randn(patches, spec.patch.features, device="cuda").to(
        dtype
    )
    exact = {k: v.double() if v.is_floating_point() else v for k, v in weights.items()}
    sizes = Sizes(plan, pack, integers)
    for step in plan.steps:
        before = {name: sizes.used(buffers[name], name, step).clone() for name in step.reads if name}
        launch_step(step, weights, buffers, tile)
        options = dict(step.options) | ({"tile": tile} if step.op == "unfold" else {})
        wide = run(
            OPS[step.op].ref,
            step,
            {k: v.double() if v.is_floating_point() else v for k, v in before.items()},
            exact,
            options,
        )
        same = run(OPS[step.op].ref, step, before, weights, options)
        for name, truth, peer in zip(step.writes, wide, same, strict=True):
            if not name:
                continue
            got = sizes.used(buffers[name], name, step)
            if name == "sums":
                got, truth, peer = got.sum(1), truth.sum(1), peer.sum(1)
            if not got.is_floating_point():
                assert torch.equal(got, truth.to(got.dtype)), (step.name, name)
                continue
            assert torch.isfinite(got).all(), (step.name, name)
            floor = {torch.float32: 2e-6}.get(got.dtype, torch.finfo(got.dtype).eps / 4)
            if name in ("sums", "places", "tap_weight"):
                floor = torch.finfo(dtype).eps / 4 if name == "sums" else 4e-6
            error, allowed = relative(got, truth), 2 * relative(peer, truth) + floor
            assert error <= allowed, f"{step.name} {name}: relative error {error:.2e}, allowed {allowed:.2e}"


SEGMENTS = (60, 300, 1, 128, 4096, 129, 1000, 2)


@pytest.mark.parametrize("gluon", [True, False], ids=["gluon", "plain"])
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads"), [(64, 16, 16), (72, 16, 16), (80, 16, 8), (88, 8, 8), (96, 8, 8), (128, 12, 12)]
)
def test_attention_in_both_forms(
    head_dim: int, heads: int, kv_heads: int, kind: str, gluon: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged segments, NaN past the last row, nothing stored there, and the same bits every time."""
    from fused_vit.kernels import attention, config

    monkeypatch.setattr(config, "has_gluon", lambda: gluon)
    dtype, rows = getattr(torch, kind), sum(SEGMENTS)
    chosen = config.attention_config(head_dim, dtype, config.device_arch(torch.device("cuda", 0)))
    if chosen.gluon != gluon:
        pytest.skip("this GPU has no such form")
    ends = torch.tensor((0, *SEGMENTS)).cumsum(0).tolist()
    step = chosen.block_m
    spans = [(q, min(q + step, b), a, b) for a, b in itertools.pairwise(ends) for q in range(a, b, step)]
    tiles = torch.tensor(spans, dtype=torch.int32, device="cuda")
    qkv = torch.randn(heads + 2 * kv_heads, rows + 200, -(-head_dim // 16) * 16, device="cuda")
    qkv[:heads] *= head_dim**-0.5 * 1.4427
    qkv[:, :, head_dim:] = 0
    qkv[:, :, head_dim : head_dim + 1] = 1
    qkv[:, rows:] = float("nan")
    qkv, out = qkv.to(dtype), torch.full((rows + 200, heads * head_dim), 7.0, dtype=dtype, device="cuda")
    count = torch.tensor([len(tiles)], dtype=torch.int32, device="cuda")
    nowhere = torch.cat([tiles, torch.full((9, 4), 1 << 20, dtype=torch.int32, device="cuda")])
    attention.attention(out, qkv, nowhere, heads=heads, head_dim=head_dim, windowed=False, count=count)
    first = out.clone()
    for _ in range(10):
        out.fill_(7.0)
        attention.attention(out, qkv, nowhere, heads=heads, head_dim=head_dim, windowed=False, count=count)
        assert torch.equal(out, first)
    truth = attention.attention_ref(qkv[:, :rows].double(), tiles, heads=heads, head_dim=head_dim, windowed=False)
    own = attention.attention_ref(qkv[:, :rows], tiles, heads=heads, head_dim=head_dim, windowed=False)
    assert relative(out[:rows], truth) <= 2 * relative(own, truth) and (out[rows:] == 7).all()


def run(ref, step: Step, reads: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], options):  # type: ignore[no-untyped-def]
    out = ref(
        *(reads[n] if n else None for n in step.reads), *(weights[n] if n else None for n in step.weights), **options
    )
    return out if isinstance(out, tuple) else (out,)


class Sizes:
    """How much of a buffer holds data."""

    def __init__(self, plan: Plan, pack: list[Item], integers: torch.Tensor) -> None:
        self.shapes = {buffer.name: buffer.shape for buffer in plan.buffers}
        merged = sum(item.merged for item in pack)
        self.patches = sum(item.pixel_rows for item in pack)
        self.pooled = merged * plan.spec.patches if isinstance(plan.spec.merger, PoolSpec) else 0
        self.counts = {
            "rows": sum(item.rows for item in pack), "merged": merged, "tiles": int(integers[3]),
            "windows": int(integers[4]),
        }  # fmt: skip

    def used(self, buffer: torch.Tensor, name: str, step: Step) -> torch.Tensor:
        for dim, kind in enumerate(self.shapes[name]):
            if kind in self.counts:
                count = self.counts[str(kind)]
                if name == "pixels":
                    count = self.patches
                elif name == "sums" and self.pooled and step.count == MERGED:
                    count = self.pooled
                buffer = buffer.narrow(dim, 0, count)
        return buffer
