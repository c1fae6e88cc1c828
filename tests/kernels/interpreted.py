"""Every kernel in Triton's CPU interpreter against its definition in fp64. Run by test_interpreted.py in a process of
its own, since TRITON_INTERPRET must be set before triton is imported.

Counts are smaller than capacities, everything past the count is NaN on the way in and a sentinel on the way out: a row
read past the count, or stored past it, fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import triton

from fused_vit.buckets import Bucket
from fused_vit.executor import define, launch
from fused_vit.kernels import attention, linear, patch_embed, qkv, residual, unfold
from fused_vit.packing import Item, table
from fused_vit.plan import build_plan
from fused_vit.spec import AttentionSpec, MergerSpec, MlpSpec, NormSpec, PatchSpec, PositionSpec, RopeSpec, TowerSpec
from fused_vit.weights.pack import pack_tower
from fused_vit.workspace import Workspace
from tests.kernels import shim

if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1: run through test_interpreted.py", allow_module_level=True)
shim.install()
NAN, SENTINEL = float("nan"), 1234.0
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
PACK = [Item(1, 2, 2, 1), Item(2, 4, 6, 1), Item(1, 10, 14, 1), Item(3, 2, 4, 3)]
ROWS = sum(item.rows for item in PACK)  # 216


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def grown(x: torch.Tensor, capacity: int, dim: int = 0) -> torch.Tensor:
    """x in a larger buffer whose rest is NaN."""
    shape = list(x.shape)
    shape[dim] = capacity - shape[dim]
    return torch.cat([x, torch.full(shape, NAN, dtype=x.dtype)], dim).contiguous()


def blank(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, SENTINEL).to(dtype)


def double(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def check(
    got: torch.Tensor, ref: Callable[..., Any], args: Sequence[Any], pick: int | None = None, **options: Any
) -> None:
    """Error to fp64 at most twice the definition's own in this dtype, plus a rounding."""
    same, truth = ref(*args, **options), ref(*map(double, args), **options)
    if pick is not None:
        same, truth = same[pick], truth[pick]
    assert got.shape == truth.shape
    error, own = ((x.double() - truth).norm() / truth.norm() for x in (got, same))
    floor = torch.finfo(got.dtype).eps * (2 if got.dtype == torch.float32 else 0.25)
    worst = (got.double() - truth).abs().flatten().argmax().item()
    assert error <= 2 * own + floor, f"error {error:.2e}, definition's own {own:.2e}, worst at flat index {worst}"


def count(n: int) -> torch.Tensor:
    return torch.tensor([n, -1], dtype=torch.int32)


def sums_of(x: torch.Tensor, parts: int) -> torch.Tensor:
    """Row sums split over parts, as an epilogue leaves them."""
    share = rand(1, parts, 1, seed=9).softmax(1)
    return (patch_embed.row_sums_ref(x) * share).to(torch.float32)


# --- unfold -------------------------------------------------------------------


