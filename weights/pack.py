"""Packing: a tower's tensors, by part name, into the tensors that the plan's steps name, in the kernels' layouts.

Weights are [out, in] with depth innermost, in the model's dtype; biases and column sums are fp32. Arithmetic is done in
fp32 (or wider, if the source is), one tensor at a time, so memory peaks at one folded weight above the result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from fused_vit.spec import NormSpec, TowerSpec

from .fold import column_sum, fold_norm, fold_softmax_scale, pair_rotations

Read = Callable[[str, int], torch.Tensor]  # (part, block) -> tensor, e.g. ("block.qkv.weight", 3)
PAD = 64


def pack_tower(
    spec: TowerSpec, read: Read, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """Every weight that build_plan(spec) names. `read` returns a tensor of the tower by part name and block."""
    packer = _Packer(spec, read, dtype, torch.device(device))
    att = spec.attention
    quarter = att.head_dim // 4
    theta = spec.rope.theta if spec.rope else 1.0
    exponent = torch.arange(0, 2 * quarter, 2, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    packer.packed["inv_freq"] = (1.0 / theta ** (exponent / (2 * quarter))).to(packer.device)
    patch = packer.read("patch_embed.weight").flatten(1)
    packer.put("patch_embed", patch, packer.read("patch_embed.bias") if spec.patch.bias else None)
    if spec.position:
        packer.packed["position.weight"] = packer.read("position.weight").to(dtype, copy=True)
    for i in range(spec.depth):
        packer.block(i)
    packer.merger("merger", "merger", 0, groups=spec.merger.patches)
    for k in range(len(spec.deepstack)):
        packer.merger("deepstack", f"deepstack.{k}", k, groups=1)
    return packer.packed


class _Packer:
    def __init__(self, spec: TowerSpec, read: Read, dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.source, self.dtype, self.device = spec, read, dtype, device
        self.packed: dict[str, torch.Tensor] = {}

    def read(self, part: str, i: int = 0) -> torch.Tensor:
        """The source tensor on the device, in fp32 or wider."""
        tensor = self.source(part, i).to(self.device)
        return tensor if tensor.dtype == torch.float64 else tensor.float()

    def pair(self, part: str, i: int, bias: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.read(f"{part}.weight", i), self.read(f"{part}.bias", i) if bias else None

    def put(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None, groups: int = 0) -> None:
        """Round and store weight, bias and, for a folded norm, the column sums of the rounded weight per group."""
        rounded = weight.to(self.dtype, copy=True).contiguous()  # never a view of the file or of a live module
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        shift = torch.zeros(len(weight), device=self.device) if bias is None else bias
        self.packed[f"{name}.weight"] = rounded
        self.packed[f"{name}.bias"] = shift.to(wide, copy=True).contiguous()
        if groups:
            self.packed[f"{name}.colsum"] = column_sum(rounded, groups).to(wide)

    def norm(self, part: str, i: int, norm: NormSpec) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.read(f"{part}.weight", i), self.read(f"{part}.bias", i) if norm.kind == "layer" else None

    def block(self, i: int) -> None:
        spec, att, name = self.spec, self.spec.attention, f"block.{i}"
        qkv = fold_norm(*self.pair("block.qkv", i, att.bias), *self.norm("block.norm1", i, spec.norm))
        self.put(f"{name}.qkv", self._heads(qkv[0]), self._heads(qkv[1]), groups=1)
        self.put(f"{name}.proj", *self.pair("block.proj", i, att.bias))
        fc1 = fold_norm(*self.pair("block.fc1", i, spec.mlp.bias), *self.norm("block.norm2", i, spec.norm))
        extra = -spec.mlp.width % PAD  # zero rows: activations of zero are zero, and meet zero columns of fc2
        self.put(f"{name}.fc1", F.pad(fc1[0], (0, 0, 0, extra)), F.pad(fc1[1], (0, extra)), groups=1)
        fc2, bias = self.pair("block.fc2", i, spec.mlp.bias)
        self.put(f"{name}.fc2", F.pad(fc2, (0, extra)), bias)

    def _heads(self, rows: torch.Tensor) -> torch.Tensor:
        """Scale queries and put rotation pairs next to each other, in a qkv weight or bias."""
        att = self.spec.attention
        q, k, v = rows.split([att.heads * att.head_dim, att.kv_heads * att.head_dim, att.kv_heads * att.head_dim])
        if self.spec.rope and self.spec.rope.pairs == "half":
            q, k = (pair_rotations(t, att.head_dim) for t in (q, k))
        return torch.cat([fold_softmax_scale(q, att.head_dim), k, v])

    def merger(self, part: str, name: str, i: int, groups: int) -> None:
        """`groups` norms along a merged row: one per patch (gamma repeats), or one over the whole row."""
        gamma, beta = self.norm(f"{part}.norm", i, self.spec.merger.norm)
        tiled = (gamma.repeat(groups), None if beta is None else beta.repeat(groups))
        self.put(f"{name}.fc1", *fold_norm(*self.pair(f"{part}.fc1", i), *tiled), groups=groups)
        self.put(f"{name}.fc2", *self.pair(f"{part}.fc2", i))
