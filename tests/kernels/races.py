"""A happens-before race detector: runs a warp-specialised kernel's PTX on the CPU, reports accesses without an order.

Program 0 is executed, each warp until it has to wait. Integers are real, so addresses, branches and counts of barriers
are the compiler's own; results in floating point are checksums of what they are computed from, enough to tell whether
two warps write the same bytes. Only what reaches an address, a branch or shared memory is computed.

The memory model is PTX's, in the narrow form that these kernels need:

- A warp knows, for every warp, up to which moment that one's accesses happened before its own (`seen`). bar.sync joins
  what its warps know. An mbarrier collects what those that arrive know, and a wait takes what the last complete phase
  collected. Lanes of a warp are ordered by a barrier of the warp and nothing else; since one lane arrives for all, it
  publishes what its warp did before such a barrier.
- TMA's writes and wgmma's reads run beside their warp. A TMA write happened before what follows a wait for the mbarrier
  that counts its bytes; a wgmma's reads before what follows the warp's wait_group, there or behind a barrier.
- Those use another proxy: a plain access comes before them only if a fence.proxy.async lies between (`fenced`).

Limits: no clusters, atomics or global memory (TMA reads what no kernel writes at the same time). Of a byte's writers
the last is kept, of its readers each warp's last; lanes that write a byte in one instruction are not compared. A wgmma
is taken to read whole swizzled rows, more than it does. One schedule is tried: where a race decides who arrives first,
the other outcome is not seen.
"""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np

from tests.kernels.ptx import BITS, Array, Instruction, Place, Program, elements, low_bits, operation, parse, registers

SHARED_BYTES = 227 * 1024
LANES = np.arange(32)
PARAMETERS = 1 << 40  # addresses of parameters begin here


@dataclass(frozen=True)
class Race:
    """Two accesses without an order; `second` was executed later."""

    kind: str
    first: Place
    second: Place

    def __str__(self) -> str:
        return f"{self.kind}: {self.second} after {self.first}"


class Knowledge:
    """Which accesses happened before: of each warp up to a moment, plain and fenced; asynchronous ones as bits."""

    def __init__(self, warps: int) -> None:
        self.seen = np.zeros(warps, np.int32)
        self.fenced = np.zeros(warps, np.int32)
        self.finished = 0

    def join(self, other: Knowledge) -> None:
        np.maximum(self.seen, other.seen, out=self.seen)
        np.maximum(self.fenced, other.fenced, out=self.fenced)
        self.finished |= other.finished


