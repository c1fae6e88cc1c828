"""Attention within segments of packed rows: softmax(q k.T) v, no mask, no padding (FlashAttention-2, arXiv 2307.08691).

Head dims that are no power of two run as two dots (72 = 64 + 16 with half a tail), never padded to 96 or 128.
q already carries the softmax scale times log2(e). A head's rows are `stride` apart: head_dim rounded up to 16, the
columns between holding a one, then zeros.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .config import attention_config, device_arch, multiprocessors, precision


def attention_ref(qkv: torch.Tensor, tiles: torch.Tensor, *, heads: int, head_dim: int, windowed: bool) -> torch.Tensor:
    """[rows, heads * head_dim] from qkv [heads + 2 * kv_heads, rows, stride] and tiles (q0, q1, k0, k1)."""
    kv = (len(qkv) - heads) // 2
    qkv = qkv[:, :, :head_dim]
    q, k, v = qkv[:heads], qkv[heads : heads + kv], qkv[heads + kv :]
    k, v = (t.repeat_interleave(heads // kv, 0) for t in (k, v))
    out = torch.empty_like(q)
    for q0, q1, k0, k1 in tiles.tolist():
        out[:, q0:q1] = F.scaled_dot_product_attention(q[:, q0:q1], k[:, k0:k1], v[:, k0:k1], scale=math.log(2.0))
    return out.transpose(0, 1).flatten(1)


def split_head(head_dim: int) -> tuple[int, int]:
    """Widths of the two dots: the largest power of two, and the rest rounded up to a power of two (0 if none)."""
    first = max(16, 1 << (head_dim.bit_length() - 1))
    rest = max(head_dim - first, 0)
    return first, max(16, triton.next_power_of_2(rest)) if rest else 0


def attention(
    out: torch.Tensor, qkv: torch.Tensor, tiles: torch.Tensor, *,
    heads: int, head_dim: int, windowed: bool, count: torch.Tensor,
) -> None:  # fmt: skip
    """Launch over the tiles that count[0] holds, each a whole window if windowed. out is [rows, heads * head_dim]."""
    total, rows, stride = qkv.shape
    c = attention_config(head_dim, qkv.dtype, device_arch(qkv.device), windowed)
    first, rest = split_head(head_dim)
    if c.gluon:
        from .hopper_attention import hopper_attention  # another triton may not have what it imports

        hopper_attention(
            out, qkv, tiles, heads=heads, head_dim=head_dim, first=first, rest=rest,
            block_n=c.block_n, buffers=c.stages, programs=multiprocessors(qkv.device), count=count,
        )  # fmt: skip
        return
    attention_kernel[(tiles.shape[0], heads)](
        out, qkv, tiles, count, rows,
        HEADS=heads, KV_HEADS=(total - heads) // 2, HEAD_DIM=head_dim, STRIDE=stride, FIRST=first, REST=rest,
        PRECISION=precision(qkv.dtype), BLOCK_M=c.block_m, BLOCK_N=c.block_n, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip


@triton.jit
def attention_kernel(
    out_ptr, qkv_ptr,                          # [capacity, HEADS * HEAD_DIM], [HEADS + 2 KV_HEADS, capacity, STRIDE]
    tiles_ptr, count_ptr, capacity,            # int32 [tiles, 4]; tiles at count[0]
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, STRIDE: tl.constexpr,
    FIRST: tl.constexpr, REST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    if tile >= tl.load(count_ptr):
        return
    q0, q1 = tl.load(tiles_ptr + tile * 4), tl.load(tiles_ptr + tile * 4 + 1)
    k0, k1 = tl.load(tiles_ptr + tile * 4 + 2), tl.load(tiles_ptr + tile * 4 + 3)

    plane = capacity.to(tl.int64) * STRIDE
    kv_head = head // (HEADS // KV_HEADS)
    k_ptr, v_ptr = qkv_ptr + (HEADS + kv_head) * plane, qkv_ptr + (HEADS + KV_HEADS + kv_head) * plane
    offs_a, offs_m = tl.arange(0, FIRST), q0 + tl.arange(0, BLOCK_M)
    mask_a, mask_m = offs_a < HEAD_DIM, offs_m < q1
    q_ptrs = qkv_ptr + head * plane + offs_m.to(tl.int64)[:, None] * STRIDE
    q = tl.load(q_ptrs + offs_a[None, :], mask=mask_m[:, None] & mask_a[None, :], other=0.0)
    acc = tl.zeros((BLOCK_M, FIRST), tl.float32)
    if REST > 0:
        offs_b = FIRST + tl.arange(0, REST)
        mask_b = offs_b < HEAD_DIM
        q_rest = tl.load(q_ptrs + offs_b[None, :], mask=mask_m[:, None] & mask_b[None, :], other=0.0)
        acc_rest = tl.zeros((BLOCK_M, REST), tl.float32)

    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for n in range(k0, k1, BLOCK_N):
        # rows past the segment belong to a neighbour or to nobody: zero them, since 0 * NaN is NaN
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < k1
        at = offs_n.to(tl.int64) * STRIDE
        k = tl.load(k_ptr + at[None, :] + offs_a[:, None], mask=mask_n[None, :] & mask_a[:, None], other=0.0)
        v = tl.load(v_ptr + at[:, None] + offs_a[None, :], mask=mask_n[:, None] & mask_a[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION)
        if REST > 0:
            k_rest = tl.load(k_ptr + at[None, :] + offs_b[:, None], mask=mask_n[None, :] & mask_b[:, None], other=0.0)
            v_rest = tl.load(v_ptr + at[:, None] + offs_b[None, :], mask=mask_n[:, None] & mask_b[None, :], other=0.0)
            scores = tl.dot(q_rest, k_rest, scores, input_precision=PRECISION)
        scores = tl.where(mask_n[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        p = tl.exp2(scores - new[:, None])
        decay = tl.exp2(largest - new)
        total = total * decay + tl.sum(p, 1)
        largest = new
        p = p.to(v.dtype)
        acc = tl.dot(p, v, acc * decay[:, None], input_precision=PRECISION)
        if REST > 0:
            acc_rest = tl.dot(p, v_rest, acc_rest * decay[:, None], input_precision=PRECISION)

    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * (HEADS * HEAD_DIM) + head * HEAD_DIM
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptrs + offs_a[None, :], (acc / total[:, None]).to(dtype), mask=mask_m[:, None] & mask_a[None, :])
    if REST > 0:
        out_rest = (acc_rest / total[:, None]).to(dtype)
        tl.store(out_ptrs + offs_b[None, :], out_rest, mask=mask_m[:, None] & mask_b[None, :])
