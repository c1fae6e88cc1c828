"""Offsets of rows beyond 2^31 elements: no integer of 32 bits overflows on its way to an address of a kernel."""

from __future__ import annotations

import pytest
import triton

from tests.kernels import ranges, resources
from tests.kernels.resources import Launch

ROWS = 1_900_000  # of 1152 columns and more: 2^31 elements are 1 864 135 such rows
BOUNDS = {"tap_index_ptr": 100_000}  # rows of a position table
FACTS = {("arith.subi", "at"): (0, 4)}  # kernels.hopper_epilogues.store_qkv: heads that 64 columns touch, less one
TOWERS = ("8B", "2B", "Qwen2.5-VL-7B", "GLM-4.1V", "GLM-5.3-Flash", "Kimi-K2.5")
pytestmark = pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="reads the IR of triton 3.6")


def ir_of(launch: Launch, arch: int) -> str:
    asm = resources.compiled(launch, arch).asm
    return str(asm["ttir"] if "ttir" in asm else asm["ttgir"])  # Gluon has no other


def launches(tower: str, arch: int) -> list[Launch]:
    """Without unfold's, whose products are places in one image, and those are at most its rows (packing.items)."""
    return [launch for launch in resources.launches(tower, ROWS, arch) if " unfold " not in launch.label]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("tower", TOWERS)
def test_no_offset_overflows(tower: str, arch: int) -> None:
    for launch in launches(tower, arch):
        assert not ranges.overflows(ir_of(launch, arch), launch, ROWS, BOUNDS, FACTS), launch.label


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("step", ["residual proj", "linear fc1", "norm merger.norm"])
def test_the_same_in_32_bits_is_seen(step: str, arch: int) -> None:
    launch = next(launch for launch in launches("8B", arch) if launch.label.endswith(step))
    narrow = ir_of(launch, arch).replace("i64", "i32")
    assert any(" in 32 bits: " in line for line in ranges.overflows(narrow, launch, ROWS, BOUNDS, FACTS))


def test_coordinates_of_attention_fit() -> None:
    """Gluon's attention gives TMA rows of [heads, rows] in 32 bits."""
    from fused_vit.towers import parse_config

    for tower in TOWERS:
        attention = parse_config(resources.TOWERS[tower]).attention
        assert (attention.heads + 2 * attention.kv_heads) * ROWS < 1 << 31
