"""The same call gives the same bits: again and again, and in processes that share nothing but the machine."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tests.gpu.towers import digest, done, encoder, flat, pixels_of, python, same

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GRID = [[1, 34, 60], [4, 10, 6], [1, 16, 16], [1, 2, 2], [6, 14, 22]]


def test_a_whole_tower_repeats_its_bits(record_property: Any) -> None:
    """27 blocks, with other calls' rows in the workspace in between. Fails where two warps race for a buffer."""
    repeats = int(os.environ.get("REPEATS", "250"))
    vit = encoder("27 blocks", buckets=[(256, 16), (6144, 64)]).warmup()
    pixels, other = pixels_of(vit, GRID), pixels_of(vit, [[1, 16, 16]], seed=1)
    first, different = flat(vit(pixels, GRID)), 0
    for i in range(repeats):
        if i % 3 == 0:
            vit(other, [[1, 16, 16]])
        different += not same(flat(vit(pixels, GRID)), first)
    record_property("repeats", repeats)
    record_property("different", different)
    assert different == 0 and all(torch.isfinite(t).all() for t in first)


def test_processes_agree() -> None:
    """Two fresh ones and this one. Fails where something depends on an address, a hash or what ran before."""
    code = "from tests.gpu.towers import digest; print(digest())"
    fresh = [python(code, PYTHONHASHSEED=seed) for seed in ("1", "2")]
    here = digest()
    assert [done(process).split()[-1] for process in fresh] == [here, here]
