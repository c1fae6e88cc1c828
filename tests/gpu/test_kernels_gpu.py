"""Every kernel on the GPU at real sizes, bf16 and fp16, against its definition in fp32; buffers poisoned with NaN."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from fused_vit.buckets import Bucket
from fused_vit.executor import launch_step
from fused_vit.packing import Item, table
from fused_vit.plan import Step, build_plan
from fused_vit.spec import AttentionSpec, MergerSpec, MlpSpec, NormSpec, PatchSpec, PositionSpec, RopeSpec, TowerSpec
from fused_vit.weights.pack import pack_tower
from fused_vit.workspace import Workspace

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
NORM = NormSpec("layer", 1e-6)
PACKS = {
    "one": [Item(1, 28, 28, 1)],
    "odd": [Item(1, 6, 10, 1), Item(3, 14, 22, 1), Item(1, 2, 2, 1), Item(1, 36, 54, 1)],
    "video": [Item(16, 8, 14, 1)],
}


def tower(width: int, heads: int, mlp: int, out: int, head_dim: int | None = None) -> TowerSpec:
    return TowerSpec(
        depth=1, width=width, patch=PatchSpec(16, 2), position=PositionSpec(48), norm=NORM,
        attention=AttentionSpec(heads, heads, head_dim or width // heads), rope=RopeSpec(),
        mlp=MlpSpec(mlp, "gelu_tanh"),
        merger=MergerSpec(2, out, NORM), deepstack=(0,),
    )  # fmt: skip


SPECS = {
    "8b": tower(1152, 16, 4304, 4096),
    "2b": tower(1024, 16, 4096, 2048),
    "d80": tower(1280, 16, 5120, 1536),
    "d128": tower(1536, 12, 4096, 4096),
    "d96": tower(768, 8, 3072, 1024),
    "d88": tower(704, 8, 2816, 1024),
}


def random_weights(spec: TowerSpec, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Seeded weights of a spec, with norms that are no identity."""
    from fused_vit.towers import _tensors

    generator = torch.Generator(device="cuda").manual_seed(0)
    source = {}
    for part, i, shape in _tensors(spec):
        value = torch.randn(shape, generator=generator, device="cuda")
        fan = shape[-1] if part.endswith("fc1.weight") else max(1, value[0].numel())
        gamma = part.split(".")[-2].startswith("norm") and part.endswith("weight")
        source[part, i] = 1 + 0.1 * value if gamma else value * (fan**-0.5 if len(shape) > 1 else 0.1)
    return pack_tower(spec, lambda part, i: source[part, i], dtype=dtype, device="cuda")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_each_step_matches_its_definition(spec: TowerSpec, pack: list[Item], dtype: torch.dtype) -> None:
    """Step by step from the same inputs: error to fp32 at most twice the definition's own error in this dtype."""
    from fused_vit.kernels.config import attention_config, device_arch
    from fused_vit.kernels.ops import OPS

    torch.manual_seed(1)
    plan, weights = build_plan(spec), random_weights(spec, dtype)
    rows = sum(item.rows for item in pack)
    tile = attention_config(spec.attention.head_dim, dtype, device_arch(torch.device("cuda", 0))).block_m
    bucket = Bucket(rows + 4 * 77, 64)
    workspace = Workspace(plan, bucket, dtype, torch.device("cuda", 0), tile)
    workspace.slab.fill_(0xFF)
    buffers = workspace.buffers(bucket)
    integers = torch.tensor(table(pack, 2, tile), dtype=torch.int32, device="cuda")
    buffers["table"].zero_()[: len(integers)] = integers
    buffers["pixels"][:rows] = torch.randn(rows, spec.patch.features, device="cuda").to(dtype)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in weights.items()}
    counts = {None: 0, 0: rows, 1: rows // 4, 4: int(integers[4])}
    for step in plan.steps:
        before = {name: used(buffers[name], name, step, counts, rows).clone() for name in step.reads if name}
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
            got = used(buffers[name], name, step, counts, rows)
            if name == "sums":
                got, truth, peer = got.sum(1), truth.sum(1), peer.sum(1)
            if not got.is_floating_point():
                assert torch.equal(got, truth.to(got.dtype)), (step.name, name)
                continue
            assert torch.isfinite(got).all(), (step.name, name)
            floor = {torch.float32: 2e-6}.get(got.dtype, torch.finfo(got.dtype).eps / 4)
            if name in ("sums", "cos", "sin", "tap_weight"):
                floor = torch.finfo(dtype).eps / 4 if name == "sums" else 4e-6
            error, allowed = relative(got, truth), 2 * relative(peer, truth) + floor
            assert error <= allowed, f"{step.name} {name}: relative error {error:.2e}, allowed {allowed:.2e}"


def run(ref, step: Step, reads: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], options):  # type: ignore[no-untyped-def]
    out = ref(
        *(reads[n] if n else None for n in step.reads), *(weights[n] if n else None for n in step.weights), **options
    )
    return out if isinstance(out, tuple) else (out,)


def used(buffer: torch.Tensor, name: str, step: Step, counts: Mapping[int | None, int], rows: int) -> torch.Tensor:
    """The part of a buffer that holds data."""
    if name == "table":
        return buffer
    if name == "tiles":
        return buffer[: counts[4]]
    if name in ("sums",):
        return buffer[:, :, :rows]
    if name == "qkv":
        return buffer[:, :rows]
    return buffer[: rows // 4 if name == "merging" or name == "pooled" or name.startswith("deepstack") else rows]
