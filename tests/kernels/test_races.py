"""Accesses to shared memory in the Gluon kernels for Hopper have an order, in the PTX that Triton makes of them.

Each form is compiled as its launcher would, and one program runs enough tiles for all buffers to be used again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import triton
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.kernels.ptx import SOURCES, Instruction, parse
from tests.kernels.races import Machine, Race
from tests.kernels.resources import Launch, compiled, launches

pytestmark = pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="the PTX is triton 3.6's")
SEGMENTS = (4, 300, 60, 130, 128, 252)  # rows; blocks of 128 of them, so 10 for two or three buffers
TILES = 4  # of a matmul's program
MATMUL, ATTENTION = "hopper_matmul_kernel", "hopper_attention_kernel"
Unordered = tuple[str, str, str]  # kind, and the functions of both accesses

# Accesses without an order that are right all the same, or are known. What a form no longer has must leave the list.
SAME = "write after write, same bytes"
CAPTURES = "Triton's warp_specialize: every warp of the first group stores the same captures and warp states"
REPLICATED = "a vector of 64 on four warps: two hold the same elements and store the same bytes"

OF_MATMUL: dict[Unordered, str] = {(SAME, MATMUL, MATMUL): CAPTURES}
OF_TWO_GROUPS = OF_MATMUL | {(SAME, "prepare_vectors", "prepare_vectors"): REPLICATED}
OF_ATTENTION: dict[Unordered, str] = {(SAME, ATTENTION, ATTENTION): CAPTURES}
# Tower, rows of a bucket, step: all of them test_compile.py compiles too.
FORMS: dict[tuple[str, int, str], dict[Unordered, str]] = {
    ("8B", 64, "qkv qkv"): OF_MATMUL,  # tiles of 64 x 64, one group of four warps
    ("8B", 64, "residual proj"): OF_MATMUL,
    ("8B", 64, "linear fc1"): OF_MATMUL,
    ("8B", 256, "linear fc1"): OF_MATMUL,  # 128 x 128, eight warps
    ("8B", 896, "qkv qkv"): OF_MATMUL,  # 128 x 192, eight warps
    ("8B", 896, "residual fc2"): OF_MATMUL,  # 64 x 192, four warps
    ("8B", 8192, "linear deepstack.0.fc2"): OF_MATMUL,  # 256 x 128, eight warps
    ("8B", 8192, "qkv qkv"): OF_TWO_GROUPS,  # 128 x 128, two groups
    ("GLM-5.3-Flash", 8192, "qkv qkv"): OF_TWO_GROUPS,  # normed heads
    ("8B", 8192, "residual proj"): OF_TWO_GROUPS,
    ("8B", 896, "linear fc1"): OF_TWO_GROUPS,
    ("Qwen2.5-VL-7B", 8192, "linear fc1"): OF_TWO_GROUPS,  # gated
    ("8B", 8192, "residual fc2"): OF_MATMUL,  # 192 x 192, three groups
    ("Kimi-K2.5", 8192, "linear merger.fc2"): OF_MATMUL,  # 192 x 128
    ("8B", 8192, "attention attention"): OF_ATTENTION,  # heads of 72
    ("InternViT", 8192, "attention attention"): OF_ATTENTION,  # of 64
    ("GLM-4.1V", 8192, "attention attention"): OF_ATTENTION,  # of 128
}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: " ".join(map(str, form)))
def test_accesses_to_shared_memory_are_ordered(form: tuple[str, int, str]) -> None:
    found: dict[Unordered, Race] = {}
    for race in Machine(*program(form)).run():
        found.setdefault((race.kind, race.first.function, race.second.function), race)
    assert not [str(race) for key, race in found.items() if key not in FORMS[form]]
    assert not FORMS[form].keys() - found.keys(), "no longer needed"


@cache
def program(form: tuple[str, int, str]) -> tuple[str, list[int], dict[int, int]]:
    """PTX, and parameters and memory for program 0 with TILES tiles or SEGMENTS."""
    tower, tokens, step = form
    [launch] = [launch for launch in launches(tower, tokens, 90) if launch.label == f"{tower} {tokens} {step}"]
    given, loaded = attention_numbers(launch) if "attention" in step else matmul_numbers(launch)
    ptx: str = compiled(launch, 90).asm["ptx"]
    parameters: list[int] = []
    memory: dict[int, int] = {}
    for p in launch.kernel.params:
        for value in () if p.is_constexpr else leaves(given.get(p.name, launch.arguments[p.name])):
            if isinstance(value, torch.Tensor):
                value = len(parameters) + 1 << 36  # a pointer
                memory |= {value + 4 * nth: number for nth, number in loaded.get(p.name, {}).items()}
            parameters.append(value)
    parameters += [0, 0]  # Triton's own scratch
    assert ptx.count(".param ") == len(parameters)
    return ptx, parameters, memory


def leaves(value: Any) -> Iterator[Any]:
    """What a kernel's argument is in PTX."""
    if isinstance(value, TensorDescriptor):  # TMA writes boxes as wide as the swizzle
        yield from (value.block_shape[0] * value.layout.swizzle_byte_width, 0, 0, 0, 0)
    elif isinstance(value, tuple):
        for item in value:
            yield from leaves(item)
    elif value is not None:
        yield 0 if isinstance(value, float) else value