@pytest.mark.parametrize("raster", [False, True], ids=["block", "raster"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["hw", "wh"])
@pytest.mark.parametrize("tile", [16, 64])
def test_unfold(raster: bool, interleaved: bool, tile: int) -> None:
    options = {"merge": 2, "raster": raster, "interleaved": interleaved, "side": 6, "tile": tile}
    inv_freq = 1.0 / 10000 ** (torch.arange(9) / 9)
    numbers = torch.tensor(table(PACK, 2, tile), dtype=torch.int32)
    padded = torch.cat([numbers, torch.full((5 * unfold.FIELDS,), 1 << 20, dtype=torch.int32)])
    tiles, capacity = int(numbers[4]), 300
    out = [blank(capacity, 18), blank(capacity, 18), blank(capacity, 4, dtype=torch.int32), blank(capacity, 4)]
    out.append(blank(80, 4, dtype=torch.int32))
    unfold.unfold(*out, padded, inv_freq, **options)
    for i, (got, want) in enumerate(zip(out, unfold.unfold_ref(numbers, inv_freq, **options), strict=True)):
        n = tiles if i == 4 else ROWS
        assert len(want) == n
        if got.is_floating_point():
            assert torch.allclose(got[:n], want, rtol=0, atol=2e-6)
        else:
            assert torch.equal(got[:n], want)
        assert (got[n:] == SENTINEL).all()


# --- matmuls ------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize(("rows", "width", "depth"), [(1, 64, 96), (77, 200, 100), (130, 96, 64)], ids=str)
def test_patch_embed(rows: int, width: int, depth: int, dtype: torch.dtype) -> None:
    capacity, parts = 160, -(-width // 64)
    index = torch.randint(0, 25, (rows, 4), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    args = [rand(rows, depth, dtype=dtype), index, rand(rows, 4).softmax(1), rand(width, depth, dtype=dtype)]
    args += [rand(width), rand(25, width, dtype=dtype)]
    x, sums = blank(capacity, width, dtype=dtype), blank(2, parts, capacity)
    indices = torch.cat([index, torch.full((capacity - rows, 4), 1 << 20, dtype=torch.int32)])
    ins = [grown(args[0], capacity), indices, grown(args[2], capacity), *args[3:]]
    patch_embed.patch_embed(x, sums, *ins, count=count(rows))
    check(x[:rows], patch_embed.patch_embed_ref, args, 0)
    assert torch.allclose(sums[:, :, :rows].sum(1), patch_embed.row_sums_ref(x[:rows])[:, 0], rtol=1e-4, atol=1e-3)
    assert (x[rows:] == blank(1, dtype=dtype)).all() and (sums[:, :, rows:] == SENTINEL).all()


@DTYPES
@pytest.mark.parametrize(("rows", "width", "depth"), [(1, 64, 64), (77, 200, 96), (130, 96, 328)], ids=str)
def test_residual_in_place(rows: int, width: int, depth: int, dtype: torch.dtype) -> None:
    capacity, parts = 160, -(-width // 64)
    args = [rand(rows, width, dtype=dtype), rand(rows, depth, dtype=dtype, seed=1)]
    args += [rand(width, depth, dtype=dtype, seed=2), rand(width, seed=3)]
    x, sums = grown(args[0], capacity), blank(2, parts, capacity)
    residual.residual(x, sums, x, grown(args[1], capacity), *args[2:], count=count(rows))
    check(x[:rows], residual.residual_ref, args, 0)
    assert torch.allclose(sums[:, :, :rows].sum(1), patch_embed.row_sums_ref(x[:rows])[:, 0], rtol=1e-4, atol=1e-3)
    assert x[rows:].isnan().all() and (sums[:, :, rows:] == SENTINEL).all()


@DTYPES
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), [(16, 3, 3), (72, 2, 2), (80, 2, 1), (64, 4, 2)], ids=str)
def test_qkv(head_dim: int, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    rows, capacity, width, total = 77, 100, 96, heads + 2 * kv_heads
    x = 2 + rand(rows, width, dtype=dtype)
    weight = rand(total * head_dim, width, dtype=dtype)
    angle = rand(rows, head_dim // 2)
    args = [x, sums_of(x, 2), angle.cos(), angle.sin(), weight, rand(len(weight)), weight.float().sum(1)[None]]
    ins = [grown(x, capacity), grown(args[1], capacity, 2), *(grown(a, capacity) for a in args[2:4]), *args[4:]]
    options = {"head_dim": head_dim, "rotated": heads + kv_heads, "eps": 1e-6, "centred": True}
    y = blank(total, capacity, head_dim, dtype=dtype)
    qkv.qkv(y, *ins, **options, count=count(rows))
    check(y[:, :rows], qkv.qkv_ref, args, **options)
    assert (y[:, rows:] == blank(1, dtype=dtype)).all()


@DTYPES
@pytest.mark.parametrize(
    ("merge", "groups", "centred", "activation"),
    [
        (1, 1, True, "gelu_tanh"), (1, 1, False, "silu"), (1, 1, True, "quick_gelu"),
        (4, 1, True, "gelu"), (4, 4, True, "gelu"), (4, 4, False, "none"), (1, 0, True, "none"),
    ],
    ids=str,
)  # fmt: skip
def test_linear(merge: int, groups: int, centred: bool, activation: str, dtype: torch.dtype) -> None:
    rows, capacity, width, columns = 33, 50, 72, 200
    x = 1 + rand(rows * merge, width, dtype=dtype)
    weight = rand(columns, merge * width, dtype=dtype) / 8
    pieces = weight.float().view(columns, max(groups, 1), -1).sum(2).T.contiguous()
    sums, colsum = (sums_of(x, 2), pieces) if groups else (None, None)
    args = [x, sums, weight, rand(columns), colsum]
    ins = [grown(x, capacity * merge), None if sums is None else grown(sums, capacity * merge, 2), *args[2:]]
    options = {"merge": merge, "groups": groups, "eps": 1e-6, "centred": centred, "activation": activation}
    y = blank(capacity, columns, dtype=dtype)
    linear.linear(y, *ins, **options, count=count(rows))
    check(y[:rows], linear.linear_ref, args, **options)
    assert (y[rows:] == blank(1, dtype=dtype)).all()


# --- attention ----------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads"),
    [(16, 1, 1), (64, 2, 2), (72, 2, 1), (80, 1, 1), (88, 1, 1), (96, 1, 1), (128, 1, 1)],
)
def test_attention(head_dim: int, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    from fused_vit.kernels.config import attention_config

    block, capacity = attention_config(head_dim, dtype, 80).block_m, 260
    numbers = torch.tensor(table(PACK, 2, block), dtype=torch.int32)
    tiles = unfold.unfold_ref(numbers, torch.ones(4), merge=2, raster=False, interleaved=False, side=2, tile=block)[4]
    x = rand(heads + 2 * kv_heads, ROWS, head_dim, dtype=dtype)
    x[:heads] *= 0.4
    nowhere = torch.cat([tiles, torch.full((3, 4), 1 << 20, dtype=torch.int32)])
    out = blank(capacity, heads * head_dim, dtype=dtype)
    attention.attention(out, grown(x, capacity, 1), nowhere, heads=heads, count=count(len(tiles)))
    check(out[:ROWS], attention.attention_ref, [x, tiles], heads=heads)
    assert (out[ROWS:] == blank(1, dtype=dtype)).all()


def test_a_nan_segment_leaves_its_neighbours_alone() -> None:
    numbers = torch.tensor(table(PACK, 2, 64), dtype=torch.int32)
    tiles = unfold.unfold_ref(numbers, torch.ones(4), merge=2, raster=False, interleaved=False, side=2, tile=64)[4]
    x, out = rand(3, ROWS, 72), blank(ROWS, 72)
    want = attention.attention_ref(x, tiles, heads=1)
    x[:, 4:52] = NAN
    attention.attention(out, x, tiles, heads=1, count=count(len(tiles)))
    assert torch.allclose(out[:4], want[:4], atol=1e-5) and torch.allclose(out[52:], want[52:], atol=1e-5)
    assert out[4:52].isnan().all()


# --- the whole plan -----------------------------------------------------------


def test_a_plan_in_a_poisoned_slab_equals_its_definition() -> None:
    norm = NormSpec("layer", 1e-6)
    spec = TowerSpec(
        depth=2, width=48, patch=PatchSpec(4, 2), position=PositionSpec(5), norm=norm,
        attention=AttentionSpec(2, 2, 24), rope=RopeSpec(), mlp=MlpSpec(100, "gelu_tanh"),
        merger=MergerSpec(2, 40, norm), deepstack=(0,),
    )  # fmt: skip
    from fused_vit.towers import _tensors

    source = {(p, i): rand(*s, seed=i) * 0.2 + ("norm" in p and p.endswith("weight")) for p, i, s in _tensors(spec)}
    weights = pack_tower(spec, lambda part, i: source[part, i], dtype=torch.float32)
    plan, bucket = build_plan(spec), Bucket(300, 24)
    workspace = Workspace(plan, bucket, torch.float32, torch.device("cpu"), 64)
    workspace.slab.fill_(0xFF)
    buffers = workspace.buffers(bucket)
    for pack in (PACK, [Item(1, 4, 4, 1)], PACK[::-1]):
        rows = sum(item.rows for item in pack)
        numbers = torch.tensor(table(pack, 2, 64), dtype=torch.int32)
        buffers["table"][: len(numbers)] = numbers
        buffers["pixels"][:rows] = pixels = rand(rows, spec.patch.features)
        launch(plan, weights, buffers, 64)
        for name, want in zip(plan.outputs, define(plan, weights, pixels, pack), strict=True):
            assert (buffers[name][: len(want)] - want).norm() <= 1e-5 * want.norm(), name