class Shadow:
    """What warps know, who touched each byte of shared memory last, and the races between those accesses.

    `where` is the bytes of an access, `lanes` whose each of them is, or None of an asynchronous access.
    """

    def __init__(self, program: Program) -> None:
        self.places, warps = [i.place for i in program.instructions], program.warps
        self.races: set[Race] = set()
        self.known = [Knowledge(warps) for _ in range(warps)]
        self.now = np.ones(warps, np.int32)  # a warp's moment: until its next barrier or fence
        self.writer = np.full(SHARED_BYTES, -1, np.int16)
        self.write_time, self.write_at, self.write_lane, self.write_number = np.zeros((4, SHARED_BYTES), np.int32)
        self.read_time, self.read_at, self.read_lane = np.zeros((3, warps, SHARED_BYTES), np.int32)
        self.issued = [-1]  # instructions of the asynchronous accesses, by number from 1
        self.wgmma_reads: list[tuple[int, slice]] = []

    def report(self, kind: str, firsts: Iterable[int], second: int) -> None:
        self.races.update(Race(kind, self.places[first], self.places[second]) for first in set(firsts))

    def meet(self, warps: list[int]) -> None:
        """A barrier of all lanes of these warps."""
        joined = Knowledge(len(self.known))
        for w in warps:
            self.known[w].seen[w] = self.now[w]
            joined.join(self.known[w])
        for w in warps:
            self.known[w].join(joined)
            self.now[w] += 1

    def fence(self, w: int) -> None:
        known = self.known[w]
        np.maximum(known.fenced, known.seen, out=known.fenced)
        known.fenced[w] = self.now[w]
        self.now[w] += 1

    def after_writes(self, kind: str, w: int, at: int, where: Any, lanes: Array | None, same: Any = False) -> None:
        """Against the last writes; same: which bytes stay as they are."""
        known, number = self.known[w], self.write_number[where]
        writer, time = self.writer[where], self.write_time[where]
        plain = (writer >= 0) & (number == 0)
        late = plain & (time > known.seen[writer])
        if lanes is None:
            unfenced = plain & ~late & (time > known.fenced[writer])
            if unfenced.any():
                self.report(f"{kind} after write, no proxy fence", self.write_at[where][unfenced], at)
        else:
            late &= (writer != w) | (self.write_lane[where] != lanes)
        if late.any():
            self.report(f"{kind} after write, same bytes", self.write_at[where][late & same], at)
            self.report(f"{kind} after write", self.write_at[where][late & np.logical_not(same)], at)
        if number.any():
            landing = [n for n in set(number.tolist()) if n and not known.finished >> n & 1]
            self.report(f"{kind} after TMA write", [self.issued[n] for n in landing], at)

    def after_reads(self, kind: str, w: int, at: int, where: Any, lanes: Array | None) -> None:
        known, time = self.known[w], self.read_time[:, where]
        late = time > known.seen[:, None]
        if lanes is None:
            unfenced = ~late & (time > known.fenced[:, None])
            self.report(f"{kind} after read, no proxy fence", self.read_at[:, where][unfenced], at)
        else:
            late[w] &= self.read_lane[w, where] != lanes
        self.report(f"{kind} after read", self.read_at[:, where][late], at)
        first, last = (where.start, where.stop - 1) if isinstance(where, slice) else (where.min(), where.max())
        for n, read in self.wgmma_reads:
            near = read.start <= last and first < read.stop and not known.finished >> n & 1
            if near and (lanes is None or ((read.start <= where) & (where < read.stop)).any()):
                self.report(f"{kind} after wgmma read", [self.issued[n]], at)

    def read(self, w: int, at: int, where: Array, lanes: Array) -> None:
        self.after_writes("read", w, at, where, lanes)
        self.read_time[w, where], self.read_at[w, where], self.read_lane[w, where] = self.now[w], at, lanes

    def write(self, w: int, at: int, where: Array, lanes: Array, same: Any) -> None:
        self.after_writes("write", w, at, where, lanes, same)
        self.after_reads("write", w, at, where, lanes)
        self.wrote(w, at, where, lanes, 0)

    def wrote(self, w: int, at: int, where: Any, lanes: Any, number: int) -> None:
        self.writer[where], self.write_time[where], self.write_at[where] = w, self.now[w], at
        self.write_lane[where], self.write_number[where] = lanes, number

    def tma_write(self, w: int, at: int, where: slice) -> int:
        self.after_writes("TMA write", w, at, where, None)
        self.after_reads("TMA write", w, at, where, None)
        self.wgmma_reads = [r for r in self.wgmma_reads if r[1].stop <= where.start or where.stop <= r[1].start]
        self.issued.append(at)
        self.wrote(w, at, where, 0, len(self.issued) - 1)
        return len(self.issued) - 1

    def wgmma_read(self, w: int, at: int, where: slice) -> int:
        self.after_writes("wgmma read", w, at, where, None)
        self.issued.append(at)
        self.wgmma_reads.append((len(self.issued) - 1, where))
        return len(self.issued) - 1


@dataclass
class Barrier:
    """An mbarrier."""

    count: int
    pending: int
    gathering: Knowledge
    completed: Knowledge
    bytes: int = 0  # expected and not there yet
    phase: int = 0

    def settle(self) -> None:
        if not self.pending and not self.bytes:
            self.phase, self.pending = self.phase ^ 1, self.count
            self.completed, self.gathering = self.gathering, Knowledge(len(self.gathering.seen))


class Registers(dict[str, Array]):
    """Of a warp, by name; literals are registers that always were there."""

    def __missing__(self, text: str) -> Array:
        assert text[0] != "%", f"{text} is read before it is written"
        self[text] = np.full(32, int(text[2:], 16) if text.startswith("0f") else int(text, 0))
        return self[text]


