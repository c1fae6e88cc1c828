"""Runs tests/kernels/interpreted.py, op by op, in processes where Triton's interpreter is on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OPS = [
    "unfold or cover or taps",
    "patch_embed",
    "qkv",
    "attention or nan",
    "residual",
    "linear",
    "norm or pool",
    "a_plan",
]


@pytest.mark.parametrize("op", OPS)
def test_kernels_equal_their_definitions_in_the_interpreter(op: str) -> None:
    file = Path(__file__).with_name("interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", op, str(file)]

    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=file.parents[2], check=False)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-6000:] + run.stderr[-2000:]
