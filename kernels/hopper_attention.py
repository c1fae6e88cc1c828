"""Attention on Hopper in Gluon: a warp that loads, and two warpgroups whose softmaxes run under each other's matmuls.

A program takes tiles of 128 query rows, 64 for each warpgroup, one after the other. Keys and values of the tile's
segment stream through shared memory by TMA. Within a warpgroup the scores of a block are multiplied while the last
block's values are (FlashAttention-3, arXiv 2407.08608, section 3.2), across tiles too: the first scores of a tile with
the last values of the one before it. Between them the warpgroups take turns (3.1). Where a head's rows have room for
it, a column of ones in V makes the product yield the softmax's denominator.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

GROUP_ROWS = 64  # query rows of a warpgroup
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def hopper_attention(
    out: torch.Tensor, qkv: torch.Tensor, tiles: torch.Tensor, *, heads: int, head_dim: int, first: int, rest: int,
    block_n: int, buffers: int, programs: int, count: torch.Tensor,
) -> None:  # fmt: skip
    """Launch over the tiles (128 query rows each) that count[0] holds. Shapes as in attention.attention, 16-bit."""
    total, rows, stride = qkv.shape
    planes = qkv.view(total * rows, stride)
    heads_only = planes[:, :head_dim]  # TMA fills the columns past it with zeros

    def box(height: int, width: int, matrix: torch.Tensor = heads_only) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for([height, width], _DTYPES[qkv.dtype])
        return TensorDescriptor.from_tensor(matrix, [height, width], layout)

    hopper_attention_kernel[(min(programs, tiles.shape[0] * heads),)](
        box(GROUP_ROWS, first), box(GROUP_ROWS, rest or first),
        box(block_n, first), box(block_n, rest or first), box(block_n, rest or first, planes),
        out, tiles, count, rows,
        HEADS=heads, KV_HEADS=(total - heads) // 2, HEAD_DIM=head_dim, FIRST=first, REST=rest, ONES=stride > head_dim,
        BLOCK_N=block_n, BUFFERS=buffers, PROGRAMS=programs, DTYPE=_DTYPES[qkv.dtype],
        num_warps=4, maxnreg=168,
    )  # fmt: skip


@gluon.jit
def scores_of(q, q_rest, k, k_rest, at, zero, REST: gl.constexpr):
    """Issue q @ k.T for the block in buffer `at`."""
    scores = warpgroup_mma(q, k.index(at).permute((1, 0)), zero, use_acc=False, is_async=True)
    if REST > 0:
        scores = warpgroup_mma(q_rest, k_rest.index(at).permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def queries(q, q_rest, at, LAYOUT: gl.constexpr, FIRST: gl.constexpr, REST: gl.constexpr):
    """A warpgroup's queries.

    Those of 64 columns in 16 registers a thread, so that keys have more of the shared memory's bandwidth: 1111 -> 1066
    us for 10764 rows. Wider ones leave too few registers.
    """
    mine = q.index(at)
    if FIRST + REST <= 64:
        mine = mine.load(LAYOUT)
    return mine, q_rest.index(at)


@gluon.jit
def first_row(j, rows, BLOCK_N: gl.constexpr):
    """Where in a segment its j-th block of keys begins. The first to be taken are the segment's last BLOCK_N rows.

    Of those, the rows that another block has too do not count (first_weights). Only in a segment shorter than a block
    are there rows past its end.
    """
    return gl.where(j == 0, gl.maximum(rows - BLOCK_N, 0), (j - 1) * BLOCK_N)


@gluon.jit
def first_weights(scores, columns, rows, BLOCK_N: gl.constexpr, DTYPE: gl.constexpr, ONES: gl.constexpr):
    """Of a segment's first block: the largest score, the weights and, unless V has a column of ones, their sum."""
    key = first_row(0, rows, BLOCK_N) + columns
    counts = (key >= (gl.cdiv(rows, BLOCK_N) - 1) * BLOCK_N) & (key < rows)
    scores = gl.where(gl.expand_dims(counts, 0), scores, float("-inf"))
    largest = gl.max(scores, 1)
    p = gl.exp2(scores - gl.expand_dims(largest, 1))
    total = gl.zeros([p.shape[0]], gl.float32, gl.SliceLayout(1, p.type.layout)) if ONES else gl.sum(p, 1)
    return largest, p.to(DTYPE), total


