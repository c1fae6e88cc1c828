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
import torch.nn.functional as F
import triton
import triton.language as tl

from fused_vit.buckets import Bucket
from fused_vit.executor import define, launch
from fused_vit.kernels import attention, device, linear, norm, patch_embed, pool, qkv, residual, unfold
from fused_vit.layouts import Part, parts
from fused_vit.packing import Item, items, table
from fused_vit.plan import build_plan
from fused_vit.spec import (
    AttentionSpec,
    ConvMergerSpec,
    MergerSpec,
    MlpSpec,
    NormSpec,
    PatchSpec,
    PoolSpec,
    PositionSpec,
    RopeSpec,
    TowerSpec,
    WindowSpec,
)
from fused_vit.weights.pack import pack_tower
from fused_vit.workspace import Workspace, addresses
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

CLIPS = [[1, 2, 2], [3, 4, 6], [1, 10, 14], [2, 16, 8], [4, 2, 4]]
MODES: dict[str, dict[str, Any]] = {
    "blocks": {},
    "raster": {"merge": 1, "raster": True},
    "raster in blocks": {"raster": True, "taps": 17, "align_corners": False, "clip": True},
    "bicubic": {"taps": 16, "align_corners": False},
    "bilinear, not aligned": {"taps": 4, "align_corners": False},
    "class token": {"merge": 1, "raster": True, "class_token": True, "taps": 16, "align_corners": False, "rope": False},
    "windows": {"window": 8, "taps": 0},
    "small windows": {"window": 4, "taps": 0},
    "nothing": {"taps": 0, "rope": False},
}


