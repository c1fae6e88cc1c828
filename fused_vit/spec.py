"""TowerSpec: everything that distinguishes one vision tower from another, as frozen data made of small parts.

No torch, no I/O. A family (fused_vit.towers) turns a config.json into a spec; the plan, the weights and the
kernels know only the spec. Each part is one piece of maths, so that a new family is a new value, or at most a new part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import SpecError


@dataclass(frozen=True, slots=True)
class PatchSpec:
    """Patch embedding: one matmul over flattened pixels [channels, temporal, size, size] of a patch."""

    size: int
    temporal: int
    channels: int = 3
    bias: bool = True
    order: Literal["block", "raster"] = "block"  # rows of a frame: merge-block-major, or plain raster

    @property
    def features(self) -> int:
        """Columns of pixel_values."""
        return self.channels * self.temporal * self.size * self.size


@dataclass(frozen=True, slots=True)
class PositionSpec:
    """Learned table [side * side, width], resampled to each image's grid and added to the patches."""

    side: int
    mode: Literal["bilinear", "bicubic"] = "bilinear"
    align_corners: bool = True

    @property
    def taps(self) -> int:
        """Table rows that one patch reads."""
        return 4 if self.mode == "bilinear" else 16


@dataclass(frozen=True, slots=True)
class NormSpec:
    kind: Literal["layer", "rms"]
    eps: float


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Axial rotary embedding: a quarter of the head for rows (h), a quarter for columns (w), each a rotation pair."""

    theta: float = 10000.0
    layout: Literal["h_then_w", "w_h_interleaved"] = "h_then_w"
    pairs: Literal["half", "even_odd"] = "half"  # which columns of the checkpoint's head form a pair


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = True
    segments: Literal["frame", "clip"] = "frame"  # rows that attend to each other: one frame, or the whole clip

    @property
    def qkv_width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True, slots=True)
class MlpSpec:
    width: int
    activation: Literal["gelu_tanh", "gelu", "quick_gelu", "silu"]
    gated: bool = False
    bias: bool = True


@dataclass(frozen=True, slots=True)
class MergerSpec:
    """size x size patches become one row for the language model: norm, linear, GELU (erf), linear."""

    size: int
    out: int
    norm: NormSpec

    @property
    def patches(self) -> int:
        """Patches per merged row."""
        return self.size * self.size


@dataclass(frozen=True, slots=True)
class TowerSpec:
    depth: int
    width: int
    patch: PatchSpec
    position: PositionSpec | None
    norm: NormSpec
    attention: AttentionSpec
    rope: RopeSpec | None
    mlp: MlpSpec
    merger: MergerSpec
    deepstack: tuple[int, ...] = ()  # blocks whose output also goes through a merger of its own

    def __post_init__(self) -> None:
        for name, value in (
            ("depth", self.depth), ("width", self.width), ("heads", self.attention.heads),
            ("head_dim", self.attention.head_dim), ("patch size", self.patch.size),
            ("temporal patch size", self.patch.temporal), ("channels", self.patch.channels),
            ("mlp width", self.mlp.width), ("merge size", self.merger.size), ("out width", self.merger.out),
        ):  # fmt: skip
            if value <= 0:
                raise SpecError(f"{name} is {value}; expected a positive integer")
        if self.attention.heads % self.attention.kv_heads:
            raise SpecError(
                f"kv_heads is {self.attention.kv_heads}; expected a divisor of heads ({self.attention.heads})"
            )
        if self.attention.head_dim % 8 or self.attention.head_dim > 128:
            raise SpecError(f"head_dim is {self.attention.head_dim}; supported: multiples of 8 up to 128")
        if self.width % 8 or self.mlp.width % 4 or self.patch.features % 4:
            raise SpecError(
                f"width {self.width}, mlp width {self.mlp.width} and patch features {self.patch.features} "
                "are supported in multiples of 8, 4 and 4"
            )
        wrong = [i for i in self.deepstack if not 0 <= i < self.depth]
        if wrong or len(set(self.deepstack)) != len(self.deepstack):
            raise SpecError(
                f"deepstack names blocks {list(self.deepstack)}; expected distinct blocks below {self.depth}"
            )
