"""Source: what a checkpoint, or a live Hugging Face module, gives: a tower's weights by part, and its processors'
fields.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError, FusedVitError, SpecError
from .layouts import Layout, Part, choose_layout, parts
from .spec import PoolSpec, TowerSpec
from .towers import Tower
from .weights.checkpoint import Checkpoint, read_beside
from .weights.pack import Read, pack_tower
from .weights.read import Tensors, check_module, reader

PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
# Where transformers looks for a processor's fields, beside the object of its name in PROCESSOR.
PROCESSORS = {"image_processor": (PREPROCESSOR,), "video_processor": (f"video_{PREPROCESSOR}", PREPROCESSOR)}
LISTED = 8  # tensors that an error names


class Source:
    """Reads a tower by part, and knows by what names its tensors came.

    error: what to raise where they are at fault; layouts: what each holds, and in which tensors; the last that has a
    part gives it.
    """

    def __init__(
        self, name: str, error: type[FusedVitError], spec: TowerSpec, *layouts: tuple[Layout, Tensors]
    ) -> None:
        self.name, self.error = name, error
        self._rows = [(layout, tensors, reader(layout, spec, tensors)) for layout, tensors in reversed(layouts)]

    def __call__(self, part: str, i: int) -> torch.Tensor:
        return next(read for layout, _, read in self._rows if layout.has(part))(part, i)

    def pieces(self, part: Part) -> dict[str, torch.Tensor]:
        """A part's tensors as they came, by name."""
        layout, tensors = next((layout, tensors) for layout, tensors, _ in self._rows if layout.has(part.name))
        return {name: tensors[name] for name in layout.names_of(part.name, part.block)}


def read_tower(checkpoint: Checkpoint, tower: Tower, spec: TowerSpec) -> tuple[Source, torch.dtype]:
    """What reads a checkpoint's tower by part, and the dtype of its weights. Raises CheckpointError before reading."""
    layout = choose_layout(tower.layouts, spec, checkpoint.files)
    tensors = checkpoint.tower(layout.prefixes, layout.expected(spec), layout.unused)
    layouts: list[tuple[Layout, Tensors]] = [(layout, tensors)]
    if isinstance(spec.merger, PoolSpec) and spec.merger.projector and tower.projector:
        behind = tower.projector.layout
        layouts.append((behind, checkpoint.tower(behind.prefixes, behind.expected(spec))))
    stored = tensors.infos[layout.names_of("patch_embed.weight")[0]].dtype
    return Source(checkpoint.source, CheckpointError, spec, *layouts), stored


def read_module(module: torch.nn.Module, tower: Tower, spec: TowerSpec) -> Source:
    """What reads a live module's tower by part. Raises SpecError with the tensors that are not plain ones."""
    state = {name.replace("patch_embed.linear_proj", "patch_embed.proj"): t for name, t in module.state_dict().items()}
    layout = choose_layout(tower.layouts, spec, state)
    expected = layout.expected(spec)
    prefix = max(layout.prefixes, key=lambda prefix: sum(prefix + name in state for name in expected))
    tensors = {name: state[prefix + name] for name in expected if prefix + name in state}
    check_module(type(module).__name__, expected, tensors)
    return Source(type(module).__name__, SpecError, spec, (layout, tensors))


def pack(spec: TowerSpec, read: Read, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """What the plan's steps read.

    Raises:
        CheckpointError: a tensor that is not finite, or is not once it is folded and rounded; of a Source, its error.
        torch.OutOfMemoryError: says how much the whole tower takes.
    """
    try:
        packed = pack_tower(spec, read, dtype=dtype, device=device)
        wrong = _not_finite(packed)
    except (RuntimeError, MemoryError) as error:
        if not _is_short_of_memory(error):
            raise
        size = sum(math.prod(part.shape) for part in parts(spec)) * dtype.itemsize
        raise torch.OutOfMemoryError(
            f"the tower's weights take about {size} bytes of {device}, and while it is packed one of them in fp32: "
            f"free some, or load a smaller tower ({error})"
        ) from error
    if wrong:
        raise _blame(spec, read, dtype, wrong)
    return packed


def _is_short_of_memory(error: Exception) -> bool:
    """torch's allocator for CPUs has no error of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _not_finite(packed: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of tensors with NaN or infinity in them. NaN is an end of any range; a GPU is waited for once, for all."""
    ends = torch.stack([end.double() for tensor in packed.values() for end in tensor.aminmax()])
    finite = ends.isfinite().view(-1, 2).all(1).tolist()
    return [name for name, good in zip(packed, finite, strict=True) if not good]


def _blame(spec: TowerSpec, read: Read, dtype: torch.dtype, packed: list[str]) -> FusedVitError:
    """The error for `packed`, which are not finite: each came that way, or its numbers are too large for the dtype."""
    name, error = (read.name, read.error) if isinstance(read, Source) else ("the tower", CheckpointError)
    came = [key for part in parts(spec) for key, tensor in _pieces(read, part) if not tensor.isfinite().all()]
    if came:
        return error(
            f"{name}: NaN or infinity in {len(came)} tensors: {_list(came)}; expected finite numbers. "
            "Take it from its first source again, or another release."
        )
    large = [key for part in parts(spec) if _packed_name(part) in packed for key, _ in _pieces(read, part)] or packed
    return error(
        f"{name}: beyond the largest number of {dtype} ({torch.finfo(dtype).max}), once folded and rounded, in "
        f"{len(large)} tensors: {_list(large)}. Give a dtype of a wider range: torch.bfloat16 or float32."
    )


def _pieces(read: Read, part: Part) -> Iterator[tuple[str, torch.Tensor]]:
    """A part's tensors by the names that they came by, or else by the part's own."""
    if isinstance(read, Source):
        yield from read.pieces(part).items()
    else:
        yield _packed_name(part), read(part.name, part.block)


def _packed_name(part: Part) -> str:
    module, _, rest = part.name.partition(".")
    return f"{module}.{part.block}.{rest}" if module in ("block", "deepstack") else part.name


def _list(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def read_processor(
    source: str | Path, part: str = "image_processor", *, revision: str | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """What a checkpoint says of a processor, and the file that says it; None where a folder says nothing.

    transformers 5 puts it into the processor's file, and prefers what it finds there; older ones have a file for it.
    Raises CheckpointError, by the checks that config.json gets.
    """
    found = read_beside(source, (PROCESSOR, *PROCESSORS[part]), revision=revision)
    if PROCESSOR in found and isinstance(fields := found[PROCESSOR][1].get(part), dict):
        return found[PROCESSOR][0], fields
    for path, whole in (found[name] for name in PROCESSORS[part] if name in found):
        nested = whole.get(part)
        return path, nested if isinstance(nested, dict) else whole
    if not Path(source).expanduser().exists():
        raise CheckpointError(
            f"{source}: no {PREPROCESSOR}. The hub lacks it, or cannot be reached and the cache lacks it: connect, or "
            "give a folder or an image processor."
        )
    return None
