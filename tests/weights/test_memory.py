"""Too little memory to load, for real: processes under a limit of the system's, which load or say what it takes."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from fused_vit.towers import find_tower, parse_config
from tests.weights.hostile import CONFIG, PREFIX, VISION

ROOT = Path(__file__).parents[2]
GIB = 2**30
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA counts maps on Linux alone")
LOAD = """
import resource, sys, torch, fused_vit
torch.set_num_threads(1)  # a thread that cannot be started ends the process
torch.ones(64, 64) @ torch.ones(64, 64)
limit, kind = int(sys.argv[2]), getattr(resource, sys.argv[3])
used = {"VmData": 0, "VmSize": 0} | {
    k: int(v.split()[0]) * 1024 for k, _, v in (line.partition(":") for line in open("/proc/self/status")) if "Vm" in k
}
taken = used["VmData" if kind == resource.RLIMIT_DATA else "VmSize"]
resource.setrlimit(kind, (taken + limit, taken + limit))
try:
    print("loaded", fused_vit.load(sys.argv[1], device="cpu", dtype=getattr(torch, sys.argv[4])).weight_bytes)
except torch.OutOfMemoryError as error:
    print("short", error)
"""


def sparse(folder: Path, width: int) -> int:
    """A tower of zeros that takes nothing on the disk; its bytes."""
    vision = {**VISION, "hidden_size": width, "intermediate_size": width, "depth": 4, "num_heads": width // 128}
    config = {"model_type": "qwen3_vl", "vision_config": vision}
    (folder / CONFIG).write_text(json.dumps(config))
    header, at = {}, 0
    for name, shape in find_tower(config).layouts[0].expected(parse_config(config)).items():
        size = 4
        for side in shape:
            size *= side
        header[PREFIX + name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + at)
    return at


def load(folder: Path, limit: int, kind: str, dtype: str = "float32") -> str:
    command = [sys.executable, "-c", LOAD, str(folder), str(limit), kind, dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("kind", ["RLIMIT_DATA", "RLIMIT_AS"])
def test_a_checkpoint_of_more_than_there_is_says_what_it_takes(tmp_path: Path, kind: str) -> None:
    """40 GiB declared by a file of a few KiB. The first tensor that is read does not fit."""
    size = sparse(tmp_path, 16384)
    assert size > 40 * GIB and (tmp_path / "model.safetensors").stat().st_blocks < 1000
    said = load(tmp_path, GIB // 4, kind)
    assert said.startswith("short the tower's weights take about 4"), said
    assert "of cpu" in said and "or load a smaller tower" in said


@pytest.mark.parametrize("mib", [10, 60, 110, 160])
def test_memory_that_ends_anywhere_while_packing(tmp_path: Path, mib: int) -> None:
    """Wherever it ends, in reading, folding or rounding: the same error, or a tower."""
    size = sparse(tmp_path, 1024)
    assert 150 * 2**20 < size < 250 * 2**20
    said = load(tmp_path, mib * 2**20, "RLIMIT_DATA", "bfloat16")
    assert said.startswith(("short the tower's weights take about", "loaded")), said
    assert said.startswith("short") or mib > 60, said


def test_enough_memory_loads(tmp_path: Path) -> None:
    """The limit itself lets a tower through: its weights, some tensors in fp32 beside them, and what malloc keeps."""
    size = sparse(tmp_path, 1024)
    said = load(tmp_path, 4 * size, "RLIMIT_DATA")
    assert said.startswith("loaded"), said
