"""Every seeded bug, applied to a copy of the tree, is caught by its test: tests that cannot fail would show here.

Here a sample, one of every third; `make mutants` (MUTANTS=all) tries them all in two minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mutants.seeded import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
TREE = ("fused_vit", "kernels", "weights", "tests", "bench", "pyproject.toml")
TRIED = MUTANTS if os.environ.get("MUTANTS") == "all" else MUTANTS[::3]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the sources, links as links."""
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
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("interpreted", [False, True], ids=["host", "kernels"])
def test_without_a_bug_the_tests_pass(tree: Path, interpreted: bool) -> None:
    tests = sorted({mutant.test for mutant in TRIED if mutant.interpreted == interpreted})
    result = run(tree, tests, interpreted)
    assert result.returncode == 0, result.stdout[-2000:]


def test_every_seeded_bug_has_its_place() -> None:
    """All of them, also those that are not tried here: code moves on."""
    lost = [mutant.name for mutant in MUTANTS if (ROOT / mutant.file).read_text().count(mutant.old) != 1]
    assert not lost


@pytest.mark.parametrize("mutant", TRIED, ids=lambda mutant: mutant.name)
def test_a_seeded_bug_is_caught(tree: Path, mutant: Mutant) -> None:
    path = tree / mutant.file
    source = path.read_text()
    path.write_text(source.replace(mutant.old, mutant.new))
    try:
        result = run(tree, [mutant.test], mutant.interpreted)
    finally:
        path.write_text(source)
    assert result.returncode == 1 and " failed" in result.stdout, result.stdout[-2000:]
