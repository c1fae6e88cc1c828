"""The matmuls on Hopper in Gluon: warps that load and prepare, and warps that multiply and have epilogues.

Either those share a tile, or two groups have tiles of their own and take turns at the tensor cores, so that one's
epilogue runs under the other's main loop (CUTLASS's "cooperative" and "ping-pong" schedules). It does only as long
as it is the shorter of the two, so warps of their own put what epilogues need of a tile's rows and columns into shared
memory; one more loads the operands by TMA. A tile of 192 columns is two matmuls a step, 128 and 64 wide, since Gluon's
tensors are powers of two. Programs are as many as multiprocessors and read the count of rows on the device.
"""

from __future__ import annotations

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

from .address import Address, pointer
from .config import HopperConfig

BLOCK_K = 64  # 128 bytes of a row: the widest swizzle
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
Vectors = tuple[torch.Tensor | None, ...]


def hopper_matmul(
    a: torch.Tensor, weight: torch.Tensor, epilogue: Any, out: torch.Tensor | Address, operands: tuple[Any, ...],
    options: tuple[Any, ...], *,
    fetch: Any = None, columns: Vectors, places: torch.Tensor | None = None,
    moments: tuple[torch.Tensor | None, float, bool], config: HopperConfig, programs: int, count: torch.Tensor,
) -> None:  # fmt: skip
    """epilogue(a @ weight.T) in 16 bits: a [rows, depth], weight [columns, depth], of the rows that count[0] holds.

    epilogue: a Gluon function of a tile's piece, `out` with `operands`, and `options`; fetch: one that loads for it
    what is of a piece's size, early where registers hold that. What the epilogue finds in shared memory: of rows,
    1/std and -mean/std by `moments` (sums, eps, centred) and `places` [2, rows]; of columns, the vectors `columns`:
    bias, column sums, and frequencies [2, columns], all fp32 or None.
    """
    (rows, depth), dtype = a.shape, _DTYPES[a.dtype]
    sums, eps, centred = moments
    first = 1 << (config.block_n.bit_length() - 1)
    rest = config.block_n - first
    group_rows = config.block_m // (3 if config.groups == 3 else 1)
    eight = config.groups == 1 and group_rows > 64  # warps of a group

    def boxes(matrix: torch.Tensor, height: int) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for([height, BLOCK_K], dtype)
        return TensorDescriptor.from_tensor(matrix, [height, BLOCK_K], layout)

    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(len(weight), config.block_n)
    hopper_matmul_kernel[(min(programs, tiles),)](
        boxes(a, group_rows), boxes(weight, first), boxes(weight, rest or first),
        pointer(out), operands, columns, places, sums, count,
        len(weight), depth, 0 if sums is None else sums.shape[2], eps,
        FETCH=fetch, EPILOGUE=epilogue, OPTIONS=options,
        PARTS=0 if sums is None else sums.shape[1], CENTRED=centred,
        ROWS=group_rows, FIRST=first, REST=rest, GROUPS=config.groups,
        BUFFERS=config.buffers, PROGRAMS=min(programs, tiles), DTYPE=dtype,
        num_warps=8 if eight else 4, maxnreg=168 if eight else 128,
    )  # fmt: skip


