"""The support matrix is what the table of towers and the measurements say, and covers every family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import support
from fused_vit.towers import TOWERS


@pytest.mark.parametrize("path", support.PAGES, ids=[path.name for path in support.PAGES])
def test_the_page_is_not_stale(path: Path) -> None:
    assert path.read_text() == support.written(path), "run python -m bench.support"


def test_every_family_is_measured_and_right() -> None:
    cpu, gpu = (json.loads(path.read_text())["families"] for path in (support.CPU, support.GPU))
    names = {tower.family for tower in TOWERS}
    assert set(cpu) == set(gpu) == names
    assert max(cpu.values()) <= 1e-5
    for family, measured in gpu.items():
        for name, row in measured["cases"].items():
            assert row["error"] <= 2 * row["hf_error"], (family, name)
