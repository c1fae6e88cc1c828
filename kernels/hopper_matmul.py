"""The matmuls on Hopper in Gluon: a warp that loads by TMA, and warpgroups that multiply, each with its own epilogue.

Either all warpgroups share a tile, or each has a tile of its own and they take turns at the tensor cores, so that one's
epilogue runs under another's main loop (CUTLASS's "cooperative" and "ping-pong" schedules). A tile of 192 columns is
two matmuls a step, 128 and 64 wide, since Gluon's tensors are powers of two. Programs are as many as multiprocessors
and read the count of rows on the device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .config import HopperConfig

BLOCK_K = 64  # 128 bytes of a row: the widest swizzle
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def hopper_matmul(
    a: torch.Tensor, weight: torch.Tensor, epilogue: Any, operands: tuple[Any, ...], options: tuple[Any, ...], *,
    moments: tuple[torch.Tensor | None, float, int, bool], config: HopperConfig, programs: int, count: torch.Tensor,
) -> None:  # fmt: skip
    """epilogue(a @ weight.T) in 16 bits: a [rows, depth], weight [columns, depth], of the rows that count[0] holds.

    epilogue: a Gluon function of a tile's piece, `operands` and `options`. moments: (sums, eps, merge, centred) of the
    norm before the matmul, whose mean and 1/std the epilogue gets.
    """
    (rows, depth), columns, dtype = a.shape, weight.shape[0], _DTYPES[a.dtype]
    sums, eps, merge, centred = moments
    first = 1 << (config.block_n.bit_length() - 1)
    rest = config.block_n - first
    group_rows = config.block_m if config.alternate else config.block_m // config.groups

    def boxes(matrix: torch.Tensor, height: int) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for([height, BLOCK_K], dtype)
        return TensorDescriptor.from_tensor(matrix, [height, BLOCK_K], layout)

    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n)
    hopper_matmul_kernel[(min(programs, tiles),)](
        boxes(a, group_rows), boxes(weight, first), boxes(weight, rest or first), operands, sums, count,
        columns, depth, 0 if sums is None else sums.shape[2], eps,
        EPILOGUE=epilogue, OPTIONS=options,
        PARTS=0 if sums is None else sums.shape[1], MERGE=merge, CENTRED=centred,
        ROWS=group_rows, FIRST=first, REST=rest, GROUPS=config.groups, ALTERNATE=config.alternate,
        BUFFERS=config.buffers, PROGRAMS=min(programs, tiles), DTYPE=dtype,
        num_warps=4, maxnreg=168 if config.groups == 2 else 128,
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
def row_moments(
    sums_ptr, row, rows, capacity, width, eps, layout: gl.constexpr,
    ROWS: gl.constexpr, PARTS: gl.constexpr, MERGE: gl.constexpr, CENTRED: gl.constexpr,
):  # fmt: skip
    """Mean and 1/std of ROWS rows, as in device.row_moments: the same sums in the same order."""
    offs = row + gl.arange(0, ROWS, layout=gl.BlockedLayout([1], [32], [4], [0]))
    inside = offs < rows
    total = gl.zeros([ROWS], gl.float32, gl.BlockedLayout([1], [32], [4], [0]))
    square = gl.zeros([ROWS], gl.float32, gl.BlockedLayout([1], [32], [4], [0]))
    for part in gl.static_range(PARTS):
        for i in gl.static_range(MERGE):
            at = offs * MERGE + i
            total += gl.load(sums_ptr + part * capacity + at, mask=inside, other=0.0)
            square += gl.load(sums_ptr + (PARTS + part) * capacity + at, mask=inside, other=0.0)
    mean = total / width
    if not CENTRED:
        mean = gl.zeros([ROWS], gl.float32, gl.BlockedLayout([1], [32], [4], [0]))
    rstd = gl.rsqrt(gl.maximum(square / width - mean * mean, 0.0) + eps)
    return gl.convert_layout(mean, layout), gl.convert_layout(rstd, layout)


@gluon.jit
def multiply(
    numbers, shared, turns, GROUP_ID: gl.constexpr,
    EPILOGUE: gl.constexpr, OPTIONS: gl.constexpr, PARTS: gl.constexpr, MERGE: gl.constexpr, CENTRED: gl.constexpr,
    ROWS: gl.constexpr, FIRST: gl.constexpr, REST: gl.constexpr, GROUPS: gl.constexpr, ALTERNATE: gl.constexpr,
    BUFFERS: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """A warpgroup: its tiles, or its rows of the shared ones."""
    operands, sums_ptr, rows, N, K, capacity, eps = numbers
    a, b, b_rest, full, empty = shared
    SHARING: gl.constexpr = 1 if ALTERNATE else GROUPS
    OWN: gl.constexpr = GROUP_ID if ALTERNATE else 0  # first tile of this group, in programs
    PART: gl.constexpr = 0 if ALTERNATE else GROUP_ID  # of a tile's rows
    STRIDE: gl.constexpr = GROUPS * PROGRAMS if ALTERNATE else PROGRAMS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FIRST, 16])
    layout_rest: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST if REST > 0 else 16, 16])
    tiles_n = gl.cdiv(N, FIRST + REST)
    steps = gl.cdiv(K, 64)
    step = OWN * steps
    turn = 0
    for tile in range(gl.program_id(0) + OWN * PROGRAMS, gl.cdiv(rows, ROWS * SHARING) * tiles_n, STRIDE):
        row, column = (tile // tiles_n * SHARING + PART) * ROWS, tile % tiles_n * (FIRST + REST)
        mean = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))
        rstd = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))
        if PARTS > 0:  # before the turn: under the other's main loop
            mean, rstd = row_moments(
                sums_ptr, row, rows, capacity, K, eps, gl.SliceLayout(1, layout), ROWS, PARTS, MERGE, CENTRED
            )
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
            turn += 1
        if REST > 0:
            acc, acc_rest = warpgroup_mma_wait(0, deps=(acc, acc_rest))
        else:
            acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((step + BUFFERS - 1) % BUFFERS), count=1)
        if ALTERNATE:
            step += steps * (GROUPS - 1)

        if FIRST == 128:
            left, right = halves(acc)
            EPILOGUE(left, row, column, rows, N, mean, rstd, operands, OPTIONS)
            EPILOGUE(right, row, column + 64, rows, N, mean, rstd, operands, OPTIONS)
        else:
            EPILOGUE(acc, row, column, rows, N, mean, rstd, operands, OPTIONS)
        if REST > 0:
            EPILOGUE(acc_rest, row, column + FIRST, rows, N, mean, rstd, operands, OPTIONS)


@gluon.jit
def hopper_matmul_kernel(
    a_desc, b_desc, b_rest_desc,  # [rows, K] in boxes of ROWS, [N, K] in boxes of FIRST and REST rows, 64 columns wide
    operands, sums_ptr, count_ptr,             # of the epilogue; fp32 [2, PARTS, capacity]; rows at [0]
    N, K, capacity, eps,
    EPILOGUE: gl.constexpr, OPTIONS: gl.constexpr, PARTS: gl.constexpr, MERGE: gl.constexpr, CENTRED: gl.constexpr,
    ROWS: gl.constexpr, FIRST: gl.constexpr, REST: gl.constexpr, GROUPS: gl.constexpr, ALTERNATE: gl.constexpr,
    BUFFERS: gl.constexpr, PROGRAMS: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    rows = gl.load(count_ptr)
    SHARING: gl.constexpr = 1 if ALTERNATE else GROUPS
    a = gl.allocate_shared_memory(DTYPE, [BUFFERS * SHARING, ROWS, 64], a_desc.layout)
    b = gl.allocate_shared_memory(DTYPE, [BUFFERS, FIRST, 64], b_desc.layout)
    b_rest = gl.allocate_shared_memory(DTYPE, [BUFFERS, REST, 64], b_rest_desc.layout) if REST > 0 else b
    full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(BUFFERS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=SHARING)
    shared = (a, b, b_rest, full, empty)
    numbers = (operands, sums_ptr, rows, N, K, capacity, eps)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (multiply, (
                    numbers, shared, turns, 0, EPILOGUE, OPTIONS, PARTS, MERGE, CENTRED,
                    ROWS, FIRST, REST, GROUPS, ALTERNATE, BUFFERS, PROGRAMS,
                )),
                (multiply, (
                    numbers, shared, turns, 1, EPILOGUE, OPTIONS, PARTS, MERGE, CENTRED,
                    ROWS, FIRST, REST, GROUPS, ALTERNATE, BUFFERS, PROGRAMS,
                )),
                (load_operands, (
                    a_desc, b_desc, b_rest_desc, rows, N, K, shared, ROWS, FIRST, REST, SHARING, BUFFERS, PROGRAMS,
                )),
            ],
            [4, 1],  # warps of all but the first
            [240, 24],  # their registers a thread
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (multiply, (
                    numbers, shared, turns, 0, EPILOGUE, OPTIONS, PARTS, MERGE, CENTRED,
                    ROWS, FIRST, REST, GROUPS, ALTERNATE, BUFFERS, PROGRAMS,
                )),
                (multiply, (
                    numbers, shared, turns, 1, EPILOGUE, OPTIONS, PARTS, MERGE, CENTRED,
                    ROWS, FIRST, REST, GROUPS, ALTERNATE, BUFFERS, PROGRAMS,
                )),
                (multiply, (
                    numbers, shared, turns, 2, EPILOGUE, OPTIONS, PARTS, MERGE, CENTRED,
                    ROWS, FIRST, REST, GROUPS, ALTERNATE, BUFFERS, PROGRAMS,
                )),
                (load_operands, (
                    a_desc, b_desc, b_rest_desc, rows, N, K, shared, ROWS, FIRST, REST, SHARING, BUFFERS, PROGRAMS,
                )),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )  # fmt: skip
