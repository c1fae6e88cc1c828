"""The plug-in in the vLLM that is installed here, if any, without a GPU: imports, registration and construction.

Each tower's class is called as vLLM's models do, on a CPU: the fused tower that comes of it shows what vLLM's own does,
takes all weights from vLLM's loader, and is asked by the code of vLLM's models. Everything of vLLM runs in processes
of their own, whose globals stay theirs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_vit.vllm as plugin
from fused_vit.adapters import vllm as adapter

pytest.importorskip("transformers")
from tests import families
from tests.adapters.vllm_models import MOST, ask, load, vllm_config
from tests.adapters.vllm_towers import SERVED, construct, expected, weights_of
from tests.families import Family
from tests.towers_hf import relative

ROOT = Path(__file__).parents[2]
IMPORTS = "import importlib; modules = [importlib.import_module(name) for name in plugin.TOWERS]"
BUILD = "from tests.adapters.test_vllm_installed import report; report()"
READ = (  # by vLLM's models, of the towers that have it
    "dtype", "device", "out_hidden_size", "spatial_merge_size", "merge_kernel_size", "hidden_size", "num_heads",
    "patch_size", "temporal_patch_size", "deepstack_visual_indexes",
)  # fmt: skip

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


# --- construction: what runs in a process of its own ---


def report() -> None:
    """Prints a line of JSON: what came of every family's tower, or why vLLM builds none here."""
    with ExitStack() as stack:
        try:
            stack.enter_context(engine())
        except Exception as error:  # whatever vLLM misses on this machine
            print(json.dumps(repr(error)))
            return
        adapter.DEVICES = ("cuda", "cpu")
        plugin.register()
        print(json.dumps({family.name: outcome(family) for family in SERVED}, default=str))


@contextmanager
def engine() -> Iterator[None]:
    """vLLM's globals as they are while it builds a model, on a CPU whatever the machine has."""
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
        init_distributed_environment(1, 0, f"file://{tempfile.mktemp()}", 0, "gloo")
        initialize_model_parallel()
        yield


def outcome(family: Family) -> dict[str, Any]:
    """A tower built both ways from the same weights: its class, what models read of it, the error of a call."""
    reference = families.build(family)
    config = vllm_config(family, reference.config, family.hub(reference)[0])
    plugin.disable()
    try:
        own = built(family, config)
    except Exception as error:  # whatever vLLM's tower misses on this machine
        return {"skip": repr(error)}
    plugin.enable()
    fused = built(family, config)
    if type(fused) is not adapter.FusedTower:
        return {"class": type(fused).__name__}
    for tower in (own, fused):
        load(tower, weights_of(family, reference))
    grid = family.grids["mixed"]
    pixels = families.pixels(family, reference, grid)
    features = torch.cat(ask(family, fused, pixels, grid, parallel=False)).float().flatten()
    return {
        "class": type(fused).__name__,
        "own": {name: getattr(own, name) for name in READ if hasattr(own, name)},
        "fused": {name: getattr(fused, name) for name in READ if hasattr(own, name)},
        "error": relative(features, expected(family, reference, pixels, grid).flatten()),
    }


def built(family: Family, config: Any) -> Any:
    torch.set_default_dtype(torch.bfloat16)
    try:
        return construct(family, config)
    finally:
        torch.set_default_dtype(torch.float32)


# --- and what is asserted of it ---


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    done = python(BUILD)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if isinstance(found, str):
        pytest.skip(f"vLLM builds no model here, without fused_vit: {found}")
    print(done.stdout, done.stderr)  # for a test that fails: the log says why a tower was not replaced
    return dict(found)


@pytest.mark.parametrize("family", SERVED, ids=lambda family: family.name)
def test_each_tower_is_built_loaded_and_asked(family: Family, outcomes: dict[str, Any]) -> None:
    tower = outcomes[family.name]
    if "skip" in tower:
        pytest.skip(f"vLLM's own tower cannot be built here: {tower['skip']}")
    assert tower["class"] == "FusedTower"
    assert tower["fused"] == tower["own"]
    assert tower["error"] < MOST