@dataclass
class Warp:
    id: int
    registers: Registers
    at: int = 0
    blocked: Callable[[], bool] = lambda: False
    groups: list[list[int]] = field(default_factory=lambda: [[]])  # numbers of wgmma's reads; the last group is open


class Machine:
    """Executes a program; every access to shared memory goes by its shadow."""

    def __init__(self, ptx: str, parameters: list[int], memory: dict[int, int]) -> None:
        """parameters: of a tensor map the bytes of its box, else the value; memory: int32 that may be loaded."""
        self.program = parse(ptx)
        self.parameters, self.memory = parameters, memory
        self.shadow = Shadow(self.program)
        self.shared = np.zeros(SHARED_BYTES, np.uint8)
        self.barriers: dict[int, Barrier] = {}
        self.waiting: dict[str, list[Warp]] = defaultdict(list)  # at named barriers
        handlers: dict[str, Callable[[Warp, int, Instruction, Array], Any]] = {
            "bra": self.branch, "brx.idx": self.branch_by_table, "ret": self.leave,
            "bar.warp.sync": lambda w, *_: self.shadow.meet([w.id]), "bar": self.meet,
            "fence.proxy.async": lambda w, *_: self.shadow.fence(w.id),
            "mbarrier.init": self.init, "mbarrier.arrive": self.arrive, "mbarrier.try_wait": self.wait,
            "cp.async.bulk.tensor": self.copy, "wgmma.mma_async": self.multiply,
            "wgmma.commit_group": lambda w, *_: w.groups.append([]), "wgmma.wait_group": self.wait_for_products,
            "ld.shared": self.load, "ldmatrix": self.load, "st.shared": self.store, "stmatrix": self.store,
            "ld.param": self.load_parameter, "ld.global": self.load_global,
            "elect": self.elect, "shfl": self.shuffle, "": self.compute,
        }  # fmt: skip
        names = [i.name for i in self.program.instructions]
        self.handlers = [next(h for prefix, h in handlers.items() if name.startswith(prefix)) for name in names]
        symbols = {f"{self.program.entry}_param_{k}": 0 * LANES + PARAMETERS + k for k in range(len(parameters))}
        symbols |= {"%ctaid.x": 0 * LANES, "global_smem": 0 * LANES}
        ids = range(self.program.warps)
        self.warps = [Warp(w, Registers(symbols | {"%tid.x": 32 * w + LANES})) for w in ids]

    def run(self) -> set[Race]:
        moved = True
        while moved:
            moved = False
            for warp in self.warps:
                while warp.at >= 0 and not warp.blocked():
                    moved, warp.blocked = True, lambda: False
                    self.step(warp)
        for warp in self.warps:
            if warp.at >= 0:
                self.shadow.report("deadlock", [warp.at], warp.at)
        finished = reduce(operator.or_, (known.finished for known in self.shadow.known))
        for number, at in enumerate(self.shadow.issued):
            if number and not finished >> number & 1:
                self.shadow.report("nobody waited for it", [at], at)
        return self.shadow.races

    def step(self, w: Warp) -> None:
        at, i = w.at, self.program.instructions[w.at]
        active = (w.registers[i.guard] == 0) == i.negated if i.guard else LANES >= 0
        w.at += 1
        if active.any():
            self.handlers[at](w, at, i, active)

    def branch(self, w: Warp, at: int, i: Instruction, active: Array) -> None:
        assert active.all(), f"lanes part: {i.place}"
        w.at = self.program.labels[i.operands[0]]

    def branch_by_table(self, w: Warp, at: int, i: Instruction, active: Array) -> None:
        w.at = self.program.labels[self.program.tables[i.operands[1]][uniform(w.registers[i.operands[0]])]]

    def leave(self, w: Warp, at: int, i: Instruction, active: Array) -> None:
        w.at = -1

    def meet(self, w: Warp, at: int, i: Instruction, active: Array) -> None:
        name, threads = (*i.operands, str(32 * self.program.warps))[:2]
        here = self.waiting[name]
        here.append(w)
        w.blocked = lambda: self.waiting[name] is here
        if 32 * len(here) == int(threads):
            self.shadow.meet([warp.id for warp in here])
            self.waiting[name] = []

    def init(self, w: Warp, at: int, i: Instruction, active: Array) -> None:
        where, lanes = touched(address(w, i.operands[0]), 8, active)
        self.shadow.write(w.id, at, where, lanes, False)
        count, warps = int(i.operands[1]), self.program.warps
        self.barriers[int(where[0])] = Barrier(count, count, Knowledge(warps), Knowledge(warps))

    def arrive(self, w: Warp, at: int, i: Instruction, active: Array) -> None:
        where, lanes = touched(address(w, i.operands[1]), 8, active)
        barrier = self.barriers[int(where[0])]
        assert active.sum() == 1 and barrier.pending, f"too many arrive: {i.place}"
        self.shadow.read(w.id, at, where, lanes)
        barrier.gathering.join(self.shadow.known[w.id])
        barrier.pending -= 1
        barrier.bytes += int(i.operands[2]) if "expect_tx" in i.name else 0
        barrier.settle()

    def wait(self, w: Warp, at: int, i: Instruction, active: Array) -> None:
        where, lanes = touched(address(w, i.operands[1]), 8, active)
        barrier, parity = self.barriers[int(where[0])], uniform(w.registers[i.operands[2]]) & 1
        if barrier.phase == parity:
            w.at, w.blocked = at, lambda: barrier.phase == parity
        else:
            self.shadow.read(w.id, at, where, lanes)
            self.shadow.known[w.id].join(barrier.completed)

    def copy(self, w: Warp, at: int, i: Instruction, active: Array) -> None:
        """A box by TMA."""
        [tensor_map, *_] = registers(i.operands[1])
        box = self.parameters[uniform(w.registers[tensor_map]) - PARAMETERS]
        start, of_barrier = (int(address(w, o)[active][0]) for o in (i.operands[0], i.operands[2]))
        self.shadow.after_writes("complete_tx", w.id, at, slice(of_barrier, of_barrier + 8), None)
        number = self.shadow.tma_write(w.id, at, slice(start, start + box))
        self.shared[start : start + box] = np.arange(box) * 31 + number
        barrier = self.barriers[of_barrier]
        barrier.gathering.finished |= 1 << number
        barrier.bytes -= box
        barrier.settle()

    def multiply(self, w: Warp, at: int, i: Instruction, active: Array) -> None:
        """Reads B, and A unless it is in registers; the last operands say which is transposed."""
        [columns] = re.findall(r"m64n(\d+)k16", i.name)
        matrices = [(i.operands[2], int(columns), i.operands[-1])]
        if i.operands[1][0] != "{":
            matrices.append((i.operands[1], 64, i.operands[-2]))
        for descriptor, rows, transposed in matrices:
            for where in matrix(uniform(w.registers[descriptor]), rows, transposed == "1"):
                w.groups[-1].append(self.shadow.wgmma_read(w.id, at, where))
        unlike_others = low_bits((LANES + 32 * w.id) * 1_000_003 + at, 32)
        w.registers.update(dict.fromkeys(registers(i.operands[0]), unlike_others))

    def wait_for_products(self, w: Warp, at: int, i: Instruction, active: Array) -> None:
        assert not w.groups[-1], f"not committed: {i.place}"
        while len(w.groups) - 1 > int(i.operands[0]):
            self.shadow.known[w.id].finished |= sum(1 << number for number in w.groups.pop(0))

    def load(self, w: Warp, at: int, i: Instruction, active: Array) -> None:
        for names, start, width in pieces(w, i, i.operands[1], i.operands[0]):
            where, lanes = touched(start, width * len(names), active)
            self.shadow.read(w.id, at, where, lanes)
            values = np.zeros((32, len(names)), np.int64)
            values[active] = self.shared[where].reshape(-1, len(names), width) @ (1 << 8 * np.arange(width))
            for name, value in zip(names, values.T, strict=True):
                assign(w, name, value, active)

    def store(self, w: Warp, at: int, i: Instruction, active: Array) -> None:
        for names, start, width in pieces(w, i, i.operands[0], i.operands[1]):
            where, lanes = touched(start, width * len(names), active)
            values = np.stack([w.registers[name][active] for name in names], 1)
            data = (values[..., None] >> 8 * np.arange(width) & 255).astype(np.uint8).ravel()
            self.shadow.write(w.id, at, where, lanes, self.shared[where] == data)
            self.shared[where] = data

    def load_parameter(self, w: Warp, at: int, i: Instruction, active: Array) -> None:
        assign(w, i.operands[0], self.parameters[int(i.operands[1].strip("[]").rsplit("_", 1)[1])], active)

    def load_global(self, w: Warp, at: int, i: Instruction, active: Array) -> None:
        """What memory says, elsewhere something that is the address's own."""
        start = address(w, i.operands[1])
        for nth, name in enumerate(registers(i.operands[0])):
            values = [self.memory.get(a, a * 1_000_003 & 0x7FFFFFFF) for a in (start + 4 * nth).tolist()]
            assign(w, name, np.array(values), active)

    def elect(self, w: Warp, at: int, i: Instruction, active: Array) -> None:
        lane, elected = registers(i.operands[0])
        assign(w, lane, 31, active)
        assign(w, elected, LANES == 31, active)

    def shuffle(self, w: Warp, at: int, i: Instruction, active: Array) -> None:
        source, by = w.registers[i.operands[1]], w.registers[i.operands[2]]
        assign(w, registers(i.operands[0])[0], source[by if ".idx" in i.name else LANES ^ by], active)

    def compute(self, w: Warp, at: int, i: Instruction, active: Array) -> None:
        function = operation(i.name)
        assert function is not None, f"unknown: {i.place}"
        values = []
        for (low, *high), bits, signed in i.sources:
            value = low_bits(w.registers[low], bits, signed)
            values.append(low_bits(value, 16) | w.registers[high[0]] << 16 if high else value)
        result = function(*values)
        for nth, name in enumerate(i.destinations):
            assign(w, name, result >> 16 * nth if nth else result, active)


