"""Runs Gluon kernels on the CPU: a thread for each partition of warps, shared memory as arrays, barriers with phases.

Matmuls happen when they are waited for, not when they are issued, and loads poison their target first. So it finds
deadlocks, results used before their wait, buffers given back too early, generic stores that no fence publishes to the
tensor cores, and accesses out of bounds. It does not know layouts, registers or the order of warps within a partition.
"""

from __future__ import annotations

import re
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DEADLOCK_SECONDS = 10.0
_here = threading.local()  # of a partition: program, issued matmuls, unpublished stores, kill


class Array(np.ndarray[Any, Any]):
    """A register tensor."""

    type = types.SimpleNamespace(layout=None)

    def to(self, dtype: str) -> Array:
        return array(round_to(np.asarray(self), dtype))


def array(x: Any) -> Array:
    return np.asarray(x).view(Array)


def round_to(x: Any, dtype: str) -> Any:
    """To bf16, to nearest even, kept in fp32; other dtypes as they are."""
    if dtype != "bfloat16":
        return x
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
    rounded = bits.astype(np.uint32).view(np.float32)
    return np.where(np.isnan(x), np.float32(np.nan), rounded)


class Pending:
    """A matmul's result until it is waited for. Any use but as an accumulator is a bug."""

    value: Any = None

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"{name} of a matmul's result that was not waited for")


class Barrier:
    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.phase = self.count = self.pending = self.bytes = 0

    def settle(self, arrived: int = 0, landed: int = 0, expected: int = 0) -> None:
        with self.condition:
            self.bytes += expected - landed
            self.pending -= arrived
            assert self.pending >= 0, "more arrivals than the barrier counts"
            if self.pending == 0 and self.bytes == 0:
                self.phase, self.pending = self.phase ^ 1, self.count
                self.condition.notify_all()

    def wait(self, parity: int) -> None:
        start = time.monotonic()
        with self.condition:
            while self.phase == (int(parity) & 1):
                self.condition.wait(0.1)
                if _here.kill.is_set():
                    raise SystemExit
                if time.monotonic() - start > DEADLOCK_SECONDS:
                    raise RuntimeError(f"deadlock in {_here.name}")


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def index(self, i: int) -> Any:
        assert 0 <= int(i) < len(self.data), f"buffer {i} of {len(self.data)}"
        item = self.data[int(i)]
        return Shared(item) if isinstance(item, np.ndarray) else item

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.transpose(order))

    def slice(self, start: int, length: int) -> Shared:
        assert start >= 0 and start + length <= len(self.data), f"rows {start} to {start + length} of {len(self.data)}"
        return Shared(self.data[start : start + length])

    def load(self, layout: Any) -> Array:
        return array(self.data.copy())

    def store(self, value: Any) -> None:
        self.data[...] = value
        _here.unpublished.append(self.data)


class Descriptor:
    """A TMA descriptor of a matrix, read in boxes; zeros outside."""

    def __init__(self, matrix: Any, box: Sequence[int]) -> None:
        self.matrix, self.layout = matrix, None
        self.block_type = types.SimpleNamespace(shape=list(box))


class Pointer:
    def __init__(self, data: Any, offset: Any = 0, kind: str = "float32") -> None:
        self.data, self.offset = data.reshape(-1), offset
        self.dtype = types.SimpleNamespace(element_ty=kind)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.data, self.offset + np.asarray(other), self.dtype.element_ty)


def _masked(pointer: Pointer, mask: Any) -> tuple[Any, Any]:
    offset = np.asarray(pointer.offset)
    mask = np.broadcast_to(True if mask is None else mask, offset.shape)
    used = offset[mask]
    assert not used.size or (used.min() >= 0 and used.max() < pointer.data.size), "access out of bounds"
    return offset, mask


