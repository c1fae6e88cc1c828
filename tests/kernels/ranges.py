"""Ranges: the bounds of every integer of a compiled kernel, so that none of 32 bits overflows on its way to an address.

Read from Triton's IR (plain kernels) or TritonGPU's (Gluon), with the arguments and the grid of a real launch. What
comes from memory or goes round a loop (rows, counts, places, tiles) is taken to be at most the bucket's rows, and so is
the product of two numbers from memory: an image's height and width. `bounds` says better of an argument's memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.kernels.resources import Launch

Range = tuple[int, int]
UNKNOWN: Range = (-(1 << 31), (1 << 31) - 1)  # and what 32 bits hold
SAME = (
    "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "tt.reduce", "arith.extsi", "arith.trunci",
    "ttg.convert_layout",
)  # fmt: skip
NAME = r"%[\w#]+"


def _multiplied(a: Range, b: Range) -> Range:
    corners = [x * y for x in a for y in b]
    return min(corners), max(corners)


def _divided(a: Range, b: Range) -> Range:
    if b[0] <= 0:
        return UNKNOWN
    corners = [int(x / y) if abs(x) < 1 << 50 else x // y for x in a for y in b]
    return min(corners), max(corners)


def _remainder(a: Range, b: Range) -> Range:
    if b[0] <= 0:
        return UNKNOWN
    return (0 if a[0] >= 0 else 1 - b[1]), min(b[1] - 1, max(a[1], 0))


ARITHMETIC = {
    "arith.addi": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "arith.subi": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "arith.muli": _multiplied,
    "arith.divsi": _divided,
    "arith.remsi": _remainder,
    "arith.minsi": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "arith.maxsi": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
}
GROWING = ("arith.addi", "arith.subi", "arith.muli")


def flattened(value: Any) -> list[Any]:
    """An argument as the IR has it: a tuple's elements, a descriptor with its shape and strides."""
    if isinstance(value, TensorDescriptor):
        return [value.base, *value.shape, *value.strides]
    if isinstance(value, tuple):
        return [item for element in value if element is not None for item in flattened(element)]
    return [value]


def signature(ir: str, launch: Launch) -> dict[str, Any]:
    """Name in the IR -> argument of the launch; constants have none."""
    line = next(line for line in ir.splitlines() if "tt.func public" in line)
    names = re.findall(rf"({NAME}): ", line)
    parameters = [p for p in launch.kernel.params if not p.is_constexpr]
    values = [launch.arguments[p.name] for p in parameters]
    flat = [item for value in values if value is not None for item in flattened(value)]
    kept = [item for item in flat if not (type(item) is int and item == 1)]  # triton makes ones constants
    return dict(zip(names, flat if len(names) == len(flat) else kept, strict=True))


def overflows(
    ir: str, launch: Launch, rows: int, bounds: Mapping[str, int], facts: Mapping[tuple[str, str], Range]
) -> list[str]:
    """What may leave its 32 bits, or leave them for an address or 64 without known bounds: lines, none if all is well.

    bounds: of what an argument points to. facts: (operation, name in the source) -> what is known of it otherwise.
    """
    carried: Range = (-1, rows)
    arguments = signature(ir, launch)
    known: dict[str, Range] = {name: (v, v) for name, v in arguments.items() if isinstance(v, int)}
    memory = {name: (-1, bounds[name.strip("%")]) for name in arguments if name.strip("%") in bounds}  # behind pointers
    captured: list[str] = []
    loaded: set[str] = set()
    found = []

    def of(name: str) -> Range:
        return known.get(name, UNKNOWN)

    for line in ir.splitlines():
        text = line.split(" loc(")[0].strip()
        if text.startswith("ttg.warp_specialize("):
            captured = re.findall(NAME, text)
        elif text.startswith("partition"):
            names = re.findall(rf"({NAME}): ", line)
            known |= {name: of(value) for name, value in zip(names, captured, strict=True)}
        elif text.startswith("^bb"):
            known |= dict.fromkeys(re.findall(rf"({NAME}): ", line), carried)
        match = re.match(r"(.+?) = \"?([a-z_]+\.[\w.]+)\"?(.*)", text)
        if not match:
            continue
        results, op, rest = re.findall(r"%\w+(?::\d+)?", match[1]), match[2], match[3]
        names, kind = re.findall(NAME, rest), rest.rsplit(" : ", 1)[-1]
        operands = [of(name) for name in names]
        if op in ("scf.for", "scf.while"):
            known |= dict.fromkeys(re.findall(rf"({NAME}) = ", rest), carried)
        if op == "scf.for":
            known[names[0]] = (of(names[1])[0], of(names[2])[1])
        if op in ("tt.addptr", "tt.splat", "tt.broadcast") and names[0] in memory:
            memory |= dict.fromkeys(results, memory[names[0]])
        if op == "tt.addptr":
            if re.search(r"(xi32[,>]|\bi32$)", kind.split(", ", 1)[-1]) and operands[1] == UNKNOWN:
                found.append(f"an address of unknown bounds: {text}")
            continue
        value = memory.get(names[0], carried) if op == "tt.load" else _value(op, rest, operands, launch.grid, carried)
        if op == "tt.load":
            loaded.update(results)
        if op == "arith.extsi" and operands[0] == UNKNOWN:
            found.append(f"widened with unknown bounds: {text}")
        value = facts.get((op, re.sub(r"_\d+$", "", results[0].strip("%"))), value)
        if op in GROWING and re.search(r"(xi32[,>]|^i32$)", kind):
            if UNKNOWN in operands:
                value = UNKNOWN
            elif op == "arith.muli" and loaded.issuperset(names):
                value = carried
            elif not UNKNOWN[0] <= value[0] <= value[1] <= UNKNOWN[1]:
                found.append(f"{value[0]} to {value[1]} in 32 bits: {text}")
                value = UNKNOWN
        for result in results:
            name, _, count = result.partition(":")
            known |= {f"{name}#{i}": value for i in range(int(count or 0))} | {name: value}
    return found


def _value(op: str, rest: str, operands: list[Range], grid: tuple[int, ...], carried: Range) -> Range:
    if op == "arith.constant":
        numbers = [int(n) for n in re.findall(r"(?<![\w.])-?\d+(?![\w.])", rest.split(" : ")[0])]
        return (min(numbers), max(numbers)) if numbers else UNKNOWN
    if op == "tt.get_program_id":
        axis = "xyz".index(rest.split()[0])
        return 0, (grid[axis] if axis < len(grid) else 1) - 1
    if op == "tt.make_range":
        end, start = (int(re.findall(rf"{key} = (\d+)", rest)[0]) for key in ("end", "start"))
        return start, end - 1
    if op in SAME:
        return operands[0]
    if op in ARITHMETIC:
        return ARITHMETIC[op](*operands)
    if op == "arith.select":
        return min(operands[1][0], operands[2][0]), max(operands[1][1], operands[2][1])
    if op == "arith.cmpi":
        return 0, 1
    if op.startswith("scf."):
        return carried
    return UNKNOWN
