"""Progress: what `fused-vit embed` shows while it runs, on however many devices."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .archive import State


class EmbedProgress:
    """A bar over all shards of this command: images, how many a second, and how much of the time devices encoded."""

    def __init__(self) -> None:
        said = TextColumn("{task.fields[rate]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), said, TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True))
        self.task = self.bar.add_task("embedding", total=None, rate="")
        self.states: dict[int, State] = {}

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
        self.bar.update(self.task, total=total, completed=ready, rate=f"{rate:.1f} images/s, encoding {busy:.0%}")
