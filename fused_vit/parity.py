"""Parity: a FusedViT beside the Hugging Face tower of the same checkpoint, whole and step by step.

The bound is Hugging Face's own error: twice what its tower loses in the encoder's dtype, against itself in fp32.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import nn

from .buckets import Bucket
from .encoder import FusedViT
from .errors import CheckpointError
from .executor import launch_step, trace
from .packing import ROWS, TILES, Item, items, table
from .plan import Step
from .source import read_tower
from .towers import Tower, find_tower, parse_config, vision_config
from .weights.checkpoint import Checkpoint
from .weights.read import state_of
from .workspace import Workspace

FLOOR = 1e-5  # relative error that summing in another order may cost in fp32
# Where Hugging Face's tower holds what a step writes: (part of the tower, its input or its output)
_TAPS = {
    "patch_embed": ("block.norm1", "input"),
    "patch_norm": ("block.norm1", "input"),
    "attention": ("block.proj", "input"),
    "proj": ("block.norm2", "input"),
    "fc1": ("block.fc2", "input"),
    "fc2": ("block.norm1", "input"),  # of the next block
    "deepstack.fc1": ("deepstack.fc2", "input"),
    "deepstack.fc2": ("deepstack.fc2", "output"),
    "final_norm": ("final_norm", "output"),
    "merger.down": ("merger.proj", "input"),
    "merger.proj": ("merger.post_norm", "input"),
    "merger.post_norm": ("merger.fc1", "input"),
    "merger.fc1": ("merger.fc2", "input"),
    "merger.fc2": ("merger.fc2", "output"),
}


@dataclass(frozen=True, slots=True)
class Compared:
    """Relative error of one output or step to Hugging Face in fp32, and Hugging Face's own in the encoder's dtype."""

    name: str
    error: float
    theirs: float

    @property
    def allowed(self) -> float:
        return 2 * self.theirs + FLOOR

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # false for NaN


def hf_tower(checkpoint: Checkpoint, device: torch.device) -> nn.Module:
    """The checkpoint's tower as transformers runs it with sdpa, in fp32."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"comparing needs transformers: pip install 'fused-vit[hf]' ({error})") from error
    row, spec = find_tower(checkpoint.config), parse_config(checkpoint.config)
    read, _ = read_tower(checkpoint, row, spec)
    cls = _hf_class(row)
    if cls is None:
        names = " or ".join(row.hf_classes) or f"class for {row.family}"
        raise ImportError(f"transformers {transformers.__version__} has no {names}: there is nothing to compare with")
    # the hub's Kimi-K2.5 has vt_hidden_size and init_pos_emb_height for what transformers calls without the beginnings
    fields = {k.removeprefix("vt_").removeprefix("init_"): v for k, v in vision_config(checkpoint.config).items()}
    if "mlp_ratio" in fields:  # the hub's ERNIE has a ratio where transformers wants the width
        fields.setdefault("intermediate_size", spec.mlp.width)
    config = cls.config_class(**fields)
    config._attn_implementation = "sdpa"
    tower: nn.Module = cls(config).float().eval().requires_grad_(False)
    layout = row.layouts[0]
    state = state_of(layout, spec, read)
    known = set(tower.state_dict())
    prefix = max(layout.prefixes, key=lambda prefix: sum(prefix + name in known for name in state))
    missing, unexpected = tower.load_state_dict({prefix + name: t for name, t in state.items()}, strict=False)
    if unexpected or any(not name.removeprefix(prefix).startswith(layout.unused or ("\0",)) for name in missing):
        raise CheckpointError(f"transformers' tower does not take the weights: {[*missing, *unexpected][:5]}")
    return tower.to(device)


def _hf_class(row: Tower) -> Any:
    """transformers' class of a tower, in the module that is called as one of its model types; None if it lacks it."""
    for kind in row.model_types:
        try:
            module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        except ImportError:
            continue
        if found := next((c for name in row.hf_classes if (c := getattr(module, name, None))), None):
            return found
    return None