def matmul_numbers(launch: Launch) -> tuple[dict[str, int], dict[str, dict[int, int]]]:
    """Arguments and int32 in memory: so many columns that two rows of tiles are TILES for each program."""
    rows, first, rest, groups, buffers, programs = (
        launch.arguments[name] for name in ("ROWS", "FIRST", "REST", "GROUPS", "BUFFERS", "PROGRAMS")
    )
    steps = -(-3 * buffers // 2 // TILES)  # each buffer is used one and a half times
    columns = TILES * programs // 2 * (first + rest) - 32
    return {"N": columns, "K": 64 * steps}, {"count_ptr": {0: 2 * rows * (3 if groups == 3 else 1) - 7}}


def attention_numbers(launch: Launch) -> tuple[dict[str, int], dict[str, dict[int, int]]]:
    """Those entries of the table of tiles that program 0 reads, each of a segment of its own."""
    heads, programs = launch.arguments["HEADS"], launch.arguments["PROGRAMS"]
    entries: dict[int, int] = {}
    for nth, rows in enumerate(SEGMENTS):
        tile, start = nth * programs // heads, sum(SEGMENTS[:nth])
        entries |= {4 * tile: start, 4 * tile + 2: start, 4 * tile + 3: start + rows}
    return {}, {"count_ptr": {0: tile + 1}, "tiles_ptr": entries}


STORE, LOAD = "st.shared.b32 [%r2], %r1;", "ld.shared.b32 %r4, [%r3];"  # four bytes for each thread; the next lane's


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        (f"{STORE} {LOAD}", {"read after write"}),  # lanes of a warp do not wait for each other
        (f"{STORE} bar.warp.sync -1; {LOAD}", set()),
        (f"{STORE} bar.warp.sync -1; {LOAD} {STORE}", {"write after read"}),
        (f"{STORE} ld.shared.b32 %r4, [global_smem+128];", {"read after write", "write after read"}),  # warp 1's
        (f"{STORE} bar.sync 0; ld.shared.b32 %r4, [global_smem+128];", set()),
        ("st.shared.b8 [global_smem+0], %r1;", {"write after write"}),
        ("st.shared.b8 [global_smem+0], 5;", {SAME}),
    ],
)
def test_the_order_that_two_warps_have(body: str, kinds: set[str]) -> None:
    numbers = "mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; xor.b32 %r3, %r2, 4;"
    head = ".visible .entry kernel()\n.reqntid 64\n{\n.loc 1 246 0 // hopper_matmul.py:246:0\n"
    assert {r.kind for r in Machine(head + f"{numbers} {body} ret;".replace("; ", ";\n"), [], {}).run()} == kinds


# Controls: with one instruction less, or earlier, each must be reported.

Edit = Callable[[list[str], list[Instruction]], None]


def places(instructions: list[Instruction], name: str, text: str) -> list[int]:
    """Of the instructions of a name that come from a line of source with this text."""

    def line(i: Instruction) -> str:
        return (SOURCES / i.place.file).read_text().splitlines()[i.place.line - 1]

    return [k for k, i in enumerate(instructions) if i.name.startswith(name) and text in line(i)]


def at(instructions: list[Instruction], name: str, text: str, nth: int = 0) -> int:
    return places(instructions, name, text)[nth]


def without(name: str, text: str, nth: int = 0) -> Edit:
    def edit(lines: list[str], instructions: list[Instruction]) -> None:
        lines[instructions[at(instructions, name, text, nth)].place.ptx_line - 1] = ""

    return edit


def without_any(name: str, text: str) -> Edit:
    """In both warpgroups: the turns that they take order what one does before the other's fence."""

    def edit(lines: list[str], instructions: list[Instruction]) -> None:
        for k in places(instructions, name, text):
            lines[instructions[k].place.ptx_line - 1] = ""

    return edit


def without_barrier_before(name: str, text: str, nth: int = 0) -> Edit:
    def edit(lines: list[str], instructions: list[Instruction]) -> None:
        before = instructions[: at(instructions, name, text, nth)]
        barrier = [i for i in before if i.name.startswith("bar.")][-1]
        lines[barrier.place.ptx_line - 1] = ""

    return edit


def with_fewer_finished(text: str, nth: int = 0) -> Edit:
    """A wait for all products, for all but one."""

    def edit(lines: list[str], instructions: list[Instruction]) -> None:
        line = instructions[at(instructions, "wgmma.wait_group", text, nth)].place.ptx_line - 1
        assert lines[line].endswith(" 0;")
        lines[line] = lines[line].replace(" 0;", " 1;")

    return edit


