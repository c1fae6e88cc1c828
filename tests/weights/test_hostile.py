"""Hostile checkpoints, each opened in a process that watches itself (tests.weights.hostile): one clear error, nothing
opened outside the folder, nothing unpickled, no tensor read, little memory and time. FLIPS=10000 is the full length.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.weights.hostile import CASES, PROCESSORS, VIDEO_PROCESSORS, Case

ROOT = Path(__file__).parents[2]
SECONDS, MIB = 10.0, 256.0  # of one load; a case takes milliseconds, its machine may be busy
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="opens are watched by Linux's inotify")


def report(*arguments: str) -> dict[str, Any]:
    """What the process says; one that crashed or hung fails here."""
    command = [sys.executable, "-m", "tests.weights.hostile", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=3600, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    whole: dict[str, Any] = json.loads(done.stdout)
    return whole


@pytest.fixture(scope="module")
def crafted() -> dict[str, Any]:
    return report("crafted")


@pytest.fixture(scope="module")
def processors() -> dict[str, Any]:
    pytest.importorskip("transformers")
    pytest.importorskip("PIL.Image")
    return report("processors")


@pytest.fixture(scope="module")
def videos() -> dict[str, Any]:
    pytest.importorskip("transformers")
    return report("videos")


@pytest.mark.parametrize("name", CASES)
def test_a_crafted_checkpoint_is_one_clear_error(crafted: dict[str, Any], name: str) -> None:
    check(CASES[name], crafted[name])


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_crafted_image_processor_is_one_clear_error(processors: dict[str, Any], name: str) -> None:
    check(PROCESSORS[name], processors[name])


@pytest.mark.parametrize("name", VIDEO_PROCESSORS)
def test_a_crafted_video_processor_is_one_clear_error(videos: dict[str, Any], name: str) -> None:
    check(VIDEO_PROCESSORS[name], videos[name])


def check(case: Case, row: dict[str, Any]) -> None:
    assert row["error"] == case.error.__name__, row
    assert all(part in row["message"] for part in case.says), row["message"]
    assert len(row["message"]) < 5000
    assert row["tensors_read"] == case.reads, "read tensors of a checkpoint that it refused"
    assert not row["outside"] and not row["opened"] and not row["forbidden"] and not row["exploited"], row
    assert row["seconds"] < SECONDS and row["grown_mib"] < MIB, row


def test_there_are_at_least_forty() -> None:
    assert len(CASES) >= 40


def test_flipped_bytes_are_refused_or_harmless(record_property: Any) -> None:
    """No other exception, no other shapes or numbers, nothing opened outside; a flip in the data changes one number."""
    count = int(os.environ.get("FLIPS", "500"))
    got = report("flips", str(count))
    for outcome, times in got["outcomes"].items():
        record_property(outcome, times)
    assert got["wrong"] == []
    assert sum(got["outcomes"].values()) == count
    assert got["slowest_seconds"] < SECONDS and got["grown_mib"] < MIB, got
    assert {"shard data: loads, one number differs", "shard header: CheckpointError"} <= set(got["outcomes"]), got
