"""Launch configurations: pure functions of shape, dtype and architecture over literal tables. No autotuning.

`bench/tune.py` measures candidates for these tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

SUM_COLUMNS = 64  # one partial row sum per 64 columns, whatever the tile: the same bits from every configuration


@dataclass(frozen=True, slots=True)
class GemmConfig:
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class HopperConfig:
    """A matmul of kernels.hopper_matmul."""

    block_m: int
    block_n: int  # 64, 128 or 192
    groups: int  # warpgroups that multiply
    alternate: bool  # each group has tiles of its own, in turns
    buffers: int  # steps of 64 columns of depth in shared memory


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    block_m: int  # query rows of one program, the unit of an attention tile
    block_n: int
    warps: int
    stages: int
    gluon: bool = False  # kernels.hopper_attention, with as many buffers as stages


# op -> (rows of the bucket up to, config); the first row that fits is taken. On sm_90, qkv, linear and residual were
# chosen from bench/results/tune.json (Qwen3-VL-8B's sizes); the other rows and architectures are not measured.
_GEMM_16BIT: dict[int, dict[str, tuple[tuple[int, GemmConfig], ...]]] = {
    80: {
        "qkv": ((1 << 30, GemmConfig(64, 128, 32, 8, 4)),),
        "linear": ((1024, GemmConfig(64, 64, 64, 4, 3)), (1 << 30, GemmConfig(128, 128, 32, 8, 4))),
        "gated": ((1024, GemmConfig(64, 64, 64, 4, 3)), (1 << 30, GemmConfig(128, 128, 32, 8, 4))),
        "merger": ((1 << 30, GemmConfig(64, 64, 64, 4, 3)),),
        "patch_embed": ((1 << 30, GemmConfig(64, 64, 64, 4, 3)),),
        "residual": ((1024, GemmConfig(64, 64, 64, 4, 3)), (1 << 30, GemmConfig(128, 128, 32, 8, 4))),
    },
    90: {
        "qkv": ((1 << 30, GemmConfig(64, 128, 64, 4, 4)),),
        "linear": ((512, GemmConfig(128, 128, 64, 8, 3)), (1 << 30, GemmConfig(128, 256, 64, 8, 3))),
        "gated": ((512, GemmConfig(64, 128, 64, 4, 4)), (1 << 30, GemmConfig(128, 128, 64, 8, 3))),
        "merger": ((512, GemmConfig(64, 64, 64, 4, 4)), (1 << 30, GemmConfig(128, 128, 64, 8, 3))),
        "patch_embed": ((512, GemmConfig(64, 64, 64, 4, 4)), (1 << 30, GemmConfig(128, 128, 64, 8, 3))),
        # 128 x 128 with 4 warps is 10 % faster at 4096 rows but spills
        "residual": (
            (512, GemmConfig(64, 64, 64, 4, 4)),
            (2048, GemmConfig(64, 128, 64, 4, 4)),
            (1 << 30, GemmConfig(128, 128, 64, 8, 3)),
        ),
    },
    100: {
        "qkv": ((1 << 30, GemmConfig(64, 64, 64, 4, 4)),),
        "linear": ((1024, GemmConfig(64, 64, 64, 4, 4)), (1 << 30, GemmConfig(128, 128, 64, 8, 3))),
        "gated": ((1024, GemmConfig(64, 64, 64, 4, 4)), (1 << 30, GemmConfig(128, 128, 64, 8, 3))),
        "merger": ((1 << 30, GemmConfig(64, 64, 64, 4, 4)),),
        "patch_embed": ((1 << 30, GemmConfig(64, 64, 64, 4, 4)),),
        "residual": ((1024, GemmConfig(64, 64, 64, 4, 4)), (1 << 30, GemmConfig(128, 128, 64, 8, 3))),
    },
}
_GEMM_32BIT = GemmConfig(64, 64, 32, 4, 2)

# From bench/results/tune_hopper.json (Qwen3-VL-8B's sizes, 256 to 8160 rows); _SLIM from arithmetic: it fills twice as
# many multiprocessors as 128 x 128 where rows are few.
_TALL = HopperConfig(128, 128, 2, alternate=True, buffers=5)
_WIDE = HopperConfig(128, 192, 2, alternate=True, buffers=4)
_SHARED = HopperConfig(128, 128, 2, alternate=False, buffers=5)
_SQUARE = HopperConfig(192, 192, 3, alternate=False, buffers=4)
_SLIM = HopperConfig(128, 64, 2, alternate=False, buffers=6)
# The same on sm_90 in Gluon; of several the one whose busiest multiprocessor has least to do, none: the plain kernel is
# faster there. "residual" and "qkv" are Gluon at every size, because their plain forms round some last bits
# differently, and an image's bits must not depend on the bucket.
_HOPPER: dict[str, tuple[tuple[int, tuple[HopperConfig, ...]], ...]] = {
    "qkv": ((1 << 30, (_TALL,)),),
    "linear": ((256, ()), (2048, (_TALL,)), (1 << 30, (_WIDE, _TALL))),
    "gated": ((256, ()), (1 << 30, (_TALL,))),
    "merger": ((512, ()), (1 << 30, (_SHARED, _SQUARE))),
    "residual": ((512, (_SLIM,)), (2048, (_TALL,)), (1 << 30, (_SQUARE, _TALL))),
}

_ATTENTION_16BIT: dict[int, tuple[tuple[int, AttentionConfig], ...]] = {  # head dim up to -> config
    80: ((96, AttentionConfig(128, 64, 8, 2)), (128, AttentionConfig(128, 64, 8, 2))),
    90: ((80, AttentionConfig(128, 128, 4, 3, gluon=True)), (128, AttentionConfig(128, 128, 4, 2, gluon=True))),
    100: ((96, AttentionConfig(128, 64, 8, 3)), (128, AttentionConfig(128, 64, 8, 2))),
}
# where this triton's Gluon is not the one that kernels.hopper_attention was written for
_ATTENTION_WITHOUT_GLUON = ((96, AttentionConfig(64, 64, 4, 3)), (128, AttentionConfig(128, 64, 8, 2)))
_ATTENTION_32BIT = AttentionConfig(64, 32, 4, 1)
_ATTENTION_WINDOW = AttentionConfig(64, 64, 4, 1)  # a window is one tile of at most 64 rows against itself


def _generation(arch: int) -> int:
    """The table's architecture that serves a compute capability such as 89 or 120."""
    return 100 if arch >= 100 else 90 if arch >= 90 else 80


