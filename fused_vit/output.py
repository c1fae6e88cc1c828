"""VisionOutput: what a tower returns. With transformers 5 the model's own ModelOutput class stands in (adapters.hf)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class VisionOutput:
    """last_hidden_state [patches, width], pooler_output [merged, out] and deepstack_features, each [merged, out].

    Attributes may be assigned, as Hugging Face models do. Rows of all images are concatenated; split() cuts per image.
    """

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor
    deepstack_features: list[torch.Tensor] = field(default_factory=list)
    merged_rows: tuple[int, ...] = ()  # rows of pooler_output that each image has

    def split(self) -> list[torch.Tensor]:
        """pooler_output per image, as views."""
        return list(self.pooler_output.split(list(self.merged_rows)))

    def items(self) -> Iterator[tuple[str, object]]:
        return ((name, getattr(self, name)) for name in self.__slots__ if name != "merged_rows")

    def to_tuple(self) -> tuple[object, ...]:
        return tuple(value for _, value in self.items())

    def __getitem__(self, key: str | int) -> object:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]
