"""Towers of real widths and few blocks, without transformers: what tests of a whole encoder on a GPU call and compare.

`python -m tests.gpu.towers` prints the digest of one tower's outputs, for a test to compare processes by.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fused_vit import FusedViT
from fused_vit.layouts import parts
from fused_vit.output import VisionOutput
from fused_vit.spec import TowerSpec
from fused_vit.towers import parse_config
from fused_vit.weights.pack import pack_tower
from tests.kernels.resources import TOWERS

ROOT = Path(__file__).parents[2]
DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
Grid = Sequence[Sequence[int]]
FIELDS: dict[str, dict[str, Any]] = {
    "heads of 72": TOWERS["8B"] | {"depth": 2},
    "gated, in windows, heads of 80": TOWERS["Qwen2.5-VL-7B"],
    "whole clips, pooled": TOWERS["Kimi-K2.5"] | {"vt_num_hidden_layers": 2},
    "class token, heads of 64": TOWERS["InternViT"] | {"num_hidden_layers": 2},
    "normed heads of 64, clamped": TOWERS["GLM-5.3-Flash"] | {"depth": 2},
    "27 blocks": TOWERS["8B"] | {"depth": 27, "deepstack_visual_indexes": [8, 16, 24]},
}
GRID = [[1, 16, 16], [2, 10, 14], [1, 34, 26]]


def spec_of(name: str) -> TowerSpec:
    fields = FIELDS[name]
    return parse_config(fields, projector="text_config" in fields)


def random_weights(spec: TowerSpec, dtype: torch.dtype, device: torch.device | str = DEVICE) -> dict[str, torch.Tensor]:
    """Seeded weights of a spec, with norms that are no identity."""
    generator = torch.Generator(device=device).manual_seed(0)
    source = {}
    for p in parts(spec):
        part, i, shape = p.name, p.block, p.shape
        value = torch.randn(shape, generator=generator, device=device)
        fan = shape[-1] if part.endswith("fc1.weight") else max(1, value[0].numel())
        gamma = part.endswith("weight") and len(shape) == 1
        source[part, i] = 1 + 0.1 * value if gamma else value * (fan**-0.5 if len(shape) > 1 else 0.1)
    return pack_tower(spec, lambda part, i: source[part, i], dtype=dtype, device=device)


def encoder(
    name: str = "heads of 72", dtype: torch.dtype = torch.bfloat16, device: torch.device | str = DEVICE, **options: Any
) -> FusedViT:
    """A tower of FIELDS; the same one whenever it is asked for."""
    spec = spec_of(name)
    return FusedViT(spec, random_weights(spec, dtype, device), **options)


def pixels_of(vit: FusedViT, grid: Grid, seed: int = 0) -> torch.Tensor:
    generator, patch = torch.Generator().manual_seed(seed), vit.spec.patch
    shape = sum(t * h * w for t, h, w in grid), patch.features
    if patch.bytes:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(vit.device)
    return torch.randn(shape, generator=generator).to(vit.dtype).to(vit.device)


def flat(out: VisionOutput) -> list[torch.Tensor]:
    """Every output that the tower has."""
    found = (out.last_hidden_state, out.pooler_output, *out.deepstack_features)
    return [t for t in found if t is not None]


def same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    """And without a NaN, which is equal to nothing."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def digest() -> str:
    """Of every bit of one call's outputs."""
    vit = encoder(buckets=[(2304, 32)])
    found = hashlib.blake2b(digest_size=16)
    for tensor in flat(vit(pixels_of(vit, GRID), GRID)):
        found.update(tensor.cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def python(code: str, seconds: float = 240, **environment: str) -> subprocess.Popen[str]:
    """A process of its own that runs the code from the root of the repository; done() waits for it."""
    command = [sys.executable, "-c", code]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(["timeout", "-k", "5", str(seconds), *command], cwd=ROOT, env=settings, **pipes)


def done(process: subprocess.Popen[str]) -> str:
    """What it printed. Fails where it did not end well, in time."""
    out, errors = process.communicate()
    assert process.returncode == 0, f"exit code {process.returncode}\n{out}\n{errors[-4000:]}"
    return out.strip()


if __name__ == "__main__":
    print(digest())