@gluon.jit
def load_operands(
    a_desc, b_desc, b_rest_desc, rows, N, K, shared,
    ROWS: gl.constexpr, FIRST: gl.constexpr, REST: gl.constexpr, SHARING: gl.constexpr,
    BUFFERS: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """The loading warp: every step of every tile, in the order in which the warpgroups multiply them."""
    a, b, b_rest, full, empty = shared
    tiles_n = gl.cdiv(N, FIRST + REST)
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(rows, ROWS * SHARING) * tiles_n, PROGRAMS):
        row, column = tile // tiles_n * (ROWS * SHARING), tile % tiles_n * (FIRST + REST)
        for k in range(0, K, 64):
            at = step % BUFFERS
            landed = full.index(at)
            mbarrier.wait(empty.index(at), ((step // BUFFERS) & 1) ^ 1)
            mbarrier.expect(landed, (ROWS * SHARING + FIRST + REST) * 64 * 2)
            for group in gl.static_range(SHARING):
                tma.async_copy_global_to_shared(a_desc, [row + group * ROWS, k], landed, a.index(at * SHARING + group))
            tma.async_copy_global_to_shared(b_desc, [column, k], landed, b.index(at))
            if REST > 0:
                tma.async_copy_global_to_shared(b_rest_desc, [column + FIRST, k], landed, b_rest.index(at))
            step += 1


@gluon.jit
def halves(x):
    """The left and the right columns of x, without moving anything."""
    pair = gl.permute(gl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1))
    return gl.split(pair)


@gluon.jit
def vector_of(ptr, offs, end):
    """Elements `offs` of a vector, 0 from `end` on or where there is none."""
    layout: gl.constexpr = offs.type.layout
    values = gl.zeros([offs.shape[0]], gl.float32, layout)
    if ptr is not None:
        values = gl.load(ptr + offs, mask=offs < end, other=0.0)
    return values


@gluon.jit
def row_moments(sums_ptr, offs, rows, capacity, width, eps, PARTS: gl.constexpr, CENTRED: gl.constexpr):
    """1/std and -mean/std of rows, as in device.row_moments: the same sums in the same order."""
    layout: gl.constexpr = offs.type.layout
    inside = offs < rows
    total = gl.zeros([offs.shape[0]], gl.float32, layout)
    square = gl.zeros([offs.shape[0]], gl.float32, layout)
    for first in range(0, PARTS, 6):  # as many loads in flight as registers hold
        for part in gl.static_range(6):
            sums = sums_ptr + (first + part) * capacity + offs
            wanted = inside & (first + part < PARTS)
            total += gl.load(sums, mask=wanted, other=0.0)
            square += gl.load(sums + PARTS * capacity, mask=wanted, other=0.0)
    mean = total / width
    if not CENTRED:
        mean = gl.zeros([offs.shape[0]], gl.float32, layout)
    rstd = gl.rsqrt(gl.maximum(square / width - mean * mean, 0.0) + eps)
    return rstd, -(mean * rstd)


@gluon.jit
def prepare_vectors(
    numbers, vectors,
    PARTS: gl.constexpr, CENTRED: gl.constexpr,
    ROWS: gl.constexpr, FIRST: gl.constexpr, REST: gl.constexpr, SETS: gl.constexpr, SHARING: gl.constexpr,
    PROGRAMS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The preparing warps: what the epilogues need of every tile's rows and columns.

    Many loads are under way before the first is stored: one after the other, qkv of 8160 rows took 122 us, not 110.
    """
    _, columns, places_ptr, sums_ptr, rows, N, K, capacity, eps = numbers
    row_side, column_side, ready, used = vectors
    threads: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    PIECES: gl.constexpr = (FIRST + REST) // 64
    tiles_n = gl.cdiv(N, FIRST + REST)
    turn = 0
    for tile in range(gl.program_id(0), gl.cdiv(rows, ROWS * SHARING) * tiles_n, PROGRAMS):
        own = turn % SETS
        mbarrier.wait(used.index(own), ((turn // SETS) & 1) ^ 1)
        of_columns = ()
        for piece in gl.static_range(PIECES):
            offs = tile % tiles_n * (FIRST + REST) + piece * 64 + gl.arange(0, 64, layout=threads)
            for nth in gl.static_range(4):
                of_columns += (vector_of(columns[nth], offs, N),)  # type: ignore[assignment]
        for group in gl.static_range(SHARING):
            offs = (tile // tiles_n * SHARING + group) * ROWS + gl.arange(0, ROWS, layout=threads)
            at = (own * SHARING + group) * 4
            if places_ptr is not None:
                y = vector_of(places_ptr, offs, rows)
                x = vector_of(places_ptr, capacity + offs, capacity + rows)
            if PARTS > 0:
                rstd, shift = row_moments(sums_ptr, offs, rows, capacity, K, eps, PARTS, CENTRED)
                row_side.index(at).store(rstd)
                row_side.index(at + 1).store(shift)
            if places_ptr is not None:
                row_side.index(at + 2).store(y)
                row_side.index(at + 3).store(x)
        for i in gl.static_range(PIECES * 4):
            if columns[i % 4] is not None:
                column_side.index(own * PIECES * 4 + i).store(of_columns[i])
        mbarrier.arrive(ready.index(own), count=1)
        turn += 1


@gluon.jit
def multiply(
    numbers, shared, vectors, turns, GROUP_ID: gl.constexpr,
    FETCH: gl.constexpr, EPILOGUE: gl.constexpr, OPTIONS: gl.constexpr,
    ROWS: gl.constexpr, FIRST: gl.constexpr, REST: gl.constexpr, GROUPS: gl.constexpr,
    BUFFERS: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """A group: its tiles, or its rows of the shared ones."""
    operands, _, _, _, rows, N, K, _, _ = numbers
    a, b, b_rest, full, empty = shared
    row_side, column_side, ready, used = vectors
    ALTERNATE: gl.constexpr = GROUPS == 2
    SHARING: gl.constexpr = 3 if GROUPS == 3 else 1
    OWN: gl.constexpr = GROUP_ID if ALTERNATE else 0  # first tile of this group, in programs
    PART: gl.constexpr = 0 if ALTERNATE else GROUP_ID  # of a tile's rows
    STRIDE: gl.constexpr = GROUPS * PROGRAMS if ALTERNATE else PROGRAMS
    PIECES: gl.constexpr = (FIRST + REST) // 64
    # Before the main loop, which hides the load's latency.
    EARLY: gl.constexpr = FETCH is not None and GROUPS == 1 and PIECES == 1
    WARPS: gl.constexpr = 8 if GROUPS == 1 and ROWS > 64 else 4
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, FIRST, 16])
    layout_rest: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, REST if REST > 0 else 16, 16])
    tiles_n = gl.cdiv(N, FIRST + REST)
    steps = gl.cdiv(K, 64)
    step = OWN * steps
    turn = 0
    for tile in range(gl.program_id(0) + OWN * PROGRAMS, gl.cdiv(rows, ROWS * SHARING) * tiles_n, STRIDE):
        row, column = (tile // tiles_n * SHARING + PART) * ROWS, tile % tiles_n * (FIRST + REST)
        if EARLY:
            early = FETCH(row, column, rows, N, operands, ROWS, WARPS)
        acc = gl.zeros([ROWS, FIRST], gl.float32, layout)
        if REST > 0:
            acc_rest = gl.zeros([ROWS, REST], gl.float32, layout_rest)
        if ALTERNATE:
            mbarrier.wait(turns.index(GROUP_ID), (turn & 1) ^ (1 - GROUP_ID))
        for k in range(steps):
            at = step % BUFFERS
            mbarrier.wait(full.index(at), (step // BUFFERS) & 1)
            mine = a.index(at * SHARING + PART)
            acc = warpgroup_mma(mine, b.index(at).permute((1, 0)), acc, is_async=True)
            if REST > 0:
                acc_rest = warpgroup_mma(mine, b_rest.index(at).permute((1, 0)), acc_rest, is_async=True)
                acc, acc_rest = warpgroup_mma_wait(2, deps=(acc, acc_rest))
            else:
                acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index((step + BUFFERS - 1) % BUFFERS), count=1, pred=k > 0)  # the last step's
            step += 1
        if ALTERNATE:
            mbarrier.arrive(turns.index(1 - GROUP_ID), count=1)
        if REST > 0:
            acc, acc_rest = warpgroup_mma_wait(0, deps=(acc, acc_rest))
        else:
            acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((step + BUFFERS - 1) % BUFFERS), count=1)
        if ALTERNATE:
            step += steps * (GROUPS - 1)

        mbarrier.wait(ready.index(OWN), turn & 1)
        own_rows = (row_side, (OWN * SHARING + PART) * 4)
        pieces = halves(acc) if FIRST == 128 else (acc,)
        if REST > 0:
            pieces += (acc_rest,)
        for i in gl.static_range(PIECES):
            at = column + i * 64
            own_columns = (column_side, (OWN * PIECES + i) * 4)
            fetched = None
            if EARLY:
                fetched = early
            elif FETCH is not None:
                fetched = FETCH(row, at, rows, N, operands, ROWS, WARPS)
            EPILOGUE(pieces[i], fetched, row, at, rows, N, own_rows, own_columns, operands, OPTIONS, WARPS)
        mbarrier.arrive(used.index(OWN), count=1)
        turn += 1


@gluon.jit
def hopper_matmul_kernel(
    a_desc, b_desc, b_rest_desc,  # [rows, K] in boxes of ROWS, [N, K] in boxes of FIRST and REST rows, 64 columns wide
    out_ptr, operands,                         # of the epilogue
    columns, places_ptr,                       # fp32 [N] each; fp32 [2, capacity]
    sums_ptr, count_ptr,                       # fp32 [2, PARTS, capacity]; rows at [0]
    N, K, capacity, eps,
    FETCH: gl.constexpr, EPILOGUE: gl.constexpr, OPTIONS: gl.constexpr, PARTS: gl.constexpr, CENTRED: gl.constexpr,
    ROWS: gl.constexpr, FIRST: gl.constexpr, REST: gl.constexpr, GROUPS: gl.constexpr,
    BUFFERS: gl.constexpr, PROGRAMS: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    rows = gl.load(count_ptr)
    ALTERNATE: gl.constexpr = GROUPS == 2
    SHARING: gl.constexpr = 3 if GROUPS == 3 else 1
    SETS: gl.constexpr = 2 if ALTERNATE else 1  # of vectors: a tile's
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    a = gl.allocate_shared_memory(DTYPE, [BUFFERS * SHARING, ROWS, 64], a_desc.layout)
    b = gl.allocate_shared_memory(DTYPE, [BUFFERS, FIRST, 64], b_desc.layout)
    b_rest = gl.allocate_shared_memory(DTYPE, [BUFFERS, REST, 64], b_rest_desc.layout) if REST > 0 else b
    row_side = gl.allocate_shared_memory(gl.float32, [SETS * SHARING * 4, ROWS], flat)
    column_side = gl.allocate_shared_memory(gl.float32, [SETS * (FIRST + REST) // 64 * 4, 64], flat)
    full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    # Only where it is used: the compiler gives a dead barrier's bytes to other data, which PTX leaves undefined, and
    # when a kernel is preempted half way for another process the barrier comes back over them.
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout()) if ALTERNATE else full
    ready = gl.allocate_shared_memory(gl.int64, [SETS, 1], mbarrier.MBarrierLayout())
    used = gl.allocate_shared_memory(gl.int64, [SETS, 1], mbarrier.MBarrierLayout())
    if ALTERNATE:
        for i in gl.static_range(2):
            mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(SETS):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(used.index(i), count=SHARING)
    for i in gl.static_range(BUFFERS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=SHARING)
    fence_async_shared()  # TMA completes the barriers
    shared = (a, b, b_rest, full, empty)
    vectors = (row_side, column_side, ready, used)
    if out_ptr.dtype.element_ty == gl.int64:  # as address.located
        out_ptr = gl.multiple_of(gl.load(out_ptr).to(gl.pointer_type(DTYPE)), 16)
    numbers = ((out_ptr, operands), columns, places_ptr, sums_ptr, rows, N, K, capacity, eps)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (multiply, (
                    numbers, shared, vectors, turns, 0, FETCH, EPILOGUE, OPTIONS,
                    ROWS, FIRST, REST, GROUPS, BUFFERS, PROGRAMS,
                )),
                (load_operands, (
                    a_desc, b_desc, b_rest_desc, rows, N, K, shared, ROWS, FIRST, REST, SHARING, BUFFERS, PROGRAMS,
                )),
                (prepare_vectors, (
                    numbers, vectors, PARTS, CENTRED, ROWS, FIRST, REST, SETS, SHARING, PROGRAMS, 2,
                )),
            ],
            [1, 2],  # warps of all but the first
            [56, 56],  # their registers a thread
        )  # fmt: skip
    elif GROUPS == 2:
        gl.warp_specialize(
            [
                (multiply, (
                    numbers, shared, vectors, turns, 0, FETCH, EPILOGUE, OPTIONS,
                    ROWS, FIRST, REST, GROUPS, BUFFERS, PROGRAMS,
                )),
                (multiply, (
                    numbers, shared, vectors, turns, 1, FETCH, EPILOGUE, OPTIONS,
                    ROWS, FIRST, REST, GROUPS, BUFFERS, PROGRAMS,
                )),
                (load_operands, (
                    a_desc, b_desc, b_rest_desc, rows, N, K, shared, ROWS, FIRST, REST, SHARING, BUFFERS, PROGRAMS,
                )),
                (prepare_vectors, (
                    numbers, vectors, PARTS, CENTRED, ROWS, FIRST, REST, SETS, SHARING, PROGRAMS, 4,
                )),
            ],
            [4, 1, 4],
            [224, 24, 40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (multiply, (
                    numbers, shared, vectors, turns, 0, FETCH, EPILOGUE, OPTIONS,
                    ROWS, FIRST, REST, GROUPS, BUFFERS, PROGRAMS,
                )),
                (multiply, (
                    numbers, shared, vectors, turns, 1, FETCH, EPILOGUE, OPTIONS,
                    ROWS, FIRST, REST, GROUPS, BUFFERS, PROGRAMS,
                )),
                (multiply, (
                    numbers, shared, vectors, turns, 2, FETCH, EPILOGUE, OPTIONS,
                    ROWS, FIRST, REST, GROUPS, BUFFERS, PROGRAMS,
                )),
                (load_operands, (
                    a_desc, b_desc, b_rest_desc, rows, N, K, shared, ROWS, FIRST, REST, SHARING, BUFFERS, PROGRAMS,
                )),
                (prepare_vectors, (
                    numbers, vectors, PARTS, CENTRED, ROWS, FIRST, REST, SETS, SHARING, PROGRAMS, 1,
                )),
            ],
            [4, 4, 1, 1],
            [152, 152, 48, 48],
        )  # fmt: skip
