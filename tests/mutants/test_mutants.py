"""Every seeded bug, applied to a copy of the tree, is caught by its test: tests that cannot fail would show here.

Here a sample, one of every third that needs no GPU; `make mutants` (MUTANTS=all) tries them all: in two minutes those
without a GPU, and where there is one as many again. `MUTANTS=all pytest -m gpu tests/mutants` tries those on it alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.mutants.seeded import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
TREE = ("fused_vit", "kernels", "weights", "tests", "bench", "pyproject.toml")
TRIED = MUTANTS if os.environ.get("MUTANTS") == "all" else [mutant for mutant in MUTANTS if not mutant.needs][::3]
SECONDS = 600  # for a run of pytest: a kernel may wait for ever, and that is no way to catch a bug
NEEDS: dict[str, Callable[[], bool]] = {
    "a GPU": torch.cuda.is_available,
    "two GPUs": lambda: torch.cuda.device_count() > 1,
    "Hopper": lambda: torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9,
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the sources, links as links; each worker of pytest-xdist has its own."""
    folder = tmp_path_factory.mktemp("tree")
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    yield folder


def run(tree: Path, tests: list[str], interpreted: bool) -> subprocess.CompletedProcess[str]:
    """pytest over the copy; it stops at the first failure."""
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=SECONDS)


def caught(result: subprocess.CompletedProcess[str]) -> bool:
    """A test failed, or CUDA ended the process: after an access out of bounds it may not get as far as a report."""
    failed = result.returncode == 1 and " failed" in result.stdout
    return failed or (result.returncode != 0 and "CUDA error" in result.stdout + result.stderr)


def kind(mutant: Mutant) -> str:
    """Mutants of a kind have tests that can share a process: on the host, in the interpreter, or what they need."""
    return mutant.needs or ("kernels" if mutant.interpreted else "host")


def parameter(value: Any, name: str, needs: str) -> Any:
    return pytest.param(value, id=name, marks=pytest.mark.gpu if needs in NEEDS else ())


def skip_without(needs: str) -> None:
    if needs in NEEDS and not NEEDS[needs]():
        pytest.skip(f"needs {needs}")


KINDS = sorted(set(map(kind, TRIED)))


@pytest.mark.parametrize("chosen", [parameter(name, name, needs=name) for name in KINDS])
def test_without_a_bug_the_tests_pass(tree: Path, chosen: str) -> None:
    skip_without(chosen)
    tests = sorted({mutant.test for mutant in TRIED if kind(mutant) == chosen})
    result = run(tree, tests, interpreted=chosen == "kernels")
    assert result.returncode == 0, result.stdout[-2000:]


def test_every_seeded_bug_has_its_place() -> None:
    """All of them, also those that are not tried here, and their tests: code moves on."""
    lost = [mutant.name for mutant in MUTANTS if (ROOT / mutant.file).read_text().count(mutant.old) != 1]
    for mutant in MUTANTS:
        file, _, name = mutant.test.partition("::")
        lost += [mutant.name] * (f"def {name.partition('[')[0]}(" not in (ROOT / file).read_text())
    assert not lost


@pytest.mark.parametrize("mutant", [parameter(mutant, mutant.name, mutant.needs) for mutant in TRIED])
def test_a_seeded_bug_is_caught(tree: Path, mutant: Mutant) -> None:
    skip_without(mutant.needs)
    path = tree / mutant.file
    source = path.read_text()
    path.write_text(source.replace(mutant.old, mutant.new))
    try:
        result = run(tree, [mutant.test], mutant.interpreted)
    finally:
        path.write_text(source)
    assert caught(result) and "out of memory" not in result.stdout, result.stdout[-2000:] + result.stderr[-2000:]
