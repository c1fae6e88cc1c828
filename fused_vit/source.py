"""Source: where a tower's weights come from, part by part: a checkpoint, or a live Hugging Face module."""

from __future__ import annotations

import math

import torch

from .layouts import choose_layout, parts
from .spec import PoolSpec, TowerSpec
from .towers import Tower
from .weights.checkpoint import Checkpoint
from .weights.pack import Read, pack_tower
from .weights.read import check_module, reader


def read_tower(checkpoint: Checkpoint, tower: Tower, spec: TowerSpec) -> tuple[Read, torch.dtype]:
    """What reads a checkpoint's tower by part, and the dtype of its weights. Raises CheckpointError before reading."""
    layout = choose_layout(tower.layouts, spec, checkpoint.files)
    tensors = checkpoint.tower(layout.prefixes, layout.expected(spec), layout.unused)
    stored = tensors[layout.names_of("patch_embed.weight")[0]].dtype
    read = reader(layout, spec, tensors)
    if not (isinstance(spec.merger, PoolSpec) and spec.merger.projector and tower.projector):
        return read, stored
    behind = tower.projector.layout
    read_behind = reader(behind, spec, checkpoint.tower(behind.prefixes, behind.expected(spec)))
    return lambda part, i: (read_behind if behind.has(part) else read)(part, i), stored


def read_module(module: torch.nn.Module, tower: Tower, spec: TowerSpec) -> Read:
    """What reads a live module's tower by part. Raises SpecError with the tensors that are not plain ones."""
    state = {name.replace("patch_embed.linear_proj", "patch_embed.proj"): t for name, t in module.state_dict().items()}
    layout = choose_layout(tower.layouts, spec, state)
    expected = layout.expected(spec)
    prefix = max(layout.prefixes, key=lambda prefix: sum(prefix + name in state for name in expected))
    tensors = {name: state[prefix + name] for name in expected if prefix + name in state}
    check_module(type(module).__name__, expected, tensors)
    return reader(layout, spec, tensors)


def pack(spec: TowerSpec, read: Read, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """What the plan's steps read. Raises torch.OutOfMemoryError saying how much the whole tower takes."""
    try:
        return pack_tower(spec, read, dtype=dtype, device=device)
    except torch.OutOfMemoryError as error:
        size = sum(math.prod(part.shape) for part in parts(spec)) * dtype.itemsize
        raise torch.OutOfMemoryError(
            f"the tower's weights take about {size} bytes of {device}, and while it is packed one of them in fp32: "
            f"free some, or load a smaller tower ({error})"
        ) from error
