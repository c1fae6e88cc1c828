"""Addresses: matrices that lie where a call wants them, so that one captured launch reads and writes them in place.

A graph's launches keep their arguments; what a call brings is known when it comes. So a kernel is given a cell of
device memory, and finds the matrix's address in it when it starts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_DTYPES = {
    torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64,
    torch.uint8: tl.uint8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Address:
    """A contiguous matrix of this shape and dtype, or of fewer rows, whose address the cell (int64 [1]) holds.

    The address is a multiple of 16, as torch's own are: kernels load and store so many bytes at once. Where a row is no
    multiple of that, they do not, and one row's address may be anything.
    """

    cell: torch.Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype


def pointer(matrix: torch.Tensor | Address) -> torch.Tensor:
    """What a kernel is given, for `located` in it."""
    return matrix.cell if isinstance(matrix, Address) else matrix


def element(matrix: torch.Tensor | Address) -> tl.dtype:
    """The dtype by triton's name."""
    return _DTYPES[matrix.dtype]


@triton.jit
def located(ptr, DTYPE: tl.constexpr):
    """The matrix itself, or the one whose address is in the cell."""
    if ptr.dtype.element_ty == tl.int64:
        ptr = tl.multiple_of(tl.load(ptr).to(tl.pointer_type(DTYPE)), 16)
    return ptr
