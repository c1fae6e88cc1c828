"""Packing: a tower's tensors, by part name, into the tensors that the plan's steps name, in the kernels' layouts.

Weights are [out, in] with depth innermost, in the model's dtype; biases and column sums are fp32. Arithmetic is done in
fp32 (or wider, if the source is), one tensor at a time, so memory peaks at one folded weight above the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from fused_vit.spec import ConvMergerSpec, MergerSpec, MlpSpec, NormSpec, PoolSpec, TowerSpec

from .fold import (
    column_sum,
    fold_bytes,
    fold_norm,
    fold_softmax_scale,
    frame_sinusoids,
    pair_gates,
    pair_rotations,
    rotary_frequencies,
)

Read = Callable[[str, int], torch.Tensor]  # (part, block) -> tensor, e.g. ("block.qkv.weight", 3)
Linear = tuple[torch.Tensor, torch.Tensor | None]
PAD, ALIGN = 64, 16


def pack_tower(
    spec: TowerSpec, read: Read, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """Every weight that build_plan(spec) names. `read` returns a tensor of the tower by part name and block."""
    packer = _Packer(spec, read, dtype, torch.device(device))
    packer.embedding()
    for i in range(spec.depth):
        packer.block(i)
    merger = spec.merger.projector if isinstance(spec.merger, PoolSpec) else spec.merger
    if spec.final_norm:
        packer.put_norm("final_norm", spec.final_norm)
    if isinstance(merger, MergerSpec):
        packer.merger(merger, "merger", "merger", 0, spec.patches)
        for k in range(len(spec.deepstack)):
            packer.merger(merger, "deepstack", f"deepstack.{k}", k, 1)
    elif isinstance(merger, ConvMergerSpec):
        packer.conv_merger(merger)
    return packer.packed


def byte_weights(
    spec: TowerSpec, packed: Mapping[str, torch.Tensor], mean: Sequence[float], std: Sequence[float]
) -> dict[str, torch.Tensor]:
    """Packed weights of the same tower for uint8 pixels [patches, channels * size * size] of stills (PatchSpec.bytes).

    mean, std: of a channel, as image processors have them. All but the patch embedding are the same tensors.
    """
    p, weight, bias = spec.patch, packed["patch_embed.weight"], packed["patch_embed.bias"]
    middle, spread = (torch.tensor(values, dtype=bias.dtype, device=bias.device) for values in (mean, std))
    folded, shift = fold_bytes(weight[:, : p.features].to(bias.dtype), bias, middle, spread, p.temporal)
    folded = F.pad(folded, (0, -folded.shape[1] % ALIGN)).to(weight.dtype)
    return {**packed, "patch_embed.weight": folded.contiguous(), "patch_embed.bias": shift}


class _Packer:
    def __init__(self, spec: TowerSpec, read: Read, dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.source, self.dtype, self.device = spec, read, dtype, device
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.packed: dict[str, torch.Tensor] = {}

    # --- reading and storing ---

    def read(self, part: str, i: int = 0) -> torch.Tensor:
        """The source tensor on the device, in fp32 or wider."""
        tensor = self.source(part, i).to(self.device)
        return tensor if tensor.dtype == torch.float64 else tensor.float()

    def pair(self, part: str, i: int, bias: bool = True) -> Linear:
        return self.read(f"{part}.weight", i), self.read(f"{part}.bias", i) if bias else None

    def norm(self, part: str, i: int, norm: NormSpec) -> Linear:
        return self.read(f"{part}.weight", i), self.read(f"{part}.bias", i) if norm.kind == "layer" else None

    def put(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None, normed: bool = False) -> None:
        """Round and store weight, bias and, for a folded norm, the column sums of the rounded weight."""
        rounded = weight.to(self.dtype, copy=True).contiguous()  # never a view of the file or of a live module
        shift = torch.zeros(len(weight), device=self.device) if bias is None else bias
        self.packed[f"{name}.weight"] = rounded
        self.packed[f"{name}.bias"] = shift.to(self.wide, copy=True).contiguous()
        if normed:
            self.packed[f"{name}.colsum"] = column_sum(rounded).to(self.wide)

    def put_norm(self, name: str, norm: NormSpec) -> None:
        """A norm that stays a step of its own."""
        gamma, beta = self.norm(name, 0, norm)
        self.packed[f"{name}.weight"] = gamma.to(self.wide, copy=True)
        if beta is not None:
            self.packed[f"{name}.bias"] = beta.to(self.wide, copy=True)

    # --- parts of a tower ---

    def embedding(self) -> None:
        spec = self.spec
        if spec.rope:
            self.packed["frequencies"] = rotary_frequencies(spec.rope, spec.attention, self.wide).to(self.device)
        weight, bias = self.pair("patch_embed", 0, spec.patch.bias)
        self.put("patch_embed", F.pad(weight, (0, -weight.shape[1] % ALIGN)), bias)
        if spec.patch.norm:
            self.put_norm("patch_norm", spec.patch.norm)
        if spec.position:
            self.packed["position.weight"] = self._positions().to(self.dtype, copy=True)

    def _positions(self) -> torch.Tensor:
        """The learned grid and, behind it, the rows that belong to no place: the class token's, or the frames'."""
        spec, rows = self.spec, self.read("position.weight")
        assert spec.position is not None
        if spec.class_token:  # checkpoints have its position first; the token has no other input, so it is added here
            rows = torch.cat([rows[1:], rows[:1] + self.read("class_token")])
        if spec.position.frames:
            rows = torch.cat([rows, frame_sinusoids(spec.position.frames, spec.width).to(rows)])
        return rows

    def block(self, i: int) -> None:
        spec, att, name = self.spec, self.spec.attention, f"block.{i}"
        qkv = fold_norm(*self.pair("block.qkv", i, att.bias), *self.norm("block.norm1", i, spec.norm))
        self.put(f"{name}.qkv", self._heads(qkv[0]), self._heads(qkv[1]), normed=True)
        if att.qk_norm:
            self.packed[f"{name}.qkv.gain"] = self._gain(i).to(self.wide)
        self.put(f"{name}.proj", *self._scaled(self.pair("block.proj", i, att.bias), "block.scale1", i))
        fc1 = fold_norm(*self.pair("block.fc1", i, spec.mlp.bias), *self.norm("block.norm2", i, spec.norm))
        fc2 = self._scaled(self.pair("block.fc2", i, spec.mlp.bias), "block.scale2", i)
        self.mlp(name, spec.mlp, fc1, fc2, normed=True)

    def mlp(self, name: str, mlp: MlpSpec, fc1: Linear, fc2: Linear, normed: bool = False) -> None:
        """Both halves, the width between them padded; a gate's rows next to their up rows."""
        pad = -mlp.width % PAD  # zero rows: activations of zero are zero, and meet zero columns of fc2

        def rows(tensor: torch.Tensor) -> torch.Tensor:
            halves = [F.pad(t, (0,) * (2 * t.ndim - 1) + (pad,)) for t in tensor.split(mlp.width)]
            return pair_gates(torch.cat(halves)) if mlp.gated else halves[0]

        self.put(f"{name}.fc1", rows(fc1[0]), None if fc1[1] is None else rows(fc1[1]), normed)
        self.put(f"{name}.fc2", F.pad(fc2[0], (0, pad)), fc2[1])

    def _scaled(self, linear: Linear, part: str, i: int) -> Linear:
        """A linear whose result a LayerScale multiplies (arXiv 2103.17239), as one."""
        if not self.spec.layer_scale:
            return linear
        scale = self.read(part, i)
        return linear[0] * scale[:, None], None if linear[1] is None else linear[1] * scale

    def _heads(self, rows: torch.Tensor) -> torch.Tensor:
        """Scale queries and put rotation pairs next to each other, in a qkv weight or bias."""
        att = self.spec.attention
        q, k, v = rows.split(att.sections)
        if self.spec.rope:
            q, k = (pair_rotations(t, att.head_dim) for t in (q, k))
        if att.qk_norm is None:  # else a norm would undo it: the gain carries it
            q = fold_softmax_scale(q, att.head_dim)
        return torch.cat([q, k, v])

    def _gain(self, i: int) -> torch.Tensor:
        """The weights of the norms of queries and keys, per column of both."""
        att = self.spec.attention
        q, k = (self.read(f"block.{n}_norm.weight", i) for n in "qk")
        if self.spec.rope:
            q, k = (pair_rotations(t, att.head_dim) for t in (q, k))
        return torch.cat([fold_softmax_scale(q, att.head_dim).repeat(att.heads), k.repeat(att.kv_heads)])

    def merger(self, merger: MergerSpec, part: str, name: str, i: int, groups: int) -> None:
        """`groups` norms along a merged row: one per patch (gamma repeats), or one over the whole row."""
        fc1 = fold_norm(*self.pair(f"{part}.fc1", i), *self._tiled(f"{part}.norm", i, merger.norm, groups))
        self.put(f"{name}.fc1", *fc1)
        self.put(f"{name}.fc2", *self.pair(f"{part}.fc2", i))

    def _tiled(self, part: str, i: int, norm: NormSpec, groups: int) -> Linear:
        gamma, beta = self.norm(part, i, norm)
        return gamma.repeat(groups), None if beta is None else beta.repeat(groups)

    def conv_merger(self, merger: ConvMergerSpec) -> None:
        """The convolution's weight [out, width * merge * merge] is [out, width, merge, merge] in the checkpoint."""
        weight, bias = self.pair("merger.down", 0)
        patches = self.spec.patches
        weight = weight.unflatten(1, (self.spec.width, patches)).transpose(1, 2).flatten(1)
        self.put("merger.down", *fold_norm(weight, bias, *self._tiled("merger.norm", 0, merger.norm, patches)))
        self.put("merger.proj", self.read("merger.proj.weight"), None)
        self.put_norm("merger.post_norm", merger.post_norm)
        fc1, fc2 = (self.pair(f"merger.{n}", 0, merger.mlp.bias) for n in ("fc1", "fc2"))
        self.mlp("merger", merger.mlp, fc1, fc2)
