"""Run an archive again and again, killing it with SIGKILL at one exact point each time: python -m tests.killed.

A process of its own, which imports once and forks: torch runs on one thread here, so a fork is sound.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fused_vit import archive, shards
from fused_vit.embedding import Embedder


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but the call after so many is the process's end."""
    left = [calls]

    def counted(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        return die() if left[0] < 0 else function(*arguments, **options)

    return counted


def half_a_file(save: Callable[..., None]) -> Callable[..., None]:
    def halved(tensors: Any, path: Path, metadata: Any) -> None:
        if "part-00000-000001" in path.name:
            path.write_bytes(b"half a shard")
            die()
        save(tensors, path, metadata)

    return halved


POINTS: dict[str, Callable[[], None]] = {  # what is broken in a run that will not survive it
    "before the first image": lambda: setattr(Embedder, "run", die),
    "after five batches": lambda: setattr(Embedder, "_encode", after(5, Embedder._encode)),
    "in the middle of a shard": lambda: setattr(shards, "save_file", half_a_file(shards.save_file)),
    "before a rename": lambda: setattr(shards.os, "replace", after(1, os.replace)),  # type: ignore[attr-defined]
    "after a rename": lambda: setattr(shards, "_flush", after(1, shards._flush)),
    "before the manifest": lambda: setattr(shards.os, "link", die),  # type: ignore[attr-defined]
    "before the report": lambda: setattr(shards.Folder, "report", die),
}


def forked(work: Callable[[], None]) -> int:
    """What became of a child that does this: its exit code, or less than 0 for the signal that ended it."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    photographs, checkpoint, output = sys.argv[1:]
    torch.set_num_threads(1)

    def job(name: str) -> archive.Job:
        return archive.Job(
            (photographs,), checkpoint, Path(output, name), kind="safetensors", workers=0, device="cpu",
            batch_tokens=128, shard_images=7,
        )  # fmt: skip

    def run(name: str) -> None:
        archive.run(job(name), lambda state: None)

    def idle(name: str) -> None:
        Embedder._encode = Embedder.run = die  # type: ignore[assignment,method-assign]
        run(name)

    run("imports what a run needs")
    found = {}
    for name, break_it in POINTS.items():

        def killed(name: str = name, break_it: Callable[[], None] = break_it) -> None:
            break_it()
            run(name)

        codes = [forked(killed)]
        left = sorted(path.name for path in Path(output, name).glob("part-*"))
        codes.append(forked(lambda name=name: run(name)))  # type: ignore[misc]
        whole = {str(path): path.stat().st_mtime_ns for path in Path(output, name).iterdir() if "lock" not in path.name}
        codes.append(forked(lambda name=name: idle(name)))  # type: ignore[misc]
        again = {str(path): path.stat().st_mtime_ns for path in Path(output, name).iterdir() if "lock" not in path.name}
        found[name] = {"codes": codes, "left": left, "third run did nothing": whole == again}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
