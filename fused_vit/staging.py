"""Staging: pinned memory through which the tables of calls travel to the device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

SLOTS = 16  # calls under way before the host waits for the oldest


class Staging:
    """Slots that take turns; one is written again only when the device has read it."""

    def __init__(self, numbers: int) -> None:
        self.tables = torch.empty(SLOTS, numbers, dtype=torch.int32, pin_memory=True)
        self.numbers = self.tables.numpy()
        self.sent: list[torch.cuda.Event | None] = [None] * SLOTS
        self.calls = 0

    def send(self, table: Sequence[int], target: torch.Tensor) -> None:
        """Copy a table into target [>= len(table)] on the current stream."""
        slot, count = self.calls % SLOTS, len(table)
        self.calls += 1
        event = self.sent[slot]
        if event is None:
            event = self.sent[slot] = torch.cuda.Event()
        else:
            event.synchronize()
        self.numbers[slot, :count] = table
        target[:count].copy_(self.tables[slot, :count], non_blocking=True)
        event.record()