@gluon.jit
def zero_rows(x, first, START: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, DTYPE: gl.constexpr):
    """Of ROWS rows of a shared tile from START on, those from row `first` of the tile on become zero.

    They are a neighbour's, and 0 * NaN is NaN.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0])
    part = x.slice(START, ROWS)
    value = part.load(layout)
    row = START + gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)), 1)
    part.store(gl.where(row < first, value, gl.zeros([ROWS, COLUMNS], DTYPE, layout)))


@gluon.jit
def find_tile(tiles_ptr, work, HEADS: gl.constexpr):
    """Which queries, keys and head: the tiles of a segment, head by head, so that its keys stay in the L2."""
    entry = tiles_ptr + work // HEADS * 4  # some tile of the segment
    q0, k0, k1 = gl.load(entry), gl.load(entry + 2), gl.load(entry + 3)
    tiles = gl.cdiv(k1 - k0, 128)
    nth = work - (work // HEADS - (q0 - k0) // 128) * HEADS
    return k0 + nth % tiles * 128, k0, k1, nth // tiles


@gluon.jit
def load_tiles(
    q_desc, q_rest_desc, kv_desc, k_rest_desc, v_rest_desc, tiles_ptr, tiles, capacity,
    q, q_rest, k, k_rest, v, v_rest, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, FIRST: gl.constexpr, REST: gl.constexpr,
    BLOCK_N: gl.constexpr, BUFFERS: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """The loading warp: queries of every tile, then its keys and values, the last block first."""
    GROUP: gl.constexpr = 64
    block = 0
    turn = 0
    for work in range(gl.program_id(0), tiles * HEADS, PROGRAMS):
        q0, k0, k1, head = find_tile(tiles_ptr, work, HEADS)
        kv_head = head // (HEADS // KV_HEADS)
        query = head * capacity + q0
        key, value = (HEADS + kv_head) * capacity + k0, (HEADS + KV_HEADS + kv_head) * capacity + k0
        own, phase = turn % 2, ((turn // 2) & 1) ^ 1
        full = q_full.index(own)
        mbarrier.wait(q_empty.index(own), phase)
        mbarrier.expect(full, 2 * GROUP * (FIRST + REST) * 2)
        for group in gl.static_range(2):
            row = query + group * GROUP
            tma.async_copy_global_to_shared(q_desc, [row, 0], full, q.index(own * 2 + group))
            if REST > 0:
                tma.async_copy_global_to_shared(q_rest_desc, [row, FIRST], full, q_rest.index(own * 2 + group))
        blocks = gl.cdiv(k1 - k0, BLOCK_N)
        for j in range(blocks):
            row = first_row(j, k1 - k0, BLOCK_N)
            at, phase = block % BUFFERS, ((block // BUFFERS) & 1) ^ 1
            full = k_full.index(at)
            mbarrier.wait(k_empty.index(at), phase)
            mbarrier.expect(full, BLOCK_N * (FIRST + REST) * 2)
            tma.async_copy_global_to_shared(kv_desc, [key + row, 0], full, k.index(at))
            if REST > 0:
                tma.async_copy_global_to_shared(k_rest_desc, [key + row, FIRST], full, k_rest.index(at))
            full = v_full.index(at)
            mbarrier.wait(v_empty.index(at), phase)
            mbarrier.expect(full, BLOCK_N * (FIRST + REST) * 2)
            tma.async_copy_global_to_shared(kv_desc, [value + row, 0], full, v.index(at))
            if REST > 0:
                tma.async_copy_global_to_shared(v_rest_desc, [value + row, FIRST], full, v_rest.index(at))
            block += 1
        turn += 1


@gluon.jit
def attend(
    out_ptr, tiles_ptr, tiles,
    q, q_rest, k, k_rest, v, v_rest, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns, cleared,
    GROUP_ID: gl.constexpr, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr,
    FIRST: gl.constexpr, REST: gl.constexpr, ONES: gl.constexpr,
    BLOCK_N: gl.constexpr, BUFFERS: gl.constexpr, PROGRAMS: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """A warpgroup: softmax(q k.T) v for its 64 rows of every tile."""
    GROUP: gl.constexpr = 64
    HALF: gl.constexpr = BLOCK_N // 2
    ls: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    la: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FIRST, 16])
    lb: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST if REST > 0 else 16, 16])
    row_a: gl.constexpr = gl.SliceLayout(1, la)
    row_b: gl.constexpr = gl.SliceLayout(1, lb)
    operand_q: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ls, k_width=2)
    operand_a: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=la, k_width=2)
    operand_b: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=lb, k_width=2)
    columns = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, ls))
    zero = gl.zeros([GROUP, BLOCK_N], gl.float32, ls)
    block = 0
    turn = 0
    swaps = 0
    clearings = 0
    work = gl.program_id(0)
    if work < tiles * HEADS:
        q0, k0, k1, head = find_tile(tiles_ptr, work, HEADS)
        mbarrier.wait(q_full.index(0), 0)
        my_q, my_q_rest = queries(q, q_rest, GROUP_ID, operand_q, FIRST, REST)
        mbarrier.wait(k_full.index(0), 0)
        scores = warpgroup_mma_wait(0, deps=(scores_of(my_q, my_q_rest, k, k_rest, 0, zero, REST),))
        mbarrier.arrive(k_empty.index(0), count=1)
        largest, p, total = first_weights(scores, columns, k1 - k0, BLOCK_N, DTYPE, ONES)
        while work < tiles * HEADS:
            blocks = gl.cdiv(k1 - k0, BLOCK_N)
            acc = gl.zeros([GROUP, FIRST], gl.float32, la)
            p_a = gl.convert_layout(p, operand_a)
            if REST > 0:
                acc_rest = gl.zeros([GROUP, REST], gl.float32, lb)
                p_b = gl.convert_layout(p, operand_b)
            if k1 - k0 < BLOCK_N:  # each warpgroup clears half of the rows and waits for the other
                at = block % BUFFERS
                mbarrier.wait(v_full.index(at), (block // BUFFERS) & 1)
                zero_rows(v.index(at), k1 - k0, GROUP_ID * HALF, HALF, FIRST, DTYPE)
                if REST > 0:
                    zero_rows(v_rest.index(at), k1 - k0, GROUP_ID * HALF, HALF, REST, DTYPE)
                fence_async_shared()
                mbarrier.arrive(cleared, count=1)
                mbarrier.wait(cleared, clearings & 1)
                clearings += 1
            mbarrier.wait(k_full.index((block + 1) % BUFFERS), ((block + 1) // BUFFERS) & 1, pred=blocks > 1)
            for j in range(1, blocks):
                last, last_phase = block % BUFFERS, (block // BUFFERS) & 1
                block += 1
                at = block % BUFFERS
                mbarrier.wait(turns.index(GROUP_ID), (swaps & 1) ^ (1 - GROUP_ID))
                scores = scores_of(my_q, my_q_rest, k, k_rest, at, zero, REST)
                mbarrier.wait(v_full.index(last), last_phase)
                acc = warpgroup_mma(p_a, v.index(last), acc, is_async=True)
                if REST > 0:
                    acc_rest = warpgroup_mma(p_b, v_rest.index(last), acc_rest, is_async=True)
                mbarrier.arrive(turns.index(1 - GROUP_ID), count=1)
                swaps += 1
                scores = warpgroup_mma_wait(2 if REST > 0 else 1, deps=(scores,))
                mbarrier.arrive(k_empty.index(at), count=1)
                new = gl.maximum(largest, gl.max(scores, 1))
                decay = gl.exp2(largest - new)
                p = gl.exp2(scores - gl.expand_dims(new, 1))
                if not ONES:
                    total = total * decay + gl.sum(p, 1)
                largest = new
                p = p.to(DTYPE)
                # waiting for the next keys here keeps the softmax, in ptxas's schedule, before the wait for the values
                mbarrier.wait(k_full.index((block + 1) % BUFFERS), ((block + 1) // BUFFERS) & 1, pred=j + 1 < blocks)
                if REST > 0:
                    acc, acc_rest, p, total = warpgroup_mma_wait(0, deps=(acc, acc_rest, p, total))
                else:
                    acc, p, total = warpgroup_mma_wait(0, deps=(acc, p, total))
                mbarrier.arrive(v_empty.index(last), count=1)
                acc = acc * gl.expand_dims(gl.convert_layout(decay, row_a), 1)
                p_a = gl.convert_layout(p, operand_a)
                if REST > 0:
                    acc_rest = acc_rest * gl.expand_dims(gl.convert_layout(decay, row_b), 1)
                    p_b = gl.convert_layout(p, operand_b)
            if FIRST + REST <= 64:
                fence_async_shared()  # the queries were read into registers, and TMA writes over them
            mbarrier.arrive(q_empty.index(turn % 2), count=1)
            turn += 1

            # the tile's last values, and with them the next tile's first scores
            last, last_phase = block % BUFFERS, (block // BUFFERS) & 1
            block += 1
            row, end, of_head, denominator = q0 + GROUP_ID * GROUP, k1, head, total
            work += PROGRAMS
            if work < tiles * HEADS:
                at = block % BUFFERS
                q0, k0, k1, head = find_tile(tiles_ptr, work, HEADS)
                mbarrier.wait(q_full.index(turn % 2), (turn // 2) & 1)
                my_q, my_q_rest = queries(q, q_rest, turn % 2 * 2 + GROUP_ID, operand_q, FIRST, REST)
                mbarrier.wait(k_full.index(at), (block // BUFFERS) & 1)
                mbarrier.wait(turns.index(GROUP_ID), (swaps & 1) ^ (1 - GROUP_ID))
                scores = scores_of(my_q, my_q_rest, k, k_rest, at, zero, REST)
                mbarrier.wait(v_full.index(last), last_phase)
                acc = warpgroup_mma(p_a, v.index(last), acc, is_async=True)
                if REST > 0:
                    acc_rest = warpgroup_mma(p_b, v_rest.index(last), acc_rest, is_async=True)
                mbarrier.arrive(turns.index(1 - GROUP_ID), count=1)
                swaps += 1
                scores = warpgroup_mma_wait(2 if REST > 0 else 1, deps=(scores,))
                mbarrier.arrive(k_empty.index(at), count=1)
                largest, p, total = first_weights(scores, columns, k1 - k0, BLOCK_N, DTYPE, ONES)
                if REST > 0:
                    acc, acc_rest, p, total = warpgroup_mma_wait(0, deps=(acc, acc_rest, p, total))
                else:
                    acc, p, total = warpgroup_mma_wait(0, deps=(acc, p, total))
            else:
                mbarrier.wait(v_full.index(last), last_phase)
                acc = warpgroup_mma(p_a, v.index(last), acc, is_async=True)
                if REST > 0:
                    acc_rest = warpgroup_mma(p_b, v_rest.index(last), acc_rest, is_async=True)
                    acc, acc_rest = warpgroup_mma_wait(0, deps=(acc, acc_rest))
                else:
                    acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(v_empty.index(last), count=1)
            if ONES:
                column = gl.expand_dims(gl.arange(0, REST, layout=gl.SliceLayout(0, lb)), 0)
                denominator = gl.sum(gl.where(column == HEAD_DIM - FIRST, acc_rest, 0.0), 1)
            store_heads(out_ptr, acc, denominator, row, end, of_head, 0, HEADS, HEAD_DIM, DTYPE)
            if REST > 0:
                store_heads(out_ptr, acc_rest, denominator, row, end, of_head, FIRST, HEADS, HEAD_DIM, DTYPE)


@gluon.jit
def store_heads(
    out_ptr, acc, total, row, end, head, first: gl.constexpr, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """acc / total into out [rows, HEADS * HEAD_DIM], columns of a head from `first` on, 16 bytes a thread."""
    of_rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    WIDTH: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    value = (acc * gl.expand_dims(gl.convert_layout(1.0 / total, of_rows), 1)).to(DTYPE)
    rows = row + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, layout))
    column = first + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    ptrs = (
        out_ptr
        + gl.expand_dims(rows.to(gl.int64) * (HEADS * HEAD_DIM), 1)
        + gl.expand_dims(head * HEAD_DIM + column, 0)
    )
    mask = gl.expand_dims(rows < end, 1) & gl.expand_dims(column < HEAD_DIM, 0)
    gl.store(ptrs, gl.convert_layout(value, layout), mask=mask)


@gluon.jit
def hopper_attention_kernel(
    q_desc, q_rest_desc, kv_desc, k_rest_desc,  # [planes, HEAD_DIM] in boxes of 64 or BLOCK_N rows, FIRST or REST wide
    v_rest_desc,                                # the same with the columns behind a head
    out_ptr, tiles_ptr, count_ptr, capacity,     # [capacity, HEADS * HEAD_DIM]; int32 [tiles, 4]; tiles at count[0]
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, FIRST: gl.constexpr, REST: gl.constexpr,
    ONES: gl.constexpr, BLOCK_N: gl.constexpr, BUFFERS: gl.constexpr, PROGRAMS: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    tiles = gl.load(count_ptr)
    q = gl.allocate_shared_memory(DTYPE, [4, 64, FIRST], q_desc.layout)  # of this tile and the next
    k = gl.allocate_shared_memory(DTYPE, [BUFFERS, BLOCK_N, FIRST], kv_desc.layout)
    v = gl.allocate_shared_memory(DTYPE, [BUFFERS, BLOCK_N, FIRST], kv_desc.layout)
    if REST > 0:
        q_rest = gl.allocate_shared_memory(DTYPE, [4, 64, REST], q_rest_desc.layout)
        k_rest = gl.allocate_shared_memory(DTYPE, [BUFFERS, BLOCK_N, REST], k_rest_desc.layout)
        v_rest = gl.allocate_shared_memory(DTYPE, [BUFFERS, BLOCK_N, REST], v_rest_desc.layout)
    else:
        q_rest = q
        k_rest = k
        v_rest = v
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    cleared = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
        mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(BUFFERS):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    mbarrier.init(cleared.index(0), count=2)
    fence_async_shared()  # TMA completes the barriers
    gl.warp_specialize(
        [
            (attend, (
                out_ptr, tiles_ptr, tiles, q, q_rest, k, k_rest, v, v_rest,
                q_full, q_empty, k_full, k_empty, v_full, v_empty, turns, cleared.index(0), 0,
                HEADS, HEAD_DIM, FIRST, REST, ONES, BLOCK_N, BUFFERS, PROGRAMS, DTYPE,
            )),
            (attend, (
                out_ptr, tiles_ptr, tiles, q, q_rest, k, k_rest, v, v_rest,
                q_full, q_empty, k_full, k_empty, v_full, v_empty, turns, cleared.index(0), 1,
                HEADS, HEAD_DIM, FIRST, REST, ONES, BLOCK_N, BUFFERS, PROGRAMS, DTYPE,
            )),
            (load_tiles, (
                q_desc, q_rest_desc, kv_desc, k_rest_desc, v_rest_desc, tiles_ptr, tiles, capacity,
                q, q_rest, k, k_rest, v, v_rest, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                HEADS, KV_HEADS, FIRST, REST, BLOCK_N, BUFFERS, PROGRAMS,
            )),
        ],
        [4, 1],  # warps of the second warpgroup and of the loader
        [240, 24],  # their registers a thread
    )  # fmt: skip
