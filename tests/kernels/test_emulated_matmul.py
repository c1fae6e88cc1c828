"""The Gluon matmuls for Hopper in a CPU emulator of warp groups, barriers and asynchronous work, against fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fused_vit.kernels.config import HopperConfig
from tests.kernels import emulator

FOLDER = Path(__file__).parents[2] / "kernels"
MATMUL, EPILOGUES = FOLDER / "hopper_matmul.py", FOLDER / "hopper_epilogues.py"
UNTOUCHED = 1234.0
FORMS = {
    "taking turns": HopperConfig(128, 128, 2, buffers=3),
    "taking turns, 192 columns": HopperConfig(128, 192, 2, buffers=2),
    "one group": HopperConfig(256, 128, 1, buffers=2),
    "one group, 64 columns": HopperConfig(128, 64, 1, buffers=3),
    "three groups": HopperConfig(192, 192, 3, buffers=2),
    "64 rows": HopperConfig(64, 64, 1, buffers=4),
    "64 rows, 192 columns": HopperConfig(64, 192, 1, buffers=2),
}
EPS, HEAD_EPS = 1e-6, 0.25  # a head's as large as makes its place in the formula count


@dataclass(frozen=True)
class Heads:
    """How many heads of what size; the first ones are normed and rotated."""

    count: int
    dim: int
    stride: int
    rotated: int
    normed: int = 0


QKV = {"qkv": Heads(9, 24, 32, rotated=6), "normed qkv": Heads(5, 64, 64, rotated=3, normed=4)}


class Case:
    """Random operands of `rows` rows and NaN past them, and what the kernel should leave."""

    def __init__(self, op: str, rows: int = 300, columns: int = 200, depth: int = 136) -> None:
        self.op, self.rows, self.depth, self.capacity = op, rows, depth, rows + 90
        rng = np.random.default_rng(0)
        self.heads = heads = QKV.get(op)
        self.columns = heads.count * heads.dim if heads else columns
        self.a = np.full((self.capacity, depth), np.nan, np.float32)
        self.a[:rows] = emulator.round_to(rng.standard_normal((rows, depth)), "bfloat16")
        weight = rng.standard_normal((self.columns, depth)) * depth**-0.5
        self.weight = emulator.round_to(weight, "bfloat16").astype(np.float32)
        self.bias = rng.standard_normal(self.columns).astype(np.float32)
        self.x = emulator.round_to(rng.standard_normal((self.capacity, self.columns)), "bfloat16").astype(np.float32)
        self.places = rng.integers(0, 90, (2, self.capacity)).astype(np.float32)
        self.gain = rng.standard_normal(self.columns).astype(np.float32)
        self.frequencies = rng.random((2, heads.rotated * heads.dim // 2 if heads else 0)).astype(np.float32)
        self.order = rng.permutation(rows).astype(np.int32)
        wide = self.a[:rows].astype(np.float64)
        split = depth // 2
        self.sums = np.full((2, 2, self.capacity), np.nan, np.float32)
        for part, piece in enumerate((wide[:, :split], wide[:, split:])):
            self.sums[0, part, :rows], self.sums[1, part, :rows] = piece.sum(1), (piece**2).sum(1)
        mean, variance = wide.mean(1, keepdims=True), wide.var(1, keepdims=True)
        normed = op != "residual"
        y = ((wide - mean) / np.sqrt(variance + EPS) if normed else wide) @ self.weight.T.astype(np.float64) + self.bias
        self.want = self._qkv(y, heads) if heads else getattr(self, f"_{op}")(y)

    def _linear(self, y: Any) -> Any:
        placed = np.empty_like(y)
        placed[self.order] = y / (1 + np.exp(-1.702 * y))
        return placed

    def _gated(self, y: Any) -> Any:
        gate, up = np.minimum(y[:, ::2], 1.0), np.clip(y[:, 1::2], -1.0, 1.0)
        return gate / (1 + np.exp(-gate)) * up

    def _residual(self, y: Any) -> Any:
        return y + self.x[: self.rows]

    def _qkv(self, y: Any, own: Heads) -> Any:
        heads = y.reshape(self.rows, own.count, own.dim)
        scale = self.gain.reshape(own.count, own.dim) / np.sqrt((heads**2).mean(2, keepdims=True) + HEAD_EPS)
        heads = np.concatenate([(heads * scale)[:, : own.normed], heads[:, own.normed :]], 1)
        angle = np.einsum("am,aj->mj", self.places[:, : self.rows].astype(np.float64), self.frequencies)
        angle = angle.reshape(self.rows, own.rotated, -1)
        cos, sin = np.cos(angle), np.sin(angle)
        even, odd = heads[:, : own.rotated, ::2], heads[:, : own.rotated, 1::2]
        turned = np.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(self.rows, -1, own.dim)
        heads = np.concatenate([turned, heads[:, own.rotated :]], 1)
        padding = own.stride - own.dim
        pad = np.broadcast_to(np.eye(1, padding), (self.rows, own.count, padding))
        return np.concatenate([heads, pad], 2).transpose(1, 0, 2)

    def run(self, config: HopperConfig, programs: int, matmul: Any, epilogues: Any) -> float:
        """Relative error of the worst output; infinite if the kernel wrote what it should not."""
        first = 1 << (config.block_n.bit_length() - 1)
        rest = config.block_n - first
        group = config.block_m // (3 if config.groups == 3 else 1)
        heads, shape = self.heads, list(self.want.shape)
        shape[1 if heads else 0] = self.capacity
        y = np.full(shape, UNTOUCHED, np.float32)
        parts = -(-self.columns // 64)
        out_sums = np.full((2, parts, self.capacity), UNTOUCHED, np.float32)
        pointer = emulator.Pointer
        bias, out, colsum = pointer(self.bias), pointer(y, kind="bfloat16"), pointer(self.weight.sum(1))
        operands, options = {
            "linear": ((pointer(self.order),), ("quick_gelu", False, None, 1, True, True)),
            "gated": ((None,), ("silu", True, 1.0, 1, True, True)),
            "residual": ((pointer(out_sums), pointer(self.x), self.capacity), (parts,)),
        }.get(self.op, ((), ()))
        kind = {"gated": "linear", "normed qkv": "qkv"}.get(self.op, self.op)
        store, normed = getattr(epilogues, f"store_{kind}"), self.op != "residual"
        turned = np.zeros((2, self.columns), np.float32)
        if heads:
            gain = pointer(self.gain) if heads.normed else None
            operands = (self.capacity, gain, HEAD_EPS)
            options = (heads.dim, heads.stride, heads.rotated * heads.dim, True, heads.normed * heads.dim)
            turned[:, : heads.rotated * heads.dim] = np.repeat(self.frequencies, 2, 1)
        columns = (bias, colsum if normed else None, *(pointer(f) if heads else None for f in turned))
        places = pointer(self.places) if heads else None
        boxes = [
            emulator.Descriptor(matrix, (height, 64))
            for matrix, height in ((self.a, group), (self.weight, first), (self.weight, rest or first))
        ]
        emulator.launch(
            matmul.hopper_matmul_kernel, programs, *boxes, out, operands, columns, places,
            pointer(self.sums) if normed else None, pointer(np.array([self.rows])),
            self.columns, self.depth, self.capacity, EPS,
            epilogues.fetch_residual if self.op == "residual" else None, store, options,
            2 if normed else 0, True, group, first, rest, config.groups, config.buffers, programs, "bfloat16",
        )  # fmt: skip
        y = y.swapaxes(0, 1) if heads else y
        want = self.want.swapaxes(0, 1) if heads else self.want
        if (y[self.rows :] != UNTOUCHED).any() or (out_sums[..., self.rows :] != UNTOUCHED).any():
            return float("inf")
        errors = [relative(y[: self.rows], want)]
        if self.op == "residual":
            stored = y[: self.rows].astype(np.float64)
            errors.append(1e3 * relative(out_sums[:, :, : self.rows].sum(1), [stored.sum(1), (stored**2).sum(1)]))
        return max(errors)


def relative(got: Any, want: Any) -> float:
    return float(np.linalg.norm(got - np.asarray(want)) / np.linalg.norm(want))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", ["linear", "gated", "residual", "qkv", "normed qkv"])
def test_matmul(op: str, form: str) -> None:
    matmul, epilogues = emulator.emulated(MATMUL), emulator.emulated(EPILOGUES)
    for programs in (1, 4):
        assert Case(op).run(FORMS[form], programs, matmul, epilogues) <= 4e-3


@pytest.mark.parametrize("rows", [1, 128, 129])
def test_few_rows(rows: int) -> None:
    matmul, epilogues = emulator.emulated(MATMUL), emulator.emulated(EPILOGUES)
    for config in FORMS.values():
        for programs in (2, 9):  # some of which have no tile
            assert Case("linear", rows).run(config, programs, matmul, epilogues) <= 4e-3


def test_gelu() -> None:
    x = np.linspace(-12, 12, 65536).astype(np.float32)
    want = [v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x.tolist()]
    gelu = emulator.emulated(EPILOGUES).gelu
    assert (np.abs(gelu(emulator.array(x)) - want) <= 1.5e-7 * np.abs(x)).all()
    assert np.isnan(gelu(emulator.array(np.array([np.nan]))))


BREAKS = {  # what a bug would make of a line of the matmul
    "no turn": ("            mbarrier.arrive(turns.index(1 - GROUP_ID), count=1)\n", "            pass\n"),
    "steps kept": ("pred=k > 0)  # the last step's", "pred=k < 0)  # the last step's"),
    "steps given back unread": ("(step + BUFFERS - 1) % BUFFERS), count=1, pred=k > 0)", "step % BUFFERS), count=1)"),
    "result too early": ("acc = warpgroup_mma_wait(0, deps=(acc,))", "acc = acc"),
    "the other's steps": ("            step += steps * (GROUPS - 1)\n", "            step += 0\n"),
    "the other's rows": ("tile // tiles_n * SHARING + PART) * ROWS", "tile // tiles_n * SHARING) * ROWS + 1"),
    "a part of the sums": ("first + part < PARTS)", "first + part < PARTS - 1)"),
    "squares of the mean kept": ("square / width - mean * mean", "square / width"),
    "short depth": ("steps = gl.cdiv(K, 64)", "steps = K // 64"),
    "vectors of the last tile": ("        mbarrier.arrive(used.index(OWN), count=1)\n", ""),
    "the other piece's columns": ("FIRST + REST) + piece * 64 + gl", "FIRST + REST) + gl"),
    "columns for rows": ("(places_ptr, capacity + offs, capacity + rows)", "(places_ptr, offs, rows)"),
    "one piece twice": ("EPILOGUE(pieces[i], fetched, row", "EPILOGUE(pieces[0], fetched, row"),
}  # fmt: skip
EPILOGUE_BREAKS = {
    "row past the last": (
        "mask = gl.expand_dims(row + index < rows, 1) & gl.expand_dims(columns < N, 0)\n    gl.store(y_ptrs",
        "mask = gl.expand_dims(row + index < rows + 9, 1) & gl.expand_dims(columns < N, 0)\n    gl.store(y_ptrs",
    ),
    "turned the other way": ("gl.fma(odd, cos, even * sin)", "gl.fma(odd, cos, -(even * sin))"),
    "never turned": ("    if column < ROTATED:", "    if column < 0:"),
    "whole turns kept wrong": ("-6.283185307179586", "-6.25"),
    "no bias": ("y = gl.fma(y, row_vector(row_side, 0, layout), bias)", "y *= row_vector(row_side, 0, layout)"),
    "no mean": ("y = gl.fma(row_vector(row_side, 1, layout)", "y = gl.fma(0 * row_vector(row_side, 1, layout)"),
    "no ones": ("gl.where(within == 0, 1.0, 0.0)", "gl.where(within == 1, 1.0, 0.0)"),
    "heads not normed": ("if column < NORMED:", "if column < 0:"),
    "values normed": ("if column < NORMED:", "if column < N:"),
    "the first head's gain": ("norm_head(y, gain_ptr + column", "norm_head(y, gain_ptr"),
    "a head's eps left out": ("square * (1 / 64) + eps", "square * (1 / 64)"),
    "one head for all": ("(columns // HEAD_DIM - head) * plane + columns % HEAD_DIM", "columns % HEAD_DIM"),
}  # fmt: skip
NORMED_BREAKS = ("heads not normed", "values normed", "the first head's gain", "a head's eps left out")


@pytest.mark.parametrize("name", [*BREAKS, *EPILOGUE_BREAKS])
def test_the_emulator_sees_a_broken_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator, "DEADLOCK_SECONDS", 1.0)
    changes = [[BREAKS[name]] if name in BREAKS else [], [EPILOGUE_BREAKS[name]] if name in EPILOGUE_BREAKS else []]
    matmul, epilogues = (emulator.emulated(p, *c) for p, c in zip((MATMUL, EPILOGUES), changes, strict=True))
    op = "normed qkv" if name in NORMED_BREAKS else "qkv"
    try:
        error = Case(op).run(FORMS["taking turns"], 1, matmul, epilogues)
    except (RuntimeError, AssertionError):
        return
    assert not error <= 4e-3
