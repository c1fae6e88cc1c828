"""TowerSpec: everything that distinguishes one vision tower from another, as frozen data made of small parts.

No torch, no I/O. A family (fused_vit.towers) turns a config.json into a spec; the plan, the weights and the
kernels know only the spec. Each part is one piece of maths, so that a new family is a new value, or at most a new part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import SpecError

DEEPEST = 1024  # blocks; published towers have at most 63


@dataclass(frozen=True, slots=True)
class NormSpec:
    kind: Literal["layer", "rms"]
    eps: float


@dataclass(frozen=True, slots=True)
class PatchSpec:
    """Patch embedding: one matmul over flattened pixels [channels, temporal, size, size] of a patch."""

    size: int
    temporal: int = 1
    channels: int = 3
    bias: bool = True
    order: Literal["block", "raster"] = "block"  # rows of pixel_values in a frame: merge-block-major, or plain raster
    norm: NormSpec | None = None  # of the embedded patch, before positions are added
    bytes: bool = False  # pixels are uint8, of the one frame that a still has; weights.pack.byte_weights has the rest

    @property
    def features(self) -> int:
        """Columns of pixel_values."""
        return self.channels * (1 if self.bytes else self.temporal) * self.size * self.size


@dataclass(frozen=True, slots=True)
class PositionSpec:
    """Learned table [side * side, width], resampled to each image's grid and added to the patches.

    frames: clips of 2 to `frames` frames also get a fixed sinusoid per frame (0: no such thing, any number of frames).
    """

    side: int
    mode: Literal["bilinear", "bicubic"] = "bilinear"  # bicubic: Keys' kernel, a = -0.75, clamped at the border
    align_corners: bool = True
    frames: int = 0


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Axial rotary embedding: a quarter of the head for rows (h), a quarter for columns (w), each a rotation pair."""

    theta: float = 10000.0
    layout: Literal["h_then_w", "w_h_interleaved"] = "h_then_w"


@dataclass(frozen=True, slots=True)
class WindowSpec:
    """Attention within windows of side x side patches, smaller at the edges, except in the `full` blocks."""

    side: int
    full: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = True
    segments: Literal["frame", "clip"] = "frame"  # rows that attend to each other: one frame, or the whole clip
    qk_norm: NormSpec | None = None  # RMSNorm of every query and key head, before rotation
    windows: WindowSpec | None = None

    @property
    def qkv_width(self) -> int:
        return sum(self.sections)

    @property
    def sections(self) -> tuple[int, int, int]:
        """Columns of queries, keys and values."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """fc2(activation(fc1(x))), or gated: fc2(activation(gate(x)) * up(x)), where limit clamps gate <= l, |up| <= l."""

    width: int
    activation: Literal["gelu_tanh", "gelu", "quick_gelu", "silu"]
    gated: bool = False
    bias: bool = True
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class MergerSpec:
    """merge x merge patches become one row of `out` for the language model: norm each, linear, GELU (erf), linear."""

    out: int
    norm: NormSpec


@dataclass(frozen=True, slots=True)
class ConvMergerSpec:
    """norm each patch, merge x merge convolution to `out`, linear, LayerNorm, GELU (erf), then a gated MLP."""

    out: int
    norm: NormSpec
    mlp: MlpSpec
    post_norm: NormSpec = NormSpec("layer", 1e-5)


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """Mean over a clip's frames, patches grouped by merge x merge; a projector, if any, merges them to one row."""

    projector: MergerSpec | None = None


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
    merger: MergerSpec | ConvMergerSpec | PoolSpec | None
    merge: int = 2  # rows run in blocks of merge x merge patches, so that merging is reading neighbours; 1: raster
    deepstack: tuple[int, ...] = ()  # blocks whose output also goes through a merger of its own
    final_norm: NormSpec | None = None  # of last_hidden_state and of what the merger reads
    class_token: bool = False  # a learned row before the patches of every frame
    layer_scale: bool = False  # a learned factor per column on what each half of a block adds
    hidden_state: bool = False  # the last block's output, before the final norm, is an output too

    @property
    def patches(self) -> int:
        """Patches per merged row."""
        return self.merge * self.merge

    @property
    def gathers(self) -> bool:
        """Whether rows run in another order than pixel_values has them."""
        reordered = self.patch.order == "raster" and self.merge > 1
        return reordered or self.attention.windows is not None or self.class_token

    def __post_init__(self) -> None:
        for name, value in (
            ("depth", self.depth), ("width", self.width), ("heads", self.attention.heads),
            ("kv_heads", self.attention.kv_heads), ("head_dim", self.attention.head_dim),
            ("patch size", self.patch.size), ("temporal patch size", self.patch.temporal),
            ("channels", self.patch.channels), ("mlp width", self.mlp.width), ("merge size", self.merge),
            ("out width", getattr(self.merger, "out", 1)),
            ("side of the position table", self.position.side if self.position else 1),
        ):  # fmt: skip
            if value <= 0:
                raise SpecError(f"{name} is {value}; expected a positive integer")
        if self.depth > DEEPEST:  # a config alone must not cost memory or time
            raise SpecError(f"depth is {self.depth}; supported: up to {DEEPEST} blocks")
        att = self.attention
        if att.heads % att.kv_heads:
            raise SpecError(f"kv_heads is {att.kv_heads}; expected a divisor of heads ({att.heads})")
        if att.head_dim % 8 or att.head_dim > 128:
            raise SpecError(f"head_dim is {att.head_dim}; supported: multiples of 8 up to 128")
        if att.qk_norm and att.head_dim not in (16, 32, 64):
            raise SpecError(f"head_dim is {att.head_dim} with q/k norm; supported: 16, 32, 64")
        if self.width % 8 or self.mlp.width % 4 or self.patch.features % 4:
            raise SpecError(
                f"width {self.width}, mlp width {self.mlp.width} and patch features {self.patch.features} "
                "are supported in multiples of 8, 4 and 4"
            )
        if self.final_norm and isinstance(self.merger, (MergerSpec, ConvMergerSpec)):
            raise SpecError("a final norm and a merger with its own norm; expected one of them")
        if self.final_norm and self.class_token and self.merge > 1:  # its rows would have no place in pixels' order
            raise SpecError(f"a class token and a final norm with merge size {self.merge}; supported: merge size 1")
        if isinstance(self.merger, PoolSpec) and (att.segments != "clip" or not self.final_norm):
            raise SpecError("frames are pooled; expected attention over the clip and a final norm")
        if self.deepstack and not isinstance(self.merger, MergerSpec):
            raise SpecError("deepstack names blocks, but the merger is not of the kind that deepstack shares")
        self._check_blocks("deepstack", self.deepstack)
        if att.windows:
            self._check_blocks("full attention", att.windows.full)
            if att.windows.side not in range(self.merge, 9, self.merge) or att.segments == "clip":
                raise SpecError(
                    f"windows are {att.windows.side} patches wide with merge size {self.merge}; "
                    "supported: within frames, multiples of the merge size up to 8 patches"
                )

    def _check_blocks(self, what: str, blocks: tuple[int, ...]) -> None:
        if len(set(blocks)) != len(blocks) or any(not 0 <= i < self.depth for i in blocks):
            raise SpecError(f"{what} names blocks {list(blocks)}; expected distinct blocks below {self.depth}")
