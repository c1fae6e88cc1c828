"""Every kernel compiles for sm_80, sm_90 and sm_100 within the committed table: no spills, on the tensor cores."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
import torch
import triton

from fused_vit.kernels import config
from tests.kernels import resources

EXPECTED: dict[str, dict[str, int]] = json.loads(resources.TABLE.read_text())
PREPARING_STACK = 16  # bytes that the preparing warps of a Gluon matmul may spill, at 40 registers


@pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="the table is triton 3.6's compiler's")
@pytest.mark.parametrize("arch", resources.ARCHES)
def test_resources_stay_within_the_table(arch: int) -> None:
    worse: dict[str, list[str]] = defaultdict(list)
    keys = set()
    for key, target, launch in resources.cases():
        if target != arch:
            continue
        keys.add(key)
        kernel = resources.compiled(launch, arch)
        got, table = resources.resources(kernel, arch), EXPECTED[key]
        op = key.split()[3]
        for name in ("registers", "stack", "shared"):
            if got[name] > table[name]:
                worse[key].append(f"{name} {got[name]}, table {table[name]}")
        gluon = launch.kernel.fn.__name__ == "hopper_matmul_kernel"
        if got["stack"] > (PREPARING_STACK if gluon else 0):
            worse[key].append(f"spills: {got['stack']} bytes of stack")
        if got["shared"] > resources.SHARED_LIMIT[arch]:
            worse[key].append(f"shared memory {got['shared']} is more than the multiprocessor has")
        if op not in resources.PLAIN and not got["tensor_core"]:
            worse[key].append(f"no {resources.TENSOR_CORE[arch]} in the PTX")
        if reused := resources.reused_barriers(kernel):
            worse[key].append(f"data over the barriers at {sorted(reused)}")
    assert not worse, dict(worse)
    assert keys == {key for key in EXPECTED if key.startswith(f"sm_{arch} ")}, "run python -m tests.kernels.resources"


@pytest.mark.parametrize("arch", resources.ARCHES)
@pytest.mark.parametrize(
    ("tower", "step"), [("GLM-5.3-Flash", "linear fc1"), ("8B", "linear merger.fc1")], ids=["clamp", "gelu"]
)
def test_a_nan_stays_one(tower: str, step: str, arch: int) -> None:
    """Triton's interpreter cannot tell: there it does, however the minimum is asked for."""
    launch = next(launch for launch in resources.launches(tower, 8192, arch) if launch.label.endswith(step))
    ptx = resources.compiled(launch, arch).asm["ptx"]
    assert "min.NaN.f32" in ptx and "min.f32" not in ptx
    assert "max.NaN.f32" in ptx or tower == "8B"


def test_without_gluon_hopper_runs_the_portable_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.attention_config(72, torch.bfloat16, 90).gluon == config.has_gluon()
    assert (config.hopper_config("qkv", 4096, 3456, 1152, torch.bfloat16, 90, 132) is not None) == config.has_gluon()
    monkeypatch.setattr(config, "has_gluon", lambda: False)
    assert config.hopper_config("qkv", 4096, 3456, 1152, torch.bfloat16, 90, 132) is None
    assert not any(config.attention_config(d, torch.float16, 90).gluon for d in (64, 72, 80, 88, 96, 128))
    assert not any(config.attention_config(72, torch.bfloat16, arch).gluon for arch in (80, 86, 89, 100, 120))


@pytest.mark.skipif(not config.has_gluon(), reason="this triton has another Gluon")
@pytest.mark.parametrize(
    ("op", "rows", "columns", "depth", "tile"),
    [
        ("residual", 64, 1152, 4352, (64, 64)),
        ("residual", 896, 1152, 1152, (128, 64)),
        ("residual", 1024, 1152, 4352, (64, 192)),
        ("residual", 3072, 1152, 4352, (256, 128)),
        ("residual", 4096, 1152, 4352, (192, 192)),
        ("residual", 7168, 1152, 4352, (256, 128)),
        ("residual", 8192, 1152, 4352, (192, 192)),
        ("residual", 7168, 1152, 1152, (128, 128)),
        ("residual", 16384, 1152, 4352, (192, 192)),
        ("qkv", 64, 3456, 1152, (64, 64)),
        ("qkv", 256, 3456, 1152, (128, 64)),
        ("qkv", 896, 3456, 1152, (128, 192)),
        ("qkv", 1024, 3456, 1152, (128, 128)),
        ("linear", 256, 4352, 1152, (128, 128)),
        ("linear", 224, 4608, 4608, (128, 128)),
        ("linear", 1024, 4608, 4608, (192, 128)),
        ("linear", 1792, 4608, 4608, (256, 128)),
        ("linear", 14336, 4096, 1024, (128, 128)),
        ("linear", 768, 4096, 4608, (192, 128)),
    ],
)
def test_the_form_whose_rounds_are_done_first_is_chosen(
    op: str, rows: int, columns: int, depth: int, tile: tuple[int, int]
) -> None:
    """By the times of config.py on 132 multiprocessors: steps of the 8B tower, and InternViT's fc1."""
    chosen = config.hopper_config(op, rows, columns, depth, torch.bfloat16, 90, 132)
    assert chosen is not None and (chosen.block_m, chosen.block_n) == tile


@pytest.mark.parametrize("tower", ["8B", "Qwen2.5-VL-7B", "GLM-4.1V", "Kimi-K2.5", "InternViT"])
def test_a_bucket_may_have_any_number_of_rows(tower: str) -> None:
    """Launchers take buckets that hold no whole number of merged rows, on every architecture."""
    assert all(list(resources.launches(tower, 4097, arch)) for arch in resources.ARCHES)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("tower", ["8B", "Qwen2.5-VL-7B", "GLM-4.1V", "GLM-5.3-Flash", "Kimi-K2.5"])
def test_launches_touch_nothing_but_workspace_and_weights(tower: str, arch: int) -> None:
    """A temporary tensor of a launcher would be freed, and its memory reused, while a captured graph still reads it."""
    for tokens in (258, 4096):
        owned, launches = resources.owned_launches(tower, tokens, arch)
        for launch in launches:
            strays = [t.shape for t in resources.tensors_of(launch.arguments) if resources.storage(t) not in owned]
            assert not strays, f"{launch.label}: {strays}"
