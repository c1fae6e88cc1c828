"""Triton's CPU interpreter, made right for bf16. Import after TRITON_INTERPRET=1 is set, before any launch.

Triton 3.6's interpreter keeps bf16 as 16-bit integers: dots and sums of them are garbage, casts truncate. Here every
bf16 operand is widened to fp32 and results are rounded to nearest even, as the hardware does. It also lets loops take
their bounds from device memory under numpy 2.4, which no longer converts one-element arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widen(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: Any) -> Any:
    """fp32 to bf16 bits, to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    rounded[np.isnan(values)] = np.uint16(0x7FC0)
    return rounded


def is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def up(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data).reshape(handle.data.shape), tl.float32) if is_bf16(handle) else handle


def down(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(narrow(handle.data).reshape(handle.data.shape), tl.bfloat16)


def install() -> None:
    """Patch the interpreter's builder, once."""
    if getattr(InterpreterBuilder, "rounds_bf16", False):
        return
    InterpreterBuilder.rounds_bf16 = True
    dot, cast, binary, unary = (
        getattr(InterpreterBuilder, n) for n in ("create_dot", "cast_impl", "binary_op", "unary_op")
    )
    convert, patch = InterpreterBuilder.create_fp_to_fp, interpreter._patch_lang_tensor

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if is_bf16(source) and target.scalar == tl.bfloat16:
            return cast(self, source, target)
        wide = up(source)
        if target.scalar == tl.bfloat16:
            return down(wide if wide.dtype.scalar == tl.float32 else cast(self, wide, tl.float32))
        return wide if target.scalar == tl.float32 and is_bf16(source) else cast(self, wide, target)

    def fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if is_bf16(source) or target.scalar == tl.bfloat16:
            return cast_impl(self, source, target)
        return convert(self, source, target, rounding)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not (is_bf16(left) and is_bf16(right)):
            return binary(self, left, right, op)
        result = op(up(left).data, up(right).data)
        if result.dtype == bool:
            return TensorHandle(result, tl.int1)
        return TensorHandle(narrow(result).reshape(result.shape), tl.bfloat16)

    def unary_op(self: Any, value: Any, op: Any) -> Any:
        return down(unary(self, up(value), op)) if is_bf16(value) else unary(self, value, op)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    InterpreterBuilder.create_dot = lambda self, a, b, d, p, m: dot(self, up(a), up(b), d, p, m)
    InterpreterBuilder.get_bf16 = lambda self, v: TensorHandle(narrow(np.array([v], np.float32)), tl.bfloat16)
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = fp_to_fp
    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.unary_op = unary_op
    interpreter._patch_lang_tensor = patch_lang_tensor
