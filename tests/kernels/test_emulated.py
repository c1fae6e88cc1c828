"""The Gluon kernels for Hopper in a CPU emulator of warp groups, barriers and asynchronous work, against fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.kernels import emulator

SOURCE = Path(__file__).parents[2] / "kernels" / "hopper_attention.py"
SEGMENTS = (1, 63, 64, 130, 300)
BLOCK_M = 128


def tiles_of(lengths: tuple[int, ...]) -> tuple[Any, int]:
    """Attention tiles (q0, q1, k0, k1) of segments that follow each other, and their rows."""
    tiles, k0 = [], 0
    for length in lengths:
        k1 = k0 + length
        tiles += [(q0, min(q0 + BLOCK_M, k1), k0, k1) for q0 in range(k0, k1, BLOCK_M)]
        k0 = k1
    return np.array(tiles), k0


def attention(
    module: Any, head_dim: int, heads: int, kv_heads: int, programs: int, block_n: int = 128, buffers: int = 3,
    lengths: tuple[int, ...] = SEGMENTS, poisoned: slice | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """(what the kernel wrote, softmax(q k.T) v in fp64) of random heads; rows past the last hold NaN."""
    tiles, rows = tiles_of(lengths)
    first = 1 << (head_dim.bit_length() - 1)
    rest = {0: 0, 8: 16, 16: 16, 24: 32, 32: 32}[head_dim - first]
    capacity = rows + 200
    rng = np.random.default_rng(0)
    stride = -(-head_dim // 16) * 16
    qkv = np.full((heads + 2 * kv_heads, capacity, stride), np.nan, np.float32)
    qkv[:, :rows] = emulator.round_to(rng.standard_normal((heads + 2 * kv_heads, rows, stride)), "bfloat16")
    qkv[:, :rows, head_dim:] = np.eye(1, stride - head_dim)
    qkv[:heads] = emulator.round_to(qkv[:heads] * 0.3, "bfloat16")
    if poisoned:
        qkv[:, poisoned] = np.nan
    out = np.full((capacity, heads * head_dim), 1234.0, np.float32)
    planes = qkv.reshape(-1, stride)
    boxes = [emulator.Descriptor(planes[:, :head_dim], (n, w or first)) for n in (64, block_n) for w in (first, rest)]
    boxes.append(emulator.Descriptor(planes, (block_n, rest or first)))
    nowhere = np.concatenate([tiles, np.full((3, 4), 1 << 20)]).astype(np.int64)
    emulator.launch(
        module.hopper_attention_kernel, programs, *boxes, emulator.Pointer(out), emulator.Pointer(nowhere),
        emulator.Pointer(np.array([len(tiles)])), capacity, heads, kv_heads, head_dim, first, rest,
        stride > head_dim, block_n, buffers, programs, "bfloat16",
    )  # fmt: skip
    wide = qkv[:, :, :head_dim].astype(np.float64)
    q, k, v = wide[:heads], wide[heads : heads + kv_heads], wide[heads + kv_heads :]
    k, v = (np.repeat(t, heads // kv_heads, 0) for t in (k, v))
    want = np.full(out.shape, 1234.0)
    for q0, q1, k0, k1 in tiles:
        scores = np.exp2(np.einsum("hmd,hnd->hmn", q[:, q0:q1], k[:, k0:k1]))
        mixed = np.einsum("hmn,hnd->mhd", scores / scores.sum(2, keepdims=True), v[:, k0:k1])
        want[q0:q1] = mixed.reshape(q1 - q0, -1)
    return out, want


def error(out: Any, want: Any) -> float:
    """Of the rows that the kernel should write; infinite if it wrote others."""
    written = (want != 1234.0).all(1)
    if (out[~written] != 1234.0).any():
        return float("inf")
    return float(np.linalg.norm(out[written] - want[written]) / np.linalg.norm(want[written]))


@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads"), [(64, 2, 2), (72, 2, 1), (80, 1, 1), (88, 1, 1), (96, 1, 1)]
)
@pytest.mark.parametrize("programs", [1, 3])
def test_attention(head_dim: int, heads: int, kv_heads: int, programs: int) -> None:
    out, want = attention(emulator.emulated(SOURCE), head_dim, heads, kv_heads, programs)
    assert error(out, want) <= 4e-3


def test_attention_with_two_buffers_and_one_dot() -> None:
    out, want = attention(emulator.emulated(SOURCE), 128, 1, 1, 2, buffers=2)
    assert error(out, want) <= 4e-3


def test_a_poisoned_segment_leaves_its_neighbours_alone() -> None:
    out, _ = attention(emulator.emulated(SOURCE), 72, 1, 1, 2)
    other, _ = attention(emulator.emulated(SOURCE), 72, 1, 1, 2, poisoned=slice(64, 128))
    assert np.array_equal(out[:64], other[:64]) and np.array_equal(out[128:], other[128:])
    assert np.isnan(other[64:128]).all()


BREAKS = {
    "values of a neighbour": ("            if k1 - k0 < BLOCK_N:", "            if k1 - k0 < 0:"),
    "one half cleared": ("zero_rows(v.index(at), k1 - k0, GROUP_ID * HALF", "zero_rows(v.index(at), k1 - k0, HALF"),
    "rows of the other half": ("row = START + gl.expand_dims", "row = gl.expand_dims"),
    "cleared alone": ("                mbarrier.arrive(cleared, count=1)\n", ""),
    "keys of two blocks": ("(key >= (gl.cdiv(rows, BLOCK_N) - 1) * BLOCK_N) & (key < rows)", "key < rows"),
    "queries of the last tile": ("q_rest, turn % 2 * 2 + GROUP_ID", "q_rest, GROUP_ID"),
    "no fence": ("                fence_async_shared()\n", ""),
    "queries kept": ("        mbarrier.arrive(q_empty.index(turn % 2), count=1)\n", ""),
    "values kept": ("            mbarrier.arrive(v_empty.index(last), count=1)\n", ""),
    "no turn": ("            mbarrier.arrive(turns.index(1 - GROUP_ID), count=1)\n", ""),
    "scores too early": ("warpgroup_mma_wait(2 if REST > 0 else 1, deps=(scores,))", "scores"),
    "keys given back unread": (
        "                scores = scores_of(my_q, my_q_rest, k, k_rest, at, zero, REST)\n",
        "                mbarrier.arrive(k_empty.index(at), count=1)\n"
        "                scores = scores_of(my_q, my_q_rest, k, k_rest, at, zero, REST)\n",
    ),
    "no decay": ("acc = acc * gl.expand_dims", "acc = acc + 0 * gl.expand_dims"),
    "ones not decayed": ("acc_rest = acc_rest * gl.expand_dims", "acc_rest = acc_rest + 0 * gl.expand_dims"),
    "another head": (
        "k0 + nth % tiles * 128, k0, k1, nth // tiles",
        "k0 + nth % tiles * 128, k0, k1, nth // tiles * 0",
    ),
    "the segment's first tile": ("(work // HEADS - (q0 - k0) // 128) * HEADS", "work // HEADS * HEADS"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_the_emulator_sees_a_broken_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator, "DEADLOCK_SECONDS", 1.0)
    broken = emulator.emulated(SOURCE, BREAKS[name])
    try:
        out, want = attention(broken, 72, 2, 1, 1, buffers=2, lengths=(130, 600, 40))
    except (RuntimeError, AssertionError):
        return
    assert not error(out, want) <= 4e-3
