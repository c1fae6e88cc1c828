"""Parity: a FusedViT beside the Hugging Face tower of the same checkpoint, whole and step by step.

The bound is Hugging Face's own error: twice what its tower loses in the encoder's dtype, against itself in fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .buckets import Bucket
from .encoder import FusedViT
from .errors import CheckpointError
from .executor import launch_step, trace
from .packing import Item, items, table
from .plan import Step
from .towers import find_tower, parse_config
from .weights.checkpoint import Checkpoint
from .workspace import Workspace

FLOOR = 1e-5  # relative error that summing in another order may cost in fp32
# Where Hugging Face's tower holds what a step writes: (part of the tower, its input or its output)
_TAPS = {
    "patch_embed": ("block.norm1", "input"),
    "attention": ("block.proj", "input"),
    "proj": ("block.norm2", "input"),
    "fc1": ("block.fc2", "input"),
    "fc2": ("block.norm1", "input"),  # of the next block
    "deepstack.fc1": ("deepstack.fc2", "input"),
    "deepstack.fc2": ("deepstack.fc2", "output"),
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
    tensors = checkpoint.tower(row.prefixes, row.expected(spec))
    cls: Any = next((c for name in row.hf_classes if (c := getattr(transformers, name, None))), None)
    if cls is None:
        raise ImportError(f"transformers {transformers.__version__} has no {' or '.join(row.hf_classes)}: upgrade it")
    config = cls.config_class(**checkpoint.config.get("vision_config", checkpoint.config))
    config._attn_implementation = "sdpa"
    tower: nn.Module = cls(config).float().eval().requires_grad_(False)
    missing, unexpected = tower.load_state_dict({name: tensors[name] for name in tensors}, strict=False)
    if missing or unexpected:
        raise CheckpointError(f"transformers' tower does not take the weights: {[*missing, *unexpected][:5]}")
    return tower.to(device)


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
        """The tower's outputs in the plan's order, where it returns them, and what it holds at every tapped step."""
        taps: dict[str, torch.Tensor] = {}
        handles = [self._tap(tower, step.name, taps) for step in self.vit.plan().steps]
        try:
            with exact_fp32():
                out = tower(pixels, grid_thw=torch.tensor(self.grid, device=pixels.device))
        finally:
            for handle in handles:
                if handle is not None:
                    handle.remove()
        if isinstance(out, tuple):  # transformers 4.57: (pooled, deepstack features)
            last = taps[self._last_block()]
            return [last, out[0], *out[1]], taps
        return [out.last_hidden_state, out.pooler_output, *(out.deepstack_features or [])], taps

    def _last_block(self) -> str:
        return f"block.{self.vit.spec.depth - 1}.fc2"

    def _tap(self, tower: nn.Module, step: str, taps: dict[str, torch.Tensor]) -> Any:
        """A hook that keeps what `step` computes, or None where Hugging Face has no such tensor."""
        head, _, kind = step.rpartition(".")
        place, _, number = head.partition(".")
        found = _TAPS.get(kind if place in ("", "block") else f"{place}.{kind}")
        if found is None:
            return None
        part, side = found
        i = int(number or 0) + (place == "block" and kind == "fc2")
        if step == self._last_block():
            part, i = "merger.norm", 0
        names = find_tower({"model_type": tower.config.model_type}).names  # type: ignore[union-attr]
        module = tower.get_submodule(names[part].format(i=i))

        def keep(tensor: torch.Tensor) -> None:
            taps[step] = tensor.detach().flatten(0, -2)

        if side == "input":
            return module.register_forward_pre_hook(lambda _, args: keep(args[0]))
        return module.register_forward_hook(lambda _, args, out: keep(out))

    def outputs(self) -> list[Compared]:
        """The whole call: every output of the encoder."""
        out = self.vit(self.pixels, self.grid)
        ours = [out.last_hidden_state, out.pooler_output, *out.deepstack_features]
        names = ["last_hidden_state", "pooler_output", *(f"deepstack.{k}" for k in range(len(ours) - 2))]
        return [
            Compared(name, relative(a, b), relative(c, b))
            for name, a, b, c in zip(names, ours, self.truth, self.rounded, strict=True)
        ]

    def steps(self) -> Iterator[Compared]:
        """Every step that Hugging Face has a tensor for, in order, without graphs. Consumers stop where they like."""
        pack = items(self.vit.spec, self.grid, len(self.pixels))
        for step, buffers in run_steps(self.vit, self.pixels, pack):
            if (true := self.true_taps.get(step.name)) is not None:
                ours = buffers[step.writes[0]][: len(true), : true.shape[1]]  # without capacity and padding
                yield Compared(step.name, relative(ours, true), relative(self.rounded_taps[step.name], true))


@torch.no_grad()
def run_steps(
    vit: FusedViT, pixels: torch.Tensor, pack: Sequence[Item]
) -> Iterator[tuple[Step, Mapping[str, torch.Tensor]]]:
    """One step after the other, as the encoder's device runs them: kernels on a GPU, the definition on a CPU."""
    plan = vit.plan()
    if vit.device.type == "cpu":
        yield from trace(plan, vit.weights, pixels, pack)
        return
    bucket = Bucket(len(pixels), sum(item.segments for item in pack))
    buffers = Workspace(plan, bucket, vit.dtype, vit.device, vit.tile).buffers(bucket)
    integers = torch.tensor(table(pack, vit.spec.merger.size, vit.tile), dtype=torch.int32)
    buffers["table"][: len(integers)].copy_(integers)
    buffers["pixels"][: len(pixels)].copy_(pixels)
    for step in plan.steps:
        with torch.cuda.device(vit.device):
            launch_step(step, vit.weights, buffers, vit.tile)
        yield step, buffers
