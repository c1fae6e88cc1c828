"""What embeds an archive, part by part: which images share a batch, what a log gets, folders of other file systems."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_vit
from fused_vit import progress
from fused_vit.archive import State
from fused_vit.embedding import AHEAD, Embedded, Embedder
from fused_vit.preparing import Part, Prepared
from fused_vit.shards import MANIFEST, Folder
from tests.towers_hf import random_pixels, tiny_tower

SMALL, LARGE = [[1, 2, 2]], [[1, 4, 4]]  # four large ones fill a batch of 64 patches, and leave no room for a small one
BUDGET, EVERY = 64, 10


@pytest.fixture(scope="module")
def vit() -> fused_vit.FusedViT:
    return fused_vit.FusedViT.from_module(tiny_tower(seed=0), device="cpu")


def prepared(vit: fused_vit.FusedViT, numbers: range) -> Prepared:
    """Images as a worker hands them over: in one tensor. Every tenth is small."""
    grids = [SMALL if number % EVERY == 0 else LARGE for number in numbers]
    parts = [Part(number, number, grid) for number, grid in zip(numbers, grids, strict=True)]
    return Prepared(parts, torch.cat([random_pixels(grid, vit.spec.patch.features, 0) for grid in grids]), 0.0, 0.0)


def test_an_image_waits_a_few_batches_whatever_comes_after_it(vit: fused_vit.FusedViT) -> None:
    embedder = Embedder(vit, None, pool="mean", batch_tokens=BUDGET)
    arrived: dict[int, int] = {}
    waited = []

    def arriving() -> Any:
        for first in range(0, 400, EVERY):
            arrived.update(dict.fromkeys(range(first, first + EVERY), embedder.times.batches))
            yield prepared(vit, range(first, first + EVERY))

    for result in embedder.run(arriving()):
        assert isinstance(result, Embedded)
        waited.append(embedder.times.batches - arrived[result.number])
    assert len(waited) == 400 and max(waited) <= 4 * AHEAD, max(waited)


def test_what_waits_holds_no_more_memory_than_its_own(vit: fused_vit.FusedViT) -> None:
    embedder = Embedder(vit, None, pool="mean", batch_tokens=BUDGET)
    list(embedder._gather(prepared(vit, range(20))))
    assert len(embedder._take(flush=True)) == 5, "the small one that came first, and what fits"
    waiting = [one for ready in embedder._ready.values() for one in ready]
    assert len(waiting) == 15
    assert all(one.pixels.untyped_storage().nbytes() == one.pixels.nbytes for one in waiting)


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    with progress.EmbedProgress() as bar:
        bar.tell(State(0, total=8, done=3, seconds=2.0, busy=0.5))
    assert "embedding: 3/8, 1.5 images/s, encoding 50%" in capsys.readouterr().err
    monkeypatch.setattr(progress, "SECONDS", 60.0)
    with progress.EmbedProgress() as bar:
        bar.tell(State(0, total=8, done=3))
    assert "embedding:" not in capsys.readouterr().err


def test_a_file_system_without_hard_links_holds_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    for part in (0, 1):
        with Folder(tmp_path, {"encoder": "one"}, part=part, kind="safetensors"):
            assert (tmp_path / MANIFEST).is_file() and not list(tmp_path.glob("_manifest-*"))
    with pytest.raises(ValueError, match="another encoder"), Folder(tmp_path, {"encoder": "two", "checkpoint": "b"},
                                                                    part=0, kind="safetensors"):  # fmt: skip
        pass
