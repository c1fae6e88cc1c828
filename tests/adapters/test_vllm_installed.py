"""The plug-in in the vLLM that is installed here, if any: its modules import as ever, and each tower is watched."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import fused_vit.vllm as plugin

ROOT = Path(__file__).parents[2]
IMPORTS = "import importlib; modules = [importlib.import_module(name) for name in plugin.TOWERS]"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed: make vllm runs this in an environment of its own",
)


def python(code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path, plugin.SWITCH: "1"}
    code = f"import fused_vit.vllm as plugin; {code}"
    return subprocess.run([sys.executable, "-c", code], env=env, cwd="/", capture_output=True, text=True)


@pytest.fixture(scope="module", autouse=True)
def importable() -> None:
    plain = python(IMPORTS)
    if plain.returncode:
        pytest.skip(f"vLLM's models do not import here, without fused_vit: {plain.stderr.strip().splitlines()[-1]}")


def test_every_tower_is_watched() -> None:
    missed = "[m.__name__ for m in modules if not hasattr(getattr(m, plugin.TOWERS[m.__name__]).__new__, 'fused_vit')]"
    done = python(f"plugin.register(); {IMPORTS}; print({missed})")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_vllm_finds_the_entry_point() -> None:
    if not any(found.name == "fused-vit" for found in entry_points(group="vllm.general_plugins")):
        pytest.skip("fused-vit is on the path but not installed: pip install -e .")
    code = (
        "import sys; from vllm.plugins import load_general_plugins; load_general_plugins(); "
        "print([type(f).__name__ for f in sys.meta_path if type(f).__module__ == 'fused_vit.vllm'])"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "['_Finder']"