def mode(name: str) -> tuple[dict[str, Any], list[Item], bool]:
    """Options of unfold, the items of CLIPS, and whether there is a rotary embedding."""
    chosen = dict(MODES[name])
    clip, rope = chosen.pop("clip", False), chosen.pop("rope", True)
    options = {
        "merge": 2, "raster": False, "class_token": False, "window": 0, "side": 6, "align_corners": True, "taps": 4,
    } | chosen  # fmt: skip
    span, extra = options["window"], int(options["class_token"])
    pack = [
        Item(t, h, w, t if clip else 1, extra, -(-h // span) * -(-w // span) if span else 0, options["merge"] ** 2)
        for t, h, w in CLIPS
    ]
    return options, pack, rope


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("tile", [16, 64])
def test_unfold(name: str, tile: int) -> None:
    options, pack, rope = mode(name)
    options["tile"] = tile
    numbers = torch.tensor(table(pack, tile), dtype=torch.int32)
    padded = torch.cat([numbers, torch.full((5 * unfold.FIELDS,), 1 << 20, dtype=torch.int32)])
    wanted = unfold.unfold_ref(numbers, **options)
    rows, tiles, windows, taps = sum(i.rows for i in pack), int(numbers[3]), int(numbers[4]), options["taps"]
    capacity, ints = rows + 40, {"dtype": torch.int32}
    out: list[torch.Tensor | None] = [blank(2, capacity).T if rope else None]
    out += [blank(capacity, taps, **ints), blank(capacity, taps)] if taps else [None, None]
    out += [blank(capacity, **ints), blank(tiles + 9, 4, **ints)]
    out.append(blank(windows + 9, 4, **ints) if options["window"] else None)
    unfold.unfold(None if out[0] is None else out[0].T, *out[1:], padded, **options)  # type: ignore[arg-type]
    assert wanted[0] is not None
    for k, (got, want) in enumerate(zip(out, (wanted[0].T, *wanted[1:]), strict=True)):
        if got is None:
            continue
        n = {4: tiles, 5: windows}.get(k, rows)
        assert want is not None and len(want) == n
        if got.is_floating_point():
            assert torch.allclose(got[:n], want, rtol=0, atol=3e-6), k
        else:
            assert torch.equal(got[:n], want), k
        assert (got[n:] == SENTINEL).all()


@pytest.mark.parametrize("name", MODES)
def test_rows_tiles_and_windows_cover_everything_once(name: str) -> None:
    options, pack, _ = mode(name)
    numbers = torch.tensor(table(pack, 16), dtype=torch.int32)
    *_, source, tiles, windows = unfold.unfold_ref(numbers, **options, tile=16)
    assert source is not None and tiles is not None and windows is not None
    patches = source[source >= 0]
    assert torch.equal(patches.sort().values, torch.arange(sum(i.pixel_rows for i in pack), dtype=torch.int32))
    assert int((source < 0).sum()) == (sum(i.t for i in pack) if options["class_token"] else 0)
    for spans in (tiles, windows) if options["window"] else (tiles,):
        covered = torch.cat([torch.arange(a, b) for a, b in spans[:, :2].tolist()])
        assert torch.equal(covered.sort().values, torch.arange(len(source)))
    if options["window"]:
        assert int((windows[:, 1] - windows[:, 0]).max()) == options["window"] ** 2
        assert sum(int(b - a) ** 2 for a, b in windows[:, :2]) == sum(i.pairs(True, options["window"]) for i in pack)


@pytest.mark.parametrize("name", ["blocks", "bicubic", "bilinear, not aligned", "raster in blocks"])
def test_taps_are_torchs_interpolation(name: str) -> None:
    options, pack, _ = mode(name)
    options |= {"raster": True, "merge": 1}
    numbers = torch.tensor(table(pack, 16), dtype=torch.int32)
    _, index, weight, *_ = unfold.unfold_ref(numbers, **options, tile=16, dtype=torch.float64)
    assert index is not None and weight is not None
    grid = rand(36, 8).double()
    frames = rand(4, 8, seed=3).double()  # the rows behind the grid
    got = (torch.cat([grid, frames])[index.long()] * weight[:, :, None]).sum(1)
    wanted = []
    how = "bicubic" if options["taps"] >= 16 else "bilinear"
    for t, h, w in CLIPS:
        plane = grid.T.reshape(1, 8, 6, 6)
        resized = F.interpolate(plane, (h, w), mode=how, align_corners=options["align_corners"])[0].flatten(1).T
        wanted += [resized + (frames[f] if t > 1 and options["taps"] == 17 else 0) for f in range(t)]
    assert torch.allclose(got, torch.cat(wanted), atol=1e-9)


# --- matmuls ------------------------------------------------------------------


def integers(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(1), dtype=torch.int32)


def lost(x: torch.Tensor, capacity: int) -> torch.Tensor:
    """Indices in a larger buffer whose rest leads nowhere."""
    return torch.cat([x, torch.full((capacity - len(x), *x.shape[1:]), 1 << 20, dtype=torch.int32)])


def taps_of(rows: int, taps: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return integers(25, rows, taps), rand(rows, taps).softmax(1), rand(25, width, dtype=dtype)


@DTYPES
@pytest.mark.parametrize("gathered", [False, True], ids=["in order", "gathered"])
@pytest.mark.parametrize(
    ("rows", "width", "depth", "taps"), [(1, 64, 96, 4), (77, 200, 100, 17), (130, 96, 64, 0)], ids=str
)
def test_patch_embed(rows: int, width: int, depth: int, taps: int, gathered: bool, dtype: torch.dtype) -> None:
    capacity, parts = 160, -(-width // 64)
    source = None
    if gathered:  # every 7th row is a class token: it has no pixels
        source = torch.randperm(rows, generator=torch.Generator().manual_seed(2)).int()
        source[::7] = -1
    index, weight, positions = taps_of(rows, taps, width, dtype) if taps else (None, None, None)
    args = [
        rand(rows, depth, dtype=dtype),
        source,
        index,
        weight,
        rand(width, depth, dtype=dtype),
        rand(width),
        positions,
    ]
    x, sums = blank(capacity, width, dtype=dtype), blank(2, parts, capacity)
    ins = [
        F.pad(grown(args[0], capacity), (0, -depth % 16), value=NAN),  # type: ignore[arg-type]
        None if source is None else lost(source, capacity),
        None if index is None else lost(index, capacity), None if weight is None else grown(weight, capacity),
        F.pad(args[4], (0, -depth % 16)), *args[5:],  # type: ignore[arg-type]
    ]  # fmt: skip
    patch_embed.patch_embed(x, sums, *ins, features=depth, count=count(rows))  # type: ignore[arg-type]
    check(x[:rows], patch_embed.patch_embed_ref, args, 0, features=depth)
    assert torch.allclose(sums[:, :, :rows].sum(1), patch_embed.row_sums_ref(x[:rows])[:, 0], rtol=1e-4, atol=1e-3)
    assert (x[rows:] == blank(1, dtype=dtype)).all() and (sums[:, :, rows:] == SENTINEL).all()


@DTYPES
@pytest.mark.parametrize(("rows", "width", "depth"), [(1, 64, 96), (77, 200, 588)], ids=str)
def test_patch_embed_of_bytes(rows: int, width: int, depth: int, dtype: torch.dtype) -> None:
    """Every byte there is; depth 588 = 3 * 14 * 14 ends within a step."""
    capacity, parts = 160, -(-width // 64)
    index, taps, positions = taps_of(rows, 4, width, dtype)
    pixels = integers(256, rows, depth).to(torch.uint8)
    args = [pixels, None, index, taps, rand(width, depth, dtype=dtype) * 0.01, rand(width), positions]
    x, sums = blank(capacity, width, dtype=dtype), blank(2, parts, capacity)
    behind = F.pad(pixels, (0, -depth % 16, 0, capacity - rows), value=77)
    ins = [behind, None, lost(index, capacity), grown(taps, capacity), F.pad(args[4], (0, -depth % 16)), *args[5:]]  # type: ignore[arg-type]
    patch_embed.patch_embed(x, sums, *ins, features=depth, count=count(rows))  # type: ignore[arg-type]
    check(x[:rows], patch_embed.patch_embed_ref, args, 0, features=depth)
    assert torch.allclose(sums[:, :, :rows].sum(1), patch_embed.row_sums_ref(x[:rows])[:, 0], rtol=1e-4, atol=1e-3)


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
@pytest.mark.parametrize("rope", [True, False], ids=["rope", "no rope"])
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "normed"),
    [(16, 3, 3, False), (72, 2, 2, False), (80, 2, 1, False), (64, 4, 2, False), (16, 3, 3, True), (64, 4, 2, True)],
    ids=str,
)
def test_qkv(head_dim: int, heads: int, kv_heads: int, normed: bool, rope: bool, dtype: torch.dtype) -> None:
    rows, capacity, width, total = 77, 100, 96, heads + 2 * kv_heads
    x = 2 + rand(rows, width, dtype=dtype)
    weight = rand(total * head_dim, width, dtype=dtype)
    turned = heads + kv_heads
    places, frequencies = (rand(2, rows) * 20, rand(2, turned * head_dim)) if rope else (None, None)
    if frequencies is not None:
        frequencies = F.pad(frequencies[:, ::2].repeat_interleave(2, 1), (0, kv_heads * head_dim))
    gain = 1 + 0.3 * rand(turned * head_dim) if normed else None
    args = [x, sums_of(x, 2), places, weight, rand(len(weight)), weight.float().sum(1), gain, frequencies]
    ins = [grown(x, capacity), grown(args[1], capacity, 2)]  # type: ignore[arg-type]
    ins.append(None if places is None else grown(places, capacity, 1))  # type: ignore[arg-type]
    options = {
        "head_dim": head_dim, "rotated": turned if rope else 0, "normed": turned if normed else 0, "head_eps": 1e-5,
        "eps": 1e-6, "centred": True,
    }  # fmt: skip
    y = blank(total, capacity, -(-head_dim // 16) * 16, dtype=dtype)
    qkv.qkv(y, *ins, *args[3:], **options, count=count(rows))  # type: ignore[arg-type]
    check(y[:, :rows], qkv.qkv_ref, args, **options)
    assert (y[:, rows:] == blank(1, dtype=dtype)).all()


@DTYPES
@pytest.mark.parametrize(
    ("normed", "centred", "activation", "gated", "limit"),
    [
        (True, True, "gelu_tanh", False, None), (True, False, "silu", False, None),
        (True, True, "quick_gelu", False, None), (True, True, "gelu", False, None), (True, False, "none", False, None),
        (False, True, "gelu", False, None), (False, True, "none", False, None), (True, False, "silu", True, None),
        (False, True, "silu", True, 0.5), (True, True, "gelu", True, 1.0),
    ],
    ids=str,
)  # fmt: skip
def test_linear(
    normed: bool, centred: bool, activation: str, gated: bool, limit: float | None, dtype: torch.dtype
) -> None:
    rows, capacity, width, columns = 33, 50, 72, 200
    x = 1 + rand(rows, width, dtype=dtype)
    weight = rand(columns, width, dtype=dtype) / 8
    sums, colsum = (sums_of(x, 2), weight.float().sum(1)) if normed else (None, None)
    args = [x, sums, None, weight, rand(columns), colsum]
    ins = [grown(x, capacity), None if sums is None else grown(sums, capacity, 2), *args[2:]]
    options = {"eps": 1e-6, "centred": centred, "activation": activation, "gated": gated, "limit": limit}
    y = blank(capacity, columns // (1 + gated), dtype=dtype)
    linear.linear(y, *ins, **options, count=count(rows))  # type: ignore[arg-type]
    check(y[:rows], linear.linear_ref, args, **options)
    assert (y[rows:] == blank(1, dtype=dtype)).all()


@triton.jit
def gelu_kernel(y_ptr, x_ptr):
    offs = tl.arange(0, 65536)
    tl.store(y_ptr + offs, device.gelu(tl.load(x_ptr + offs)))


def test_gelu() -> None:
    """To 1e-7 of what it is next to, however small: torch's own in fp32 is no better where 1 + erf cancels."""
    x = torch.linspace(-12, 12, 65536)
    y = torch.empty_like(x)
    gelu_kernel[(1,)](y, x)
    assert ((y - F.gelu(x.double())).abs() <= 1.5e-7 * x.abs()).all()
    x[:4] = torch.tensor([NAN, float("inf"), float("-inf"), 0.0])
    gelu_kernel[(1,)](y, x)
    assert y[0].isnan() and y[1] == float("inf") and -1.5e-7 < y[2] <= 0 and y[3] == 0


@DTYPES
def test_linear_stores_merged_rows_elsewhere(dtype: torch.dtype) -> None:
    rows, columns = 33, 96
    x, weight = rand(rows, 64, dtype=dtype), rand(columns, 64, dtype=dtype) / 8
    places = torch.randperm(rows, generator=torch.Generator().manual_seed(4)).int()
    source = (4 * places[:, None] + torch.arange(4, dtype=torch.int32)).flatten()
    options = {"eps": 0.0, "centred": True, "activation": "none", "gated": False, "limit": None, "scatter": 4}
    args = [x, None, source, weight, rand(columns), None]
    y = blank(50, columns, dtype=dtype)
    linear.linear(y, grown(x, 50), None, lost(source, 200), *args[3:], **options, count=count(rows))  # type: ignore[arg-type]
    check(y[:rows], linear.linear_ref, args, **options)
    straight = linear.linear_ref(x, None, None, *args[3:], **options)  # type: ignore[arg-type]
    assert torch.allclose(y[places.long()].float(), straight.float(), atol=2e-2)
    assert (y[rows:] == blank(1, dtype=dtype)).all()


# --- rows ---------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize(
    ("width", "centred", "activation", "taps", "scattered", "summed"),
    [
        (64, True, "none", 0, False, False), (200, False, "none", 16, False, True), (96, True, "gelu", 0, False, False),
        (72, True, "none", 0, True, False), (130, False, "none", 0, True, True),
    ],
    ids=str,
)  # fmt: skip
def test_norm(
    width: int, centred: bool, activation: str, taps: int, scattered: bool, summed: bool, dtype: torch.dtype
) -> None:
    rows, capacity, parts = 9, 14, -(-width // 64)
    x = 2 + rand(rows, width, dtype=dtype)
    source = torch.randperm(rows, generator=torch.Generator().manual_seed(2)).int() if scattered else None
    index, weight, positions = taps_of(rows, taps, width, dtype) if taps else (None, None, None)
    beta = rand(width, seed=2) if centred else None
    args = [x, source, index, weight, 1 + 0.2 * rand(width, seed=1), beta, positions]
    ins = [
        grown(x, capacity), None if source is None else lost(source, capacity),
        None if index is None else lost(index, capacity), None if weight is None else grown(weight, capacity),
        *args[4:],
    ]  # fmt: skip
    options = {"eps": 1e-5, "centred": centred, "activation": activation}
    y = blank(capacity, width, dtype=dtype) if scattered else ins[0]  # else in place
    sums = blank(2, parts, capacity) if summed else None
    norm.norm(y, sums, *ins, **options, count=count(rows))  # type: ignore[arg-type]
    check(y[:rows], norm.norm_ref, args, 0, **options)  # type: ignore[index]
    if sums is not None:
        ordered = y[:rows] if source is None else y[source.long()]  # type: ignore[index]
        want = patch_embed.row_sums_ref(ordered)[:, 0]
        assert torch.allclose(sums[:, :, :rows].sum(1), want, rtol=1e-4, atol=1e-3)
        assert (sums[:, :, rows:] == SENTINEL).all()
    assert (y[rows:] == blank(1, dtype=dtype)).all() if scattered else y[rows:].isnan().all()  # type: ignore[index]


@DTYPES
@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("groups", [1, 4])
def test_norm_of_merged_rows(groups: int, centred: bool, dtype: torch.dtype) -> None:
    rows, width, capacity = 7, 72, 14
    x = 2 + rand(4 * rows, width, dtype=dtype)
    options = {"eps": 1e-5, "centred": centred, "activation": "none", "merge": 4, "groups": groups}
    y = blank(capacity, 4 * width, dtype=dtype)
    norm.norm(y, None, grown(x, 4 * capacity), *[None] * 6, **options, count=count(rows))  # type: ignore[arg-type]
    check(y[:rows], norm.norm_ref, [x, *[None] * 6], 0, **options)
    assert (y[rows:] == blank(1, dtype=dtype)).all()


@DTYPES
@pytest.mark.parametrize("scattered", [False, True], ids=["in order", "scattered"])
def test_pool(scattered: bool, dtype: torch.dtype) -> None:
    pack = [Item(t, h, w, t, pooled=t) for t, h, w in [(3, 4, 6), (1, 2, 2), (4, 2, 4), (2, 4, 4)]]
    rows, merged, width, capacity = sum(i.rows for i in pack), sum(i.merged for i in pack), 72, 180
    numbers = torch.tensor(table(pack, 64), dtype=torch.int32)
    padded = torch.cat([numbers, torch.full((3 * unfold.FIELDS,), 1 << 20, dtype=torch.int32)])
    x = rand(rows, width, dtype=dtype)
    source = torch.randperm(rows, generator=torch.Generator().manual_seed(2)).int() if scattered else None
    y = blank(capacity // 4, 4, width, dtype=dtype)
    ins = [grown(x, capacity), None if source is None else lost(source, capacity), padded]
    pool.pool(y, *ins, patches=4, count=count(merged))  # type: ignore[arg-type]
    check(y[:merged], pool.pool_ref, [x, source, numbers], patches=4)
    assert (y[merged:] == blank(1, dtype=dtype)).all()


# --- attention ----------------------------------------------------------------


def tiles_of(pack: list[Item], tile: int, window: int = 0) -> torch.Tensor:
    """Attention tiles of a pack: of frames and clips, or of windows."""
    found = unfold.unfold_ref(
        torch.tensor(table(pack, tile), dtype=torch.int32), merge=2, raster=False, class_token=False,
        window=window, side=2, align_corners=True, taps=0, tile=tile,
    )  # fmt: skip
    chosen = found[5 if window else 4]
    assert chosen is not None
    return chosen


@DTYPES
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "window"),
    [
        (16, 1, 1, 0), (64, 2, 2, 0), (72, 2, 1, 0), (80, 1, 1, 0), (88, 1, 1, 0), (96, 1, 1, 0), (128, 1, 1, 0),
        (80, 2, 2, 8), (64, 4, 2, 4),
    ],
)  # fmt: skip
def test_attention(head_dim: int, heads: int, kv_heads: int, window: int, dtype: torch.dtype) -> None:
    from fused_vit.kernels.config import attention_config

    block, capacity = attention_config(head_dim, dtype, 80, window > 0).block_m, 260
    tiles = tiles_of(PACK, block, window)
    x = rand(heads + 2 * kv_heads, ROWS, head_dim + 16, dtype=dtype)
    x[:heads] *= 0.4
    x[:, :, head_dim:] = NAN  # not read
    nowhere = torch.cat([tiles, torch.full((3, 4), 1 << 20, dtype=torch.int32)])
    out = blank(capacity, heads * head_dim, dtype=dtype)
    options = {"heads": heads, "head_dim": head_dim, "windowed": window > 0}
    attention.attention(out, grown(x, capacity, 1), nowhere, **options, count=count(len(tiles)))  # type: ignore[arg-type]
    check(out[:ROWS], attention.attention_ref, [x, tiles], **options)
    assert (out[ROWS:] == blank(1, dtype=dtype)).all()


def test_a_nan_segment_leaves_its_neighbours_alone() -> None:
    tiles = tiles_of(PACK, 64)
    x, out = rand(3, ROWS, 72), blank(ROWS, 72)
    want = attention.attention_ref(x, tiles, heads=1, head_dim=72, windowed=False)
    x[:, 4:52] = NAN
    attention.attention(out, x, tiles, heads=1, head_dim=72, windowed=False, count=count(len(tiles)))
    assert torch.allclose(out[:4], want[:4], atol=1e-5) and torch.allclose(out[52:], want[52:], atol=1e-5)
    assert out[4:52].isnan().all()


# --- whole plans --------------------------------------------------------------

LAYER, RMS = NormSpec("layer", 1e-6), NormSpec("rms", 1e-5)
BICUBIC = PositionSpec(5, "bicubic", align_corners=False)
STILLS = [[[1, 2, 2], [1, 10, 14], [1, 4, 6]], [[1, 4, 4]], [[2, 6, 4], [1, 2, 2]]]


def spec_of(**parts: Any) -> TowerSpec:
    """Two blocks 48 wide."""
    fields = {
        "depth": 2, "width": 48, "patch": PatchSpec(4, 2), "position": PositionSpec(5), "norm": LAYER,
        "attention": AttentionSpec(2, 2, 24), "rope": RopeSpec(), "mlp": MlpSpec(100, "gelu_tanh"),
        "merger": MergerSpec(40, LAYER),
    }  # fmt: skip
    return TowerSpec(**(fields | parts))


GATED = MlpSpec(52, "silu", gated=True, bias=False, limit=0.5)
MOON = {
    "patch": PatchSpec(4, order="raster"), "attention": AttentionSpec(2, 2, 24, segments="clip"),
    "rope": RopeSpec(layout="w_h_interleaved"), "final_norm": LAYER, "position": PositionSpec(5, "bicubic", False, 4),
}  # fmt: skip
FLAT = {"patch": PatchSpec(4, order="raster"), "merge": 1, "rope": None, "merger": None, "position": BICUBIC}
PLANS = {
    "deepstack": spec_of(deepstack=(0,)),
    "windows": spec_of(
        position=None, norm=RMS, mlp=MlpSpec(52, "silu", gated=True), merger=MergerSpec(40, RMS),
        attention=AttentionSpec(4, 2, 16, windows=WindowSpec(4, (1,))),
    ),
    "patch norm, conv merger": spec_of(
        patch=PatchSpec(4, 2, norm=RMS), position=BICUBIC, norm=RMS, mlp=GATED, merger=ConvMergerSpec(40, RMS, GATED),
        attention=AttentionSpec(2, 2, 24, bias=False),
    ),
    "q/k norm": spec_of(attention=AttentionSpec(3, 3, 16, qk_norm=RMS), position=None),
    "clips": spec_of(**MOON, merger=PoolSpec()),
    "clips, projector": spec_of(**MOON, merger=PoolSpec(MergerSpec(40, LAYER))),
    "no rotation, hidden state": spec_of(**FLAT, final_norm=LAYER, hidden_state=True),
    "class token, layer scale": spec_of(**FLAT, class_token=True, layer_scale=True),
    "blocks, no merger": spec_of(merger=None, final_norm=LAYER, position=None, patch=PatchSpec(4, bias=False)),
}  # fmt: skip


def random_part(part: Part) -> torch.Tensor:
    value = rand(*part.shape, seed=part.block + len(part.name))
    near_one = (part.name.endswith("weight") and len(part.shape) == 1) or part.name.startswith("block.scale")
    return 1 + 0.2 * value if near_one else value * part.shape[-1] ** -0.5


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_in_a_poisoned_slab_equals_its_definition(name: str) -> None:
    spec = PLANS[name]
    source = {(p.name, p.block): random_part(p) for p in parts(spec)}
    weights = pack_tower(spec, lambda part, i: source[part, i], dtype=torch.float32)
    plan, bucket = build_plan(spec), Bucket(300, 40)
    workspace = Workspace(plan.lean(), [bucket], torch.float32, torch.device("cpu"), 64)
    workspace.slab.fill_(0xFF)
    buffers = workspace.buffers(bucket)
    elsewhere = addresses(plan, bucket, torch.float32, 64, buffers["table"])
    for grid in STILLS:
        patches = sum(t * h * w for t, h, w in grid)
        pack = items(spec, grid, patches)
        numbers = torch.tensor(table(pack, 64), dtype=torch.int32)
        buffers["table"][: len(numbers)] = numbers
        pixels = rand(patches, spec.patch.features)
        wanted = {
            name: t for name, t in zip(plan.outputs, define(plan, weights, pixels, pack), strict=True) if t is not None
        }
        found = {name: torch.full_like(wanted[name], float("nan")) for name in plan.finals()}
        padded = F.pad(pixels, (0, -pixels.shape[1] % 16))  # as rows of pixels are that a kernel reads in place
        for name, tensor in {"pixels": padded, **found}.items():
            elsewhere[name].cell.fill_(tensor.data_ptr())
        launch(plan, weights, buffers, 64, elsewhere=elsewhere)
        for name, want in wanted.items():
            got = found[name] if name in found else buffers[name][: len(want)]
            assert (got - want).norm() <= 1e-5 * want.norm(), name
