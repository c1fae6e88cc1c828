"""Layouts: the tensors of a tower by our part names, and how one kind of checkpoint names, splits and shapes them.

A part is a module and a leaf, such as ("block.qkv.weight", 3): the fused query, key and value weight of block 3.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from .spec import ConvMergerSpec, MergerSpec, MlpSpec, NormSpec, PoolSpec, TowerSpec

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor as the kernels' packing wants it; sections: rows of its pieces, where checkpoints may store pieces."""

    name: str
    block: int
    shape: Shape
    sections: tuple[int, ...] = ()


def parts(spec: TowerSpec) -> Iterator[Part]:
    """Every tensor of a tower, from the spec alone, a projector's too if the spec has one."""
    d, att, patch = spec.width, spec.attention, spec.patch
    yield from _linear("patch_embed", 0, d, patch.features, patch.bias)
    if patch.norm:
        yield from _norm("patch_norm", 0, d, patch.norm)
    if spec.class_token:
        yield Part("class_token", 0, (d,))
    if spec.position:
        yield Part("position.weight", 0, (spec.position.side**2 + spec.class_token, d))
    for i in range(spec.depth):
        yield from _norm("block.norm1", i, d, spec.norm)
        yield from _norm("block.norm2", i, d, spec.norm)
        yield from _linear("block.qkv", i, att.qkv_width, d, att.bias, att.sections)
        for name in ("q_norm", "k_norm") if att.qk_norm else ():
            yield Part(f"block.{name}.weight", i, (att.head_dim,))
        yield from _linear("block.proj", i, d, att.heads * att.head_dim, att.bias)
        for name in ("scale1", "scale2") if spec.layer_scale else ():
            yield Part(f"block.{name}", i, (d,))
        yield from _mlp("block", i, d, d, spec.mlp)
    if spec.final_norm:
        yield from _norm("final_norm", 0, d, spec.final_norm)
    yield from _merger(spec)


def _linear(name: str, i: int, out: int, inp: int, bias: bool, sections: tuple[int, ...] = ()) -> Iterator[Part]:
    yield Part(f"{name}.weight", i, (out, inp), sections)
    if bias:
        yield Part(f"{name}.bias", i, (out,), sections)


def _norm(name: str, i: int, width: int, norm: NormSpec) -> Iterator[Part]:
    yield Part(f"{name}.weight", i, (width,))
    if norm.kind == "layer":
        yield Part(f"{name}.bias", i, (width,))


def _mlp(name: str, i: int, inp: int, out: int, mlp: MlpSpec) -> Iterator[Part]:
    pieces = (mlp.width,) * (2 if mlp.gated else 1)
    yield from _linear(f"{name}.fc1", i, sum(pieces), inp, mlp.bias, pieces)
    yield from _linear(f"{name}.fc2", i, out, mlp.width, mlp.bias)


def _merger(spec: TowerSpec) -> Iterator[Part]:
    merger = spec.merger.projector if isinstance(spec.merger, PoolSpec) else spec.merger
    wide = spec.width * spec.patches
    if isinstance(merger, MergerSpec):
        for name, i, normed in [
            ("merger", 0, spec.width),
            *(("deepstack", k, wide) for k in range(len(spec.deepstack))),
        ]:
            yield from _norm(f"{name}.norm", i, normed, merger.norm)
            yield from _linear(f"{name}.fc1", i, wide, wide, True)
            yield from _linear(f"{name}.fc2", i, merger.out, wide, True)
    elif isinstance(merger, ConvMergerSpec):
        yield from _norm("merger.norm", 0, spec.width, merger.norm)
        yield from _linear("merger.down", 0, merger.out, wide, True)
        yield from _linear("merger.proj", 0, merger.out, merger.out, False)
        yield from _norm("merger.post_norm", 0, merger.out, merger.post_norm)
        yield from _mlp("merger", 0, merger.out, merger.out, merger.mlp)


def conv_patches(spec: TowerSpec) -> Shape:
    """The patch embedding as a convolution's weight."""
    patch = spec.patch
    frames = (patch.temporal,) if patch.temporal > 1 else ()
    return (spec.width, patch.channels, *frames, patch.size, patch.size)


def conv_merger(spec: TowerSpec) -> Shape:
    """The downsampling convolution's weight."""
    assert isinstance(spec.merger, ConvMergerSpec)
    return (spec.merger.out, spec.width, spec.merge, spec.merge)


@dataclass(frozen=True, slots=True)
class Layout:
    """How one kind of checkpoint stores a tower.

    names: a part's module -> the checkpoint's module, {i} standing for the block, or several whose rows follow each
        other; a part's full name instead gives the checkpoint's full name.
    shapes: parts that the checkpoint shapes otherwise (the numbers, in order, are the same).
    even_odd: rotation pairs are rows (2j, 2j + 1) of a head, not (j, j + head_dim / 2).
    unused: beginnings of names below the prefix that no tower needs.
    """

    prefixes: tuple[str, ...]
    names: Mapping[str, str | tuple[str, ...]]
    shapes: Mapping[str, Callable[[TowerSpec], Shape]] = field(default_factory=dict)
    even_odd: bool = False
    unused: tuple[str, ...] = ()

    def names_of(self, part: str, i: int = 0) -> tuple[str, ...]:
        """The checkpoint's names of a part's pieces, e.g. ('blocks.3.attn.qkv.weight',)."""
        if part in self.names:
            names, suffix = self.names[part], ""
        else:
            module, _, leaf = part.rpartition(".")
            names, suffix = self.names[module], f".{leaf}"
        return tuple(n.format(i=i) + suffix for n in ((names,) if isinstance(names, str) else names))

    def has(self, part: str) -> bool:
        return part in self.names or part.rpartition(".")[0] in self.names

    def expected(self, spec: TowerSpec) -> dict[str, Shape]:
        """Every tensor of the tower that this layout holds, by the checkpoint's name without prefix."""
        shapes: dict[str, Shape] = {}
        for part in parts(spec):
            if not self.has(part.name):
                continue
            names = self.names_of(part.name, part.block)
            if len(names) == 1:
                shapes[names[0]] = self.shapes[part.name](spec) if part.name in self.shapes else part.shape
            else:
                shapes |= {name: (rows, *part.shape[1:]) for name, rows in zip(names, part.sections, strict=True)}
        return shapes


def choose_layout(layouts: Collection[Layout], spec: TowerSpec, names: Collection[str]) -> Layout:
    """The layout that most of a checkpoint's names fit, under the best of its prefixes."""
    known = set(names)

    def fits(layout: Layout) -> int:
        expected = layout.expected(spec)
        return max(sum(prefix + name in known for name in expected) for prefix in layout.prefixes)

    return max(layouts, key=fits)