def gemm_config(op: str, rows: int, dtype: torch.dtype, arch: int) -> GemmConfig:
    """Tile of a matmul, by its epilogue, over a bucket of at most `rows` rows."""
    if dtype == torch.float32:
        return _GEMM_32BIT
    return next(config for most, config in _GEMM_16BIT[_generation(arch)][op] if rows <= most)


def hopper_config(
    op: str, rows: int, columns: int, dtype: torch.dtype, arch: int, programs: int
) -> HopperConfig | None:
    """The Gluon form of a matmul over a bucket of at most `rows` rows; None: gemm_config's.

    Tiles run in rounds of `programs`, and a last round with few tiles takes as long as any: for 1152 columns, 192 x 192
    wins at 4096 rows (61 us against 78) and 128 x 128 at 6272 (109 against 120), though neither is the faster a FLOP.
    """
    if dtype == torch.float32 or _generation(arch) != 90 or not has_gluon():
        return None

    def most_elements(c: HopperConfig) -> int:
        tiles = -(-rows // c.block_m) * -(-columns // c.block_n)
        return -(-tiles // programs) * c.block_m * c.block_n

    candidates = next(configs for most, configs in _HOPPER[op] if rows <= most)
    return min(candidates, key=most_elements, default=None)


def attention_config(head_dim: int, dtype: torch.dtype, arch: int, windowed: bool = False) -> AttentionConfig:
    if dtype == torch.float32:
        return _ATTENTION_32BIT
    if windowed:
        return _ATTENTION_WINDOW
    table = _ATTENTION_16BIT[_generation(arch)]
    if table[0][1].gluon and not has_gluon():
        table = _ATTENTION_WITHOUT_GLUON
    return next(config for most, config in table if head_dim <= most)


@lru_cache
def has_gluon() -> bool:
    """Whether triton has Gluon under the names of 3.6; they change between releases."""
    try:
        from triton.experimental.gluon.language.nvidia import hopper
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    except ImportError:
        return False
    return hasattr(hopper.tma, "async_copy_global_to_shared") and hasattr(TensorDescriptor, "from_tensor")


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; an H100's where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@lru_cache
def device_arch(device: torch.device) -> int:
    """Compute capability as an integer (90 for Hopper); 80 where kernels are only interpreted."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def precision(dtype: torch.dtype) -> str:
    """fp32 operands are multiplied exactly: TF32 would lose thirteen bits of what the caller asked for."""
    return "ieee" if dtype == torch.float32 else "tf32"


def wide(x: torch.Tensor) -> torch.Tensor:
    """What accumulates: fp32 for 16-bit operands, the operand's own dtype otherwise."""
    return x.float() if x.element_size() == 2 else x
