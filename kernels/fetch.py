"""Fetch: pixels from a caller's tensor, at an address that the table holds.

So a captured graph reads a tensor that did not exist when it was captured, and rows may be padded on the way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import multiprocessors
from .unfold import ADDRESS, PATCHES

BLOCK = 4096


def fetch(pixels: torch.Tensor, table: torch.Tensor, *, features: int) -> None:
    """Launch: table[PATCHES] contiguous patches [features] into pixels [rows, stride].

    They are of the same dtype; their address is a multiple of 16 bytes.
    """
    fetch_kernel[(8 * multiprocessors(pixels.device),)](
        pixels, table, FEATURES=features, STRIDE=pixels.shape[1], ADDRESS=ADDRESS, PATCHES=PATCHES, BLOCK=BLOCK
    )


@triton.jit
def fetch_kernel(
    pixels_ptr, table_ptr,                     # [rows, STRIDE], int32
    FEATURES: tl.constexpr, STRIDE: tl.constexpr, ADDRESS: tl.constexpr, PATCHES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    address = tl.load((table_ptr + ADDRESS).to(tl.pointer_type(tl.int64)))
    source = tl.multiple_of(address.to(pixels_ptr.dtype), 16)
    total = tl.load(table_ptr + PATCHES).to(tl.int64) * FEATURES
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, total, tl.num_programs(0) * BLOCK):
        offs = start + tl.arange(0, BLOCK)
        target = offs if FEATURES == STRIDE else offs // FEATURES * STRIDE + offs % FEATURES
        tl.store(pixels_ptr + target, tl.load(source + offs, mask=offs < total), mask=offs < total)
