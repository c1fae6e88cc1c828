"""VisionOutput: what a tower returns. With transformers 5 the model's own ModelOutput class stands in (adapters.hf)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class VisionOutput:
    """last_hidden_state [rows, width], pooler_output [merged, out] and deepstack_features, each [merged, out].

    Some towers have no pooler_output (None); Kimi's is [merged, patches, width]. hidden_state: the last block's output
    before the final norm, where it was asked for. Attributes may be assigned, as Hugging Face models do. Rows of all
    images are concatenated; split() cuts per image.
    """

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor | None
    deepstack_features: list[torch.Tensor] = field(default_factory=list)
    merged_rows: tuple[int, ...] = ()  # rows of pooler_output that each image has
    rows: tuple[int, ...] = ()  # rows of last_hidden_state, where they are not merged
    hidden_state: torch.Tensor | None = None

    def split(self) -> list[torch.Tensor]:
        """What a language model reads, per image, as views: pooler_output, or last_hidden_state where there is none."""
        if self.pooler_output is None:
            return list(self.last_hidden_state.split(list(self.rows)))
        return list(self.pooler_output.split(list(self.merged_rows)))

    def items(self) -> Iterator[tuple[str, object]]:
        names = ("last_hidden_state", "pooler_output", "deepstack_features")
        return ((name, getattr(self, name)) for name in names)

    def to_tuple(self) -> tuple[object, ...]:
        return tuple(value for _, value in self.items())

    def __getitem__(self, key: str | int) -> object:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]