def load(pointer: Pointer, mask: Any = None, other: float = 0.0) -> Any:
    offset, mask = _masked(pointer, mask)
    if not offset.ndim:
        return int(pointer.data[int(offset)])
    value = np.full(offset.shape, other, pointer.data.dtype)
    value[mask] = pointer.data[offset[mask]]
    return array(value)


def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    offset, mask = _masked(pointer, mask)
    pointer.data[offset[mask]] = np.broadcast_to(value, offset.shape)[mask]


def copy_in(descriptor: Descriptor, corner: Sequence[int], barrier: Barrier, target: Shared) -> None:
    """global -> shared: the target holds NaN, then the box, and its bytes land."""
    (row, column), (height, width) = map(int, corner), descriptor.block_type.shape
    assert target.data.shape == (height, width) and row >= 0 and column >= 0
    box = np.zeros((height, width), np.float32)
    part = descriptor.matrix[row : row + height, column : column + width]
    box[: part.shape[0], : part.shape[1]] = part
    target.data[...] = np.nan
    time.sleep(np.random.default_rng().random() * 2e-4)
    target.data[...] = box
    barrier.settle(landed=2 * height * width)


def matmul(a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Pending:
    assert is_async, "synchronous matmuls are not emulated"
    for operand in (a, b):
        if isinstance(operand, Shared) and any(np.shares_memory(operand.data, data) for data in _here.unpublished):
            raise RuntimeError("a matmul reads shared memory that was stored without a fence")
    result = Pending()
    _here.issued.append((result, a.data if isinstance(a, Shared) else np.array(a), b.data, acc if use_acc else None))
    return result


def matmul_wait(left: int, deps: Sequence[Any]) -> Any:
    while len(_here.issued) > left:
        result, a, b, acc = _here.issued.pop(0)
        value = np.asarray(a, np.float32) @ np.asarray(b, np.float32)
        if acc is not None:
            value = value + (acc.value if isinstance(acc, Pending) else acc)
        result.value = array(value)
    done = [d.value if isinstance(d, Pending) and d.value is not None else d for d in deps]
    return done[0] if len(done) == 1 else tuple(done)


def specialize(partitions: Sequence[tuple[Callable[..., None], Any]], warps: Any, registers: Any) -> None:
    """Every partition in a thread of its own; the first error stops them all."""
    program, kill, errors = _here.program, threading.Event(), []

    def run(function: Callable[..., None], arguments: Any, number: int) -> None:
        _here.program, _here.kill, _here.name = program, kill, f"{function.__name__} {number}"
        _here.issued, _here.unpublished = [], []
        try:
            function(*arguments)
            assert not _here.issued, f"{_here.name} ends with matmuls in flight"
        except SystemExit:
            pass
        except BaseException as error:  # of any kind: it is raised again in the caller
            errors.append(error)
            kill.set()

    threads = [threading.Thread(target=run, args=(f, a, n)) for n, (f, a) in enumerate(partitions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _allocate(dtype: str, shape: Sequence[int], layout: Any) -> Any:
    if dtype != "int64":
        return Shared(np.full([int(n) for n in shape], np.nan, np.float32))
    return Shared([Barrier() for _ in range(shape[0])]) if len(shape) == 2 else Barrier()


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.pending = count


def _asm(instruction: str, constraints: str, arguments: Sequence[Any], dtype: str, is_pure: bool, pack: int) -> Array:
    """One PTX instruction."""
    return array({"cos.approx.f32": np.cos, "sin.approx.f32": np.sin}[instruction.split()[0]](*arguments))


def _language() -> types.SimpleNamespace:
    def nothing(*_: Any, **__: Any) -> None:
        return None

    return types.SimpleNamespace(
        constexpr=lambda value: value, bfloat16="bfloat16", float16="float16", float32="float32", int64="int64",
        NVMMADistributedLayout=nothing, SliceLayout=nothing, DotOperandLayout=nothing, BlockedLayout=nothing,
        SwizzledSharedLayout=nothing, NVMMASharedLayout=types.SimpleNamespace(get_default_for=nothing),
        arange=lambda a, b, layout=None: array(np.arange(a, b)),
        zeros=lambda shape, dtype, layout=None: array(np.zeros(shape, np.float32)),
        expand_dims=lambda x, axis: array(np.expand_dims(x, axis)),
        where=lambda c, a, b: array(np.where(c, a, b)) if np.ndim(c) else (a if c else b),
        max=lambda x, axis: array(np.max(x, axis=axis)), sum=lambda x, axis: array(np.sum(x, axis=axis)),
        exp2=lambda x: array(np.exp2(x)), rsqrt=lambda x: array(1 / np.sqrt(x)),
        abs=lambda x: array(np.abs(x)),
        fma=lambda a, b, c: array(a * b + c), floor=lambda x: array(np.floor(x)),
        full=lambda shape, value, dtype, layout=None: array(np.full(shape, value, np.float32)),
        inline_asm_elementwise=_asm,
        maximum=lambda a, b, propagate_nan=None: array(np.maximum(a, b)),
        minimum=lambda a, b, propagate_nan=None: array(np.minimum(a, b)),
        reshape=lambda x, shape: array(np.reshape(x, shape)), permute=lambda x, order: array(np.transpose(x, order)),
        split=lambda x: (array(x[..., 0]), array(x[..., 1])), join=lambda a, b: array(np.stack([a, b], -1)),
        cast=lambda x, dtype: x, multiple_of=lambda x, n: x, max_contiguous=lambda x, n: x,
        convert_layout=lambda x, layout: x, cdiv=lambda a, b: -(-a // b), static_range=range,
        program_id=lambda axis: _here.program, load=load, store=store,
        allocate_shared_memory=_allocate, warp_specialize=specialize,
    )  # fmt: skip


def emulated(path: Path, *changes: tuple[str, str]) -> types.ModuleType:
    """The Gluon module at `path` over this emulator, with `changes` (old text, new text) to its source."""
    source = path.read_text()
    for old, new in changes:
        assert old in source, f"{path.name} has no {old!r} any more"
        source = source.replace(old, new)
    language = _language()
    barrier = types.SimpleNamespace(
        MBarrierLayout=lambda: None, init=_init,
        wait=lambda b, parity, pred=True: b.wait(parity) if pred else None,
        expect=lambda b, size: b.settle(arrived=1, expected=int(size)),
        arrive=lambda b, count=1, pred=True: b.settle(arrived=count) if pred else None,
    )  # fmt: skip
    hopper = types.SimpleNamespace(
        fence_async_shared=lambda: _here.unpublished.clear(), mbarrier=barrier, warpgroup_mma=matmul,
        warpgroup_mma_wait=matmul_wait, tma=types.SimpleNamespace(async_copy_global_to_shared=copy_in),
    )  # fmt: skip
    name = "triton.experimental.gluon"
    gluon = types.SimpleNamespace(jit=lambda function: function, language=language)
    fakes: dict[str, Any] = {
        "triton.experimental": types.SimpleNamespace(gluon=gluon),
        name: gluon,
        f"{name}.language": language,
        f"{name}.language.nvidia.hopper": hopper,
        f"{name}.nvidia.hopper": types.SimpleNamespace(TensorDescriptor=Descriptor),
    }
    module = types.ModuleType(re.sub(r"\W", "_", str(path)))
    module.__package__ = "fused_vit.kernels"
    hidden = {key: sys.modules.get(key) for key in fakes}
    sys.modules.update(fakes)
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    finally:  # not mock.patch.dict: it would forget what the source imported for the first time, torch for one
        for key, real in hidden.items():
            del sys.modules[key]
            if real is not None:
                sys.modules[key] = real
    return module


def launch(kernel: Callable[..., None], programs: int, *arguments: Any, **options: Any) -> None:
    """Every program of a kernel, one after the other."""
    with np.errstate(all="ignore"):
        for program in range(programs):
            _here.program, _here.unpublished = program, []
            kernel(*arguments, **options)