def earlier(name: str, text: str, before: tuple[str, str]) -> Edit:
    def edit(lines: list[str], instructions: list[Instruction]) -> None:
        line = instructions[at(instructions, name, text)].place.ptx_line - 1
        moved, lines[line] = lines[line], ""
        lines[instructions[at(instructions, *before)].place.ptx_line - 1] += "\n" + moved

    return edit


def of_the_thread(name: str, text: str) -> Edit:
    """Each thread stores its number, not what all agree on."""

    def edit(lines: list[str], instructions: list[Instruction]) -> None:
        line = instructions[at(instructions, name, text)].place.ptx_line - 1
        lines[line] = re.sub(r"%r\d+(?=[,}])", "%tid.x", lines[line])

    return edit


PROJ, HEADS = ("8B", 64, "residual proj"), ("8B", 8192, "attention attention")
HEADS_OF_64 = ("InternViT", 8192, "attention attention")
READY, USED, EMPTY = "mbarrier.arrive(ready", "mbarrier.arrive(used", "mbarrier.arrive(empty"
FETCHED, STORED = "gl.convert_layout(fetched, layout)", "gl.convert_layout(y, fetched.type.layout)"
CONTROLS: dict[str, tuple[tuple[str, int, str], Edit, Unordered]] = {
    "no barrier before ready's arrive": (
        PROJ, without_barrier_before("mbarrier.arrive", READY),
        ("read after write", "prepare_vectors", "column_vector"),
    ),
    "no barrier before empty's arrive": (
        PROJ, without_barrier_before("mbarrier.arrive", EMPTY),
        ("TMA write after wgmma read", "multiply", "load_operands"),
    ),
    "no barrier between writes and reads of scratch": (
        PROJ, without_barrier_before("ldmatrix", FETCHED), ("read after write", "store_residual", "store_residual"),
    ),
    "no barrier between reads of scratch and its next writes": (
        PROJ, without_barrier_before("st.shared", STORED), ("write after read", "store_residual", "store_residual"),
    ),
    "no barrier of a warp between writes and reads of its own scratch": (
        HEADS, without("bar.warp.sync", "gl.convert_layout(value, layout)"),
        ("read after write", "store_heads", "store_heads"),
    ),
    "no wait for full": (
        PROJ, without("mbarrier.try_wait", "mbarrier.wait(full"),
        ("wgmma read after TMA write", "load_operands", "multiply"),
    ),
    "no wait for empty": (
        PROJ, without("mbarrier.try_wait", "mbarrier.wait(empty"),
        ("TMA write after TMA write", "load_operands", "load_operands"),
    ),
    "no wait for ready": (
        PROJ, without("mbarrier.try_wait", "mbarrier.wait(ready"),
        ("read after write", "prepare_vectors", "column_vector"),
    ),
    "no wait for used": (  # ready completes twice before anybody looks
        PROJ, without("mbarrier.try_wait", "mbarrier.wait(used"), ("deadlock", "multiply", "multiply"),
    ),
    "used arrives before the epilogue": (
        PROJ, earlier("mbarrier.arrive", USED, ("st.shared", FETCHED)),
        ("write after read", "column_vector", "prepare_vectors"),
    ),
    "empty arrives before the product is waited for": (
        PROJ, with_fewer_finished("warpgroup_mma_wait(0, deps=(acc,))"),
        ("TMA write after wgmma read", "multiply", "load_operands"),
    ),
    "warps store other bytes": (
        ("8B", 896, "linear fc1"), of_the_thread("stmatrix", "column_side.index"),
        ("write after write", "prepare_vectors", "prepare_vectors"),
    ),
    "no fence behind the barriers' inits": (
        PROJ, without("fence.proxy.async", "# TMA completes the barriers"),
        ("complete_tx after write, no proxy fence", MATMUL, "load_operands"),
    ),
    "no wait for the rows that the other warpgroup clears": (
        HEADS, without("mbarrier.try_wait", "mbarrier.wait(cleared"),
        ("wgmma read after write", "zero_rows", "attend"),
    ),
    "no fence behind zero_rows": (
        HEADS, without("fence.proxy.async", "fence_async_shared()", 1),
        ("wgmma read after write, no proxy fence", "zero_rows", "attend"),
    ),
    "no fence behind queries read into registers": (
        HEADS_OF_64, without_any("fence.proxy.async", "# the queries were read"),
        ("TMA write after read, no proxy fence", "queries", "load_tiles"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("control", CONTROLS)
def test_a_lost_order_is_reported(control: str) -> None:
    form, edit, expected = CONTROLS[control]
    ptx, parameters, memory = program(form)
    lines = ptx.split("\n")
    edit(lines, parse(ptx).instructions)
    found = {(r.kind, r.first.function, r.second.function) for r in Machine("\n".join(lines), parameters, memory).run()}
    print(found)
    assert expected in found - FORMS[form].keys()
