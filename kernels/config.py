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
    """A matmul of kernels.hopper_matmul, and how long its tiles take on an H100.

    groups: that multiply: 1 of eight warps, of four for 64 rows; 2 of four, each with tiles of its own, in turns; 3 of
    four that share one.
    """

    block_m: int
    block_n: int  # 64, 128 or 192
    groups: int
    buffers: int  # steps of 64 columns of depth in shared memory
    step_us: float = 0.0
    tile_us: float = 0.0  # of every tile's epilogue that no main loop hides
    last_us: float = 0.0  # of the last tile's


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
        "patch_embed": ((1 << 30, GemmConfig(64, 64, 64, 4, 3)),),
        "bytes": ((1 << 30, GemmConfig(64, 64, 64, 4, 3)),),
        "residual": ((1024, GemmConfig(64, 64, 64, 4, 3)), (1 << 30, GemmConfig(128, 128, 32, 8, 4))),
    },
    90: {
        "qkv": ((1 << 30, GemmConfig(64, 128, 64, 4, 4)),),
        "linear": ((512, GemmConfig(128, 128, 64, 8, 3)), (1 << 30, GemmConfig(128, 256, 64, 8, 3))),
        "gated": ((512, GemmConfig(64, 128, 64, 4, 4)), (1 << 30, GemmConfig(128, 128, 64, 8, 3))),
        "patch_embed": (
            (512, GemmConfig(64, 64, 64, 4, 4)),
            (896, GemmConfig(64, 128, 64, 4, 4)),  # 784 rows: 14 us, 128 x 128 21
            (1 << 30, GemmConfig(128, 128, 64, 8, 4)),  # 16384 rows: 163 us, with three stages 181
        ),
        "bytes": ((1 << 30, GemmConfig(64, 64, 64, 4, 4)),),
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
        "patch_embed": ((1 << 30, GemmConfig(64, 64, 64, 4, 4)),),
        "bytes": ((1 << 30, GemmConfig(64, 64, 64, 4, 4)),),
        "residual": ((1024, GemmConfig(64, 64, 64, 4, 4)), (1 << 30, GemmConfig(128, 128, 64, 8, 3))),
    },
}
_GEMM_32BIT = GemmConfig(64, 64, 32, 4, 2)

# Times among the other launches of a block (bench/blocks.py; bench/results/blocks.json to 1568 rows, hopper_blocks.json
# from there), which leave neither a kernel's code nor its operands in the caches: least squares over the sizes that a
# form is meant for.
_TALL = HopperConfig(128, 128, 2, buffers=5, step_us=0.40, tile_us=0.5, last_us=2.0)
_DEEP = HopperConfig(256, 128, 1, buffers=4, step_us=0.67, tile_us=5.3)
_BROAD = HopperConfig(128, 192, 1, buffers=5, step_us=0.585, tile_us=3.4)
_SQUARE = HopperConfig(192, 192, 3, buffers=4, step_us=0.74, tile_us=7.9)
_THIRDS = HopperConfig(192, 128, 3, buffers=4, step_us=0.465, tile_us=6.0)
_SHARED = HopperConfig(128, 128, 1, buffers=5, step_us=0.413, tile_us=1.9)
_SLIM = HopperConfig(128, 64, 1, buffers=6, step_us=0.32)
_STRIP = HopperConfig(64, 192, 1, buffers=6, step_us=0.35, tile_us=1.0)
_SMALL = HopperConfig(64, 64, 1, buffers=10, step_us=0.243)
# The forms of each op on sm_90, at every size: their bits are the same, those of the plain kernels' are not always.
_HOPPER: dict[str, tuple[HopperConfig, ...]] = {
    "qkv": (_TALL, _BROAD, _SLIM, _SMALL),
    "linear": (_TALL, _DEEP, _SQUARE, _THIRDS, _SHARED, _SLIM, _SMALL),
    "gated": (_TALL, _SHARED, _SLIM, _SMALL),
    "residual": (_TALL, _DEEP, _SQUARE, _SLIM, _STRIP, _SMALL),
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
    op: str, rows: int, columns: int, depth: int, dtype: torch.dtype, arch: int, programs: int
) -> HopperConfig | None:
    """The Gluon form of a matmul over a bucket of at most `rows` rows; None: gemm_config's.

    Tiles run in rounds of `programs`, and those of a last round with few tiles take at least half as long as any: for
    1152 columns and a depth of 4352, 192 x 192 is the fastest at 4096 rows (61 us, 256 x 128 takes 99), 256 x 128 at
    6272 (100), 64 x 64 at 64 (12, 128 x 64 takes 16).
    """
    if dtype == torch.float32 or _generation(arch) != 90 or not has_gluon():
        return None

    def microseconds(c: HopperConfig) -> float:
        tiles = -(-rows // c.block_m) * -(-columns // c.block_n)
        full, left = divmod(tiles, programs)
        load, rounds = (full + 0.5 + 0.5 * left / programs, full + 1) if left else (full, full)
        return load * -(-depth // 64) * c.step_us + rounds * c.tile_us + c.last_us

    return min(_HOPPER[op], key=microseconds)


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