def random_call(vit: FusedViT, grid: Sequence[Sequence[int]], seed: int = 0) -> torch.Tensor:
    """Pixels for a grid, drawn on the CPU so that every device gets the same, rounded to the encoder's dtype."""
    rows = sum(t * h * w for t, h, w in grid)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vit.spec.patch.features, generator=generator).to(vit.device, vit.dtype)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


@contextmanager
def exact_fp32() -> Iterator[None]:
    """No TF32: by default cuDNN's convolutions use it, and cost the patch embedding's truth 3e-4."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


class Peer:
    """Hugging Face's tower on one call: in fp32, the truth, and with parameters rounded to a dtype, the bound."""

    def __init__(self, tower: nn.Module, vit: FusedViT, pixels: torch.Tensor, grid: Sequence[Sequence[int]]) -> None:
        self.vit, self.pixels, self.grid = vit, pixels, [list(row) for row in grid]
        self.truth, self.true_taps = self._run(tower, pixels.float())
        self.rounded, self.rounded_taps = self.truth, self.true_taps
        if vit.dtype != torch.float32:
            peer = copy.deepcopy(tower)
            for parameter in peer.parameters():  # buffers stay in fp32, as in a loaded checkpoint
                parameter.data = parameter.data.to(vit.dtype)
            self.rounded, self.rounded_taps = self._run(peer, pixels)

    @torch.no_grad()
    def _run(self, tower: nn.Module, pixels: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """The tower's outputs in the plan's order, where it returns them, and what it holds at every tapped step.

        Image by image, frame by frame where frames do not meet: some towers refuse clips, or clips of mixed lengths.
        """
        taps: dict[str, list[torch.Tensor]] = {}
        spec = self.vit.spec
        handles = [self._tap(tower, step.name, taps) for step in self.vit.plan().steps]
        outs: list[list[torch.Tensor]] = []
        clips = [[t, h, w] for t, h, w in self.grid]
        if spec.attention.segments == "frame":
            clips = [[1, h, w] for t, h, w in clips for _ in range(t)]
        try:
            with exact_fp32():
                for part, grid in zip(pixels.split([t * h * w for t, h, w in clips]), clips, strict=True):
                    out = self._call(tower, part, grid)
                    if isinstance(out, (tuple, torch.Tensor)):  # transformers 4: merged, and deepstack if there is any
                        merged, deepstack = out if isinstance(out, tuple) else (out, [])
                        outs.append([taps[self._last()][-1], merged, *deepstack])
                    else:
                        found = [out.last_hidden_state, out.pooler_output, *(out.get("deepstack_features") or [])]
                        outs.append([t for t in found if t is not None])
        finally:
            for handle in handles:
                if handle is not None:
                    handle.remove()
        joined = [torch.cat([t.flatten(0, -2) for t in column]) for column in zip(*outs, strict=True)]
        return joined, {name: torch.cat(parts) for name, parts in taps.items()}

    def _call(self, tower: nn.Module, pixels: torch.Tensor, grid: list[int]) -> Any:
        """One clip in the shape that the tower's class takes: Tower.pixels."""
        p = self.vit.spec.patch
        kind = find_tower({"model_type": tower.config.model_type}).pixels  # type: ignore[union-attr]
        if kind == "images":
            image = rearrange(pixels, "(h w) (c p q) -> 1 c (h p) (w q)", h=grid[1], c=p.channels, p=p.size)
            resizes = "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters  # not by itself
            resized = {"interpolate_pos_encoding": True} if resizes else {}
            return tower(image, **resized)
        if kind == "patches":
            pixels = pixels.view(-1, p.channels, p.size, p.size)
        elif kind == "batch":
            pixels = pixels.view(1, -1, p.channels, p.size, p.size)
        return tower(pixels, grid_thw=torch.tensor([grid], device=pixels.device))

    def _last(self) -> str:
        """The step that writes last_hidden_state."""
        plan = self.vit.plan()
        return next(step.name for step in reversed(plan.steps) if plan.outputs[0] in step.writes)

    def _tap(self, tower: nn.Module, step: str, taps: dict[str, list[torch.Tensor]]) -> Any:
        """A hook that keeps what `step` computes, or None where Hugging Face has no such tensor."""
        spec = self.vit.spec
        names = find_tower({"model_type": tower.config.model_type}).layouts[0].names  # type: ignore[union-attr]
        head, _, kind = step.rpartition(".")
        place, _, number = head.partition(".")
        part, side = _TAPS.get(kind if place in ("", "block") else f"{place}.{kind}", ("", ""))
        i = int(number or 0) + (place == "block" and kind == "fc2")
        if step == f"block.{spec.depth - 1}.fc2":
            part, i = "final_norm" if spec.final_norm else "merger.norm", 0
        elif step == "patch_embed" and spec.patch.norm:
            part = "patch_norm"
        elif step == "merger.fc2" and spec.attention.windows:
            return None  # Hugging Face restores the order of windows in a step of its own
        if part not in names:
            return None
        found = names[part]
        name = found if isinstance(found, str) else found[0]
        modules = dict(tower.named_modules())
        module = next(m for path, m in modules.items() if path.endswith(name.format(i=i)))

        def keep(tensor: torch.Tensor) -> None:
            taps.setdefault(step, []).append(tensor.detach().flatten(0, -2))

        if side == "input":
            return module.register_forward_pre_hook(lambda _, args: keep(args[0]))
        return module.register_forward_hook(lambda _, args, out: keep(out))

    def outputs(self) -> list[Compared]:
        """The whole call: every output of the encoder."""
        out = self.vit(self.pixels, self.grid)
        pooled = [] if out.pooler_output is None else [out.pooler_output.flatten(0, -2)]
        ours = [out.last_hidden_state, *pooled, *out.deepstack_features]
        deepstack = (f"deepstack.{k}" for k in range(len(out.deepstack_features)))
        names = ["last_hidden_state", *("pooler_output" for _ in pooled), *deepstack]
        return [
            Compared(name, relative(a, b), relative(c, b))
            for name, a, b, c in zip(names, ours, self.truth, self.rounded, strict=True)
        ]

    def steps(self) -> Iterator[Compared]:
        """Every step that Hugging Face has a tensor for, in order, without graphs. Consumers stop where they like."""
        pack = items(self.vit.spec, self.grid, len(self.pixels))
        spec = self.vit.spec
        reordered = spec.patch.order == "raster" and spec.merge > 1  # we run in blocks, Hugging Face does not
        for step, buffers in run_steps(self.vit, self.pixels, pack):
            if (true := self.true_taps.get(step.name)) is not None:
                ours = buffers[step.writes[0]][: len(true), : true.shape[1]]  # without capacity and padding
                theirs = self.rounded_taps[step.name]
                if reordered and step.count in (ROWS, TILES) and step.name != "final_norm":
                    order = buffers["source"][: len(true)].long()
                    true, theirs = true[order], theirs[order]
                yield Compared(step.name, relative(ours, true), relative(theirs, true))


@torch.no_grad()
def run_steps(
    vit: FusedViT, pixels: torch.Tensor, pack: Sequence[Item]
) -> Iterator[tuple[Step, Mapping[str, torch.Tensor]]]:
    """One step after the other, as the encoder's device runs them: kernels on a GPU, the definition on a CPU."""
    plan = vit.plan()
    if vit.device.type == "cpu":
        yield from trace(plan, vit.weights, pixels, pack)
        return
    bucket = Bucket(sum(item.rows for item in pack), sum(item.segments for item in pack))
    buffers = Workspace(plan, [bucket], vit.dtype, vit.device, vit.tile).buffers(bucket)
    integers = torch.tensor(table(pack, vit.tile), dtype=torch.int32)
    buffers["table"][: len(integers)].copy_(integers)
    buffers["pixels"][: len(pixels), : pixels.shape[1]].copy_(pixels)
    for step in plan.steps:
        with torch.cuda.device(vit.device):
            launch_step(step, vit.weights, buffers, vit.tile)
        yield step, buffers
