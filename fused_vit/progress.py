"""Progress: what `fused-vit embed` shows while it runs, on however many devices."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .archive import State

SECONDS = 30.0  # between lines where there is no terminal


class EmbedProgress:
    """A bar over all shards of this command: images, how many a second, and how much of the time devices encoded.

    A log, where nothing can be drawn over, gets a line of these now and then.
    """

    def __init__(self) -> None:
        said = TextColumn("{task.fields[rate]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), said, TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True))
        self.task = self.bar.add_task("embedding", total=None, rate="")
        self.states: dict[int, State] = {}
        self.next_line = time.monotonic() + SECONDS

    def __enter__(self) -> EmbedProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def tell(self, state: State) -> None:
        self.states[state.part] = state
        states = list(self.states.values())
        rate = sum(one.done / one.seconds for one in states if one.seconds)
        busy = sum(one.busy for one in states) / len(states)
        total, ready = sum(one.total for one in states), sum(one.before + one.done + one.failures for one in states)
        said = f"{rate:.1f} images/s, encoding {busy:.0%}"
        self.bar.update(self.task, total=total, completed=ready, rate=said)
        if not self.bar.console.is_terminal and time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + SECONDS
            self.bar.console.print(f"embedding: {ready}/{total}, {said}", highlight=False)