def uniform(values: Array) -> int:
    assert (values == values[0]).all(), "lanes differ"
    return int(values[0])


def address(w: Warp, operand: str) -> Array:
    base, _, offset = operand.strip("[ ]").partition("+")
    return w.registers[base.strip()] + int(offset or 0)


def assign(w: Warp, name: str, value: Any, active: Array) -> None:
    value = low_bits(np.asarray(value, np.int64), BITS[name.rstrip("0123456789")])
    w.registers[name] = np.where(active, value, w.registers.get(name, 0))


def touched(start: Array, size: int, active: Array) -> tuple[Array, Array]:
    """The bytes that lanes touch, and whose each is."""
    return (start[active][:, None] + np.arange(size)).ravel(), np.repeat(LANES[active], size)


def pieces(w: Warp, i: Instruction, where: str, what: str) -> Iterator[tuple[list[str], Array, int]]:
    """Registers, the lanes' addresses and a register's bytes; ldmatrix and stmatrix move a matrix a register."""
    start, names = address(w, where), elements(what)
    if "matrix" not in i.name:
        yield names, start, int(i.name.rpartition("b")[2]) // 8
        return
    assert "trans" not in i.name, f"unknown: {i.place}"
    for nth, name in enumerate(names):  # eight lanes bring the addresses of its rows
        yield [name], start[8 * nth + LANES // 4] + LANES % 4 * 4, 4


def matrix(descriptor: int, rows: int, transposed: bool) -> list[slice]:
    """The bytes of a wgmma's operand, 16 in depth: the swizzled rows that it touches."""
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 16 & 0x3FFF) << 4
    row = {1: 128, 2: 64, 3: 32}[descriptor >> 62 & 3]
    if not transposed:
        start -= start % row
        return [slice(start, start + rows * row)]
    panels = [start + n * stride for n in range(-(-rows * 2 // row))]
    return [slice(panel, panel + 16 * row) for panel in panels]
