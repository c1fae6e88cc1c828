"""PTX as data: a kernel's instructions, the source lines they come from, and what the arithmetic ones compute."""

from __future__ import annotations

import operator
import re
import zlib
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np

SOURCES = Path(__file__).parents[2] / "kernels"
BITS = {"%p": 1, "%rs": 16, "%r": 32, "%rd": 64}  # of registers
Array = np.ndarray[Any, Any]  # a register's: int64, one for each lane, of which the low BITS count


@dataclass(frozen=True)
class Place:
    """Where an instruction comes from."""

    file: str
    line: int
    ptx_line: int
    name: str

    @property
    def function(self) -> str:
        lines = (
            (SOURCES / self.file).read_text().splitlines()[: self.line + 1]
        )  # a kernel's own line is its decorator's
        return next((m[1] for line in reversed(lines) if (m := re.match(r"def (\w+)", line))), "")

    def __str__(self) -> str:
        return f"{self.function} ({self.file}:{self.line}, PTX {self.ptx_line}: {self.name})"


@dataclass(frozen=True)
class Instruction:
    name: str
    guard: str  # a predicate's register, or ""
    negated: bool
    operands: tuple[str, ...]
    place: Place

    @cached_property
    def destinations(self) -> list[str]:
        """Of an instruction that computes: {low, high} are two."""
        return registers(self.operands[0])

    @cached_property
    def sources(self) -> list[tuple[list[str], int, bool]]:
        """Of an instruction that computes: registers or literals, bits, and whether they are signed."""
        [(kind, bits)] = re.findall(r"\.([a-z]+)(\d*)\w*$", self.name)
        own = [BITS.get(text.rstrip("0123456789"), int(bits or 1)) for text in self.operands]
        return [(elements(o), n, kind == "s") for o, n in zip(self.operands[1:], own[1:], strict=True)]


@dataclass(frozen=True)
class Program:
    entry: str
    warps: int
    instructions: list[Instruction]
    labels: dict[str, int]
    tables: dict[str, list[str]]  # of brx.idx


def parse(ptx: str) -> Program:
    """The instructions that matter here, each with the innermost line of our sources that it comes from."""
    body: list[Instruction] = []
    labels: dict[str, int] = {}
    tables: dict[str, list[str]] = defaultdict(list)
    file, line, scope, table = "", 0, 0, ""
    head, _, text = ptx.partition("\n{")
    for number, raw in enumerate(text.split("\n"), head.count("\n") + 2):
        code, _, comment = (part.strip() for part in raw.partition("//"))
        scope += code == "{"  # of inline assembly, whose labels are its own
        code = code.rstrip(";").replace("skipWait", f"skipWait{scope}")
        if code.startswith(".section"):
            break
        if code.startswith(".loc"):
            frames = [(name, int(at)) for name, at in re.findall(r"(\w+\.py):(\d+)", comment)]
            file, line = next((f for f in frames if f[1] and (SOURCES / f[0]).exists()), (file, line))
        elif found := re.match(r"([$\w]+):\s*(\.branchtargets)?", code):
            table = found[1]
            labels[table] = len(body)
        elif re.fullmatch(r"\$\w+,?", code):
            tables[table].append(code.rstrip(","))
        elif found := re.match(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", code):
            negated, guard, name, rest = found.groups()
            if guard != "complete":  # repeats a wait, which blocks here
                operands = tuple(re.findall(r"\[[^\]]*\]|\{[^}]*\}|[^,\s]+", rest))
                body.append(Instruction(name, guard or "", bool(negated), operands, Place(file, line, number, name)))
    kept = needed(body)
    labels = {label: bisect_left(kept, at) for label, at in labels.items()}
    [entry], [threads] = re.findall(r"\.entry (\w+)", head), re.findall(r"\.reqntid (\d+)", head)
    return Program(entry, int(threads) // 32, [body[i] for i in kept], labels, tables)


def needed(body: list[Instruction]) -> list[int]:
    """What has an effect on order or shared memory, and what computes operands of it."""
    wanted: set[str] = set()
    kept: set[int] = set()
    before = -1
    while len(kept) > before:
        before = len(kept)
        for at, i in reversed([*enumerate(body)]):
            pure = operation(i.name) or i.name.startswith(("ld.global", "ld.param", "shfl", "elect"))
            if at in kept or i.name.startswith(("st.global", "setmaxnreg", "wgmma.fence")):
                continue
            if not pure or wanted.intersection(registers(i.operands[0])):
                kept.add(at)
                products = i.name.startswith("wgmma.mma")
                wanted.update(registers(i.guard, *(o for o in i.operands if not (products and o[0] == "{"))))
    return sorted(kept)


def registers(*operands: str) -> list[str]:
    return re.findall(r"%[a-z]+\d+", " ".join(operands))


def elements(operand: str) -> list[str]:
    return re.findall(r"[^{},\s]+", operand)


def divide(a: Array, b: Array) -> Array:
    """Towards zero."""
    return np.abs(a) // np.maximum(np.abs(b), 1) * np.sign(a) * np.sign(b)


INTEGER: dict[str, Callable[..., Any]] = {
    "mov": lambda a: a, "cvt": lambda a: a, "cvta": lambda a: a, "not": operator.invert, "neg": operator.neg,
    "add": operator.add, "sub": operator.sub, "and": operator.and_, "or": operator.or_, "xor": operator.xor,
    "shl": operator.lshift, "shr": operator.rshift, "min": np.minimum, "max": np.maximum,
    "div": divide, "rem": lambda a, b: a - divide(a, b) * b,
    "mul.lo": operator.mul, "mul.wide": operator.mul, "mul.hi": lambda a, b: a * b >> 32,
    "mad.lo": lambda a, b, c: a * b + c, "mad.wide": lambda a, b, c: a * b + c,
    "bfe.u32": lambda a, start, length: low_bits(a >> start, int(length[0])),
    "bfe.s32": lambda a, start, length: low_bits(a >> start, int(length[0]), signed=True),
    "selp": lambda a, b, p: np.where(p != 0, a, b),
    "setp.eq": operator.eq, "setp.ne": operator.ne, "setp.lt": operator.lt, "setp.le": operator.le,
    "setp.gt": operator.gt, "setp.ge": operator.ge,
}  # fmt: skip


def low_bits(value: Any, bits: int, signed: bool = False) -> Any:
    if bits < 64:
        value = value & ((1 << bits) - 1)
        value = (value ^ 1 << bits - 1) - (1 << bits - 1) if signed else value
    return value


@cache
def operation(name: str) -> Callable[..., Any] | None:
    """What an arithmetic instruction does to its operands; None for the others."""
    parts = name.split(".")
    if not re.search(r"\.(b?f(16|32)(x2)?|approx)\b", name) or parts[0] in ("wgmma", "mma"):
        return INTEGER.get(".".join(parts[:2])) or INTEGER.get(parts[0])
    if parts[0] == "setp":
        return lambda *_: np.zeros(32, np.int64)
    return lambda *values: reduce(lambda h, x: h * 1_000_003 + x + 1, values, zlib.crc32(name.encode()))
