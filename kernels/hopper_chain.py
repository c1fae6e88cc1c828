"""Matmuls that follow each other, in one launch on Hopper: for few rows, where a launch costs more than its matmul.

A tile is 64 x 64 and comes with a ticket. Programs take tickets in the order of the matmuls, and a tile waits only for
tiles with lower tickets: those of the matmul before that have its rows. So somebody always goes on, however few of the
programs the GPU runs at once. The weights of a tile's first steps are in shared memory before it has to wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
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

from .hopper_epilogues import fetch_residual, store_linear, store_qkv, store_residual
from .hopper_matmul import row_moments, vector_of

TILE = 64  # rows, columns and depth of a step
BUFFERS = 10
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def take(work, given, taken, turn, WARPS: gl.constexpr):
    """The ticket that the loading warp has drawn, once the rows that its tile reads are there."""
    at = turn % 2
    mbarrier.wait(given.index(at), (turn // 2) & 1)
    ticket = gl.max(work.index(at).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)
    mbarrier.arrive(taken.index(at), count=1)
    return ticket


@gluon.jit
def give(ticket, work, given, taken, turn):
    at = turn % 2
    mbarrier.wait(taken.index(at), ((turn // 2) & 1) ^ 1)
    work.index(at).store(gl.full([1], ticket, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(given.index(at), count=1)


@gluon.jit
def wait_for(arrived_ptr, tiles):
    """Until all `tiles` of a row of tiles are stored; what TMA reads afterwards is what they are."""
    arrived = gl.atomic_add(arrived_ptr, 0, sem="acquire", scope="gpu")
    while arrived < tiles:
        arrived = gl.atomic_add(arrived_ptr, 0, sem="acquire", scope="gpu")
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.b32 $0, $1;", "=r,r", [arrived], gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def load_link(
    nth, a_desc, b_desc, N, K, rows, first, before, ticket, turn, step, arrivals_ptr, row_tiles, tickets, shared,
    BUFFERS: gl.constexpr,
):  # fmt: skip
    """The loading warp's part of one matmul: draws tickets, and loads what their tiles multiply."""
    a, b, full, empty = shared
    work, given, taken = tickets
    tiles_n, steps = gl.cdiv(N, 64), gl.cdiv(K, 64)
    ahead = gl.minimum(steps, BUFFERS)
    end = first + gl.cdiv(rows, 64) * tiles_n
    while ticket < end:
        row, column = (ticket - first) // tiles_n, (ticket - first) % tiles_n * 64
        for k in range(ahead):
            at = (step + k) % BUFFERS
            mbarrier.wait(empty.index(at), (((step + k) // BUFFERS) & 1) ^ 1)
            mbarrier.expect(full.index(at), 2 * 64 * 64 * 2)
            tma.async_copy_global_to_shared(b_desc, [column, k * 64], full.index(at), b.index(at))
        if nth > 0:
            wait_for(arrivals_ptr + nth * row_tiles + row, before)
        give(ticket, work, given, taken, turn)
        for k in range(ahead):
            at = (step + k) % BUFFERS
            tma.async_copy_global_to_shared(a_desc, [row * 64, k * 64], full.index(at), a.index(at))
        for k in range(ahead, steps):
            at = (step + k) % BUFFERS
            mbarrier.wait(empty.index(at), (((step + k) // BUFFERS) & 1) ^ 1)
            mbarrier.expect(full.index(at), 2 * 64 * 64 * 2)
            tma.async_copy_global_to_shared(a_desc, [row * 64, k * 64], full.index(at), a.index(at))
            tma.async_copy_global_to_shared(b_desc, [column, k * 64], full.index(at), b.index(at))
        step += steps
        turn += 1
        ticket = gl.atomic_add(arrivals_ptr, 1, sem="relaxed", scope="gpu")
    return end, tiles_n, ticket, turn, step


@gluon.jit
def load_links(
    operands, links, count_ptr, arrivals_ptr, row_tiles, tickets, shared, LINKS: gl.constexpr, BUFFERS: gl.constexpr
):  # fmt: skip
    """The loading warp draws tickets, and loads what their tiles multiply."""
    rows = gl.load(count_ptr)  # under way while the ticket is drawn
    ticket = gl.atomic_add(arrivals_ptr, 1, sem="relaxed", scope="gpu")
    first = 0
    before = 0  # tiles of a row of the matmul before
    turn = 0
    step = 0
    for nth in gl.static_range(LINKS):
        first, before, ticket, turn, step = load_link(
            nth, operands[nth][0], operands[nth][1], links[nth][0], links[nth][1], rows, first, before, ticket, turn,
            step, arrivals_ptr, row_tiles, tickets, shared, BUFFERS,
        )  # fmt: skip
    work, given, taken = tickets
    give(ticket, work, given, taken, turn)


@gluon.jit
def prepare_link(
    link, rows, capacity, first, ticket, turn, tickets, vectors,
    PARTS: gl.constexpr, CENTRED: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The preparing warps' part of one matmul: what the epilogues need of every tile's rows and columns."""
    N, K, eps, columns, places_ptr, sums_ptr, _ = link
    work, given, taken = tickets
    row_side, column_side, ready, used = vectors
    threads: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    tiles_n = gl.cdiv(N, 64)
    end = first + gl.cdiv(rows, 64) * tiles_n
    while ticket < end:
        offs = (ticket - first) // tiles_n * 64 + gl.arange(0, 64, layout=threads)
        offs_n = (ticket - first) % tiles_n * 64 + gl.arange(0, 64, layout=threads)
        of_columns = ()
        for i in gl.static_range(4):
            of_columns += (vector_of(columns[i], offs_n, N),)  # type: ignore[assignment]
        if places_ptr is not None:
            y = vector_of(places_ptr, offs, rows)
            x = vector_of(places_ptr, capacity + offs, capacity + rows)
        mbarrier.wait(used.index(0), (turn & 1) ^ 1)
        if PARTS > 0:
            rstd, shift = row_moments(sums_ptr, offs, rows, capacity, K, eps, PARTS, CENTRED)
            row_side.index(0).store(rstd)
            row_side.index(1).store(shift)
        if places_ptr is not None:
            row_side.index(2).store(y)
            row_side.index(3).store(x)
        for i in gl.static_range(4):
            if columns[i] is not None:
                column_side.index(i).store(of_columns[i])
        mbarrier.arrive(ready.index(0), count=1)
        turn += 1
        ticket = take(work, given, taken, turn, WARPS)
    return end, ticket, turn


@gluon.jit
def prepare_links(
    links, count_ptr, capacity, tickets, vectors, LINKS: gl.constexpr, FORMS: gl.constexpr, WARPS: gl.constexpr
):
    work, given, taken = tickets
    rows = gl.load(count_ptr)
    first = 0
    turn = 0
    ticket = take(work, given, taken, turn, WARPS)
    for nth in gl.static_range(LINKS):
        first, ticket, turn = prepare_link(
            links[nth], rows, capacity, first, ticket, turn, tickets, vectors, FORMS[nth][0], FORMS[nth][1], WARPS
        )


@gluon.jit
def multiply_link(
    link, rows, first, ticket, turn, step, arrived_ptr, shared, tickets, vectors,
    FETCH: gl.constexpr, EPILOGUE: gl.constexpr, OPTIONS: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """The warpgroup's part of one matmul: each tile's product, its epilogue, and word of it to those who wait."""
    N, K, _, _, _, _, operands = link
    a, b, full, empty = shared
    work, given, taken = tickets
    row_side, column_side, ready, used = vectors
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    tiles_n, steps = gl.cdiv(N, 64), gl.cdiv(K, 64)
    end = first + gl.cdiv(rows, 64) * tiles_n
    while ticket < end:
        row, column = (ticket - first) // tiles_n * 64, (ticket - first) % tiles_n * 64
        fetched = None
        if FETCH is not None:
            fetched = FETCH(row, column, rows, N, operands, 64, 4)
        acc = gl.zeros([64, 64], gl.float32, layout)
        for k in range(steps):
            at = step % BUFFERS
            mbarrier.wait(full.index(at), (step // BUFFERS) & 1)
            acc = warpgroup_mma(a.index(at), b.index(at).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index((step + BUFFERS - 1) % BUFFERS), count=1, pred=k > 0)  # the last step's
            step += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((step + BUFFERS - 1) % BUFFERS), count=1)
        mbarrier.wait(ready.index(0), turn & 1)
        EPILOGUE(acc, fetched, row, column, rows, N, (row_side, 0), (column_side, 0), operands, OPTIONS, 4)
        mbarrier.arrive(used.index(0), count=1)
        if arrived_ptr is not None:
            gl.thread_barrier()
            gl.atomic_add(arrived_ptr + row // 64, 1, sem="release", scope="gpu")
        turn += 1
        ticket = take(work, given, taken, turn, 4)
    return end, ticket, turn, step


@gluon.jit
def multiply_links(
    links, count_ptr, arrivals_ptr, row_tiles, shared, tickets, vectors,
    LINKS: gl.constexpr, RESIDUAL: gl.constexpr, LINEAR: gl.constexpr, QKV: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    work, given, taken = tickets
    rows = gl.load(count_ptr)
    first = 0
    turn = 0
    step = 0
    ticket = take(work, given, taken, turn, 4)
    first, ticket, turn, step = multiply_link(
        links[0], rows, first, ticket, turn, step, arrivals_ptr + row_tiles, shared, tickets, vectors,
        fetch_residual, store_residual, RESIDUAL, BUFFERS,
    )  # fmt: skip
    first, ticket, turn, step = multiply_link(
        links[1], rows, first, ticket, turn, step, arrivals_ptr + 2 * row_tiles, shared, tickets, vectors,
        None, store_linear, LINEAR, BUFFERS,
    )  # fmt: skip
    first, ticket, turn, step = multiply_link(
        links[2], rows, first, ticket, turn, step, arrivals_ptr + 3 * row_tiles, shared, tickets, vectors,
        fetch_residual, store_residual, RESIDUAL, BUFFERS,
    )  # fmt: skip
    if LINKS > 3:
        multiply_link(
            links[3], rows, first, ticket, turn, step, None, shared, tickets, vectors, None, store_qkv, QKV, BUFFERS
        )


@gluon.jit
def hopper_chain_kernel(
    a0, b0, a1, b1, a2, b2, a3, b3,            # [rows, K] and [N, K] of each matmul, in boxes of 64 x 64
    links,                                     # of each: N, K, eps, columns, places, sums, operands
    count_ptr, arrivals_ptr,                   # rows at [0]; int32 [LINKS, row_tiles], zeros: tickets drawn at [0, 0]
    capacity, row_tiles,
    LINKS: gl.constexpr, RESIDUAL: gl.constexpr, LINEAR: gl.constexpr, QKV: gl.constexpr, FORMS: gl.constexpr,
    BUFFERS: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    a = gl.allocate_shared_memory(DTYPE, [BUFFERS, 64, 64], a0.layout)
    b = gl.allocate_shared_memory(DTYPE, [BUFFERS, 64, 64], b0.layout)
    row_side = gl.allocate_shared_memory(gl.float32, [4, 64], flat)
    column_side = gl.allocate_shared_memory(gl.float32, [4, 64], flat)
    work = gl.allocate_shared_memory(gl.int32, [2, 1], flat)
    full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    given = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    used = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(given.index(i), count=1)
        mbarrier.init(taken.index(i), count=2)
    mbarrier.init(ready.index(0), count=1)
    mbarrier.init(used.index(0), count=1)
    for i in gl.static_range(BUFFERS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()  # TMA completes the barriers
    shared = (a, b, full, empty)
    tickets = (work, given, taken)
    vectors = (row_side, column_side, ready, used)
    operands = ((a0, b0), (a1, b1), (a2, b2), (a3, b3))
    gl.warp_specialize(
        [
            (multiply_links, (
                links, count_ptr, arrivals_ptr, row_tiles, shared, tickets, vectors,
                LINKS, RESIDUAL, LINEAR, QKV, BUFFERS,
            )),
            (load_links, (operands, links, count_ptr, arrivals_ptr, row_tiles, tickets, shared, LINKS, BUFFERS)),
            (prepare_links, (links, count_ptr, capacity, tickets, vectors, LINKS, FORMS, 2)),
        ],
        [1, 2],  # warps of all but the first
        [56, 56],  # their registers a thread
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Matmul:
    """The arguments of hopper_matmul.hopper_matmul."""

    a: torch.Tensor
    weight: torch.Tensor
    epilogue: Any
    operands: tuple[Any, ...]
    options: tuple[Any, ...]
    columns: tuple[torch.Tensor | None, ...]
    places: torch.Tensor | None
    moments: tuple[torch.Tensor | None, float, bool]


def hopper_chain(links: Sequence[Matmul], arrivals: torch.Tensor, *, programs: int, count: torch.Tensor) -> None:
    """Launch `links` one behind the other. arrivals: int32 zeros [matmuls, tiles of rows]."""
    dtype, capacity = _DTYPES[links[0].a.dtype], len(links[0].a)
    layout = gl.NVMMASharedLayout.get_default_for([TILE, TILE], dtype)
    boxes = [TensorDescriptor.from_tensor(m, [TILE, TILE], layout) for link in links for m in (link.a, link.weight)]
    boxes += boxes[:2] * (4 - len(links))
    tiles = sum(triton.cdiv(capacity, TILE) * triton.cdiv(len(link.weight), TILE) for link in links)
    hopper_chain_kernel[(min(programs, tiles),)](
        *boxes,
        tuple(
            (*link.weight.shape, link.moments[1], link.columns, link.places, link.moments[0], link.operands)
            for link in links
        ),
        count, arrivals, capacity, arrivals.shape[1],
        LINKS=len(links),
        RESIDUAL=links[0].options, LINEAR=links[1].options, QKV=links[3].options if len(links) > 3 else None,
        FORMS=tuple(
            (0 if sums is None else sums.shape[1], centred) for sums, _, centred in (link.moments for link in links)
        ),
        BUFFERS=BUFFERS, DTYPE=dtype, num_warps=4, maxnreg=128,
    )  # fmt: skip
