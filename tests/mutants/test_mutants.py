"""Every seeded bug, applied to a copy of the tree, is caught by its test: tests that cannot fail would show here.

`make mutants` tries nothing else: two to three minutes on two cores, and one more where there is a GPU.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.mutants import child
from tests.mutants.seeded import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
TREE = ("fused_vit", "kernels", "weights", "tests", "bench", "pyproject.toml")
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


def run(tree: Path, tests: list[str], kind: str) -> tuple[int | None, str]:
    """pytest over the copy, up to the first failure: its exit status and what it said."""
    command = ["-qx", "-p", "no:cacheprovider", *tests]
    return forked(tree, command) if kind == "host" else started(tree, command, interpreted=kind == "kernels")


def forked(tree: Path, command: list[str]) -> tuple[int | None, str]:
    """In a process that has the libraries already: three seconds instead of ten for most tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(child.PRELOADED)
    output = tree / "output.txt"
    process = context.Process(target=child.test, args=(tree, ROOT, command, output))
    process.start()
    process.join(SECONDS)
    process.kill()
    process.join()
    return process.exitcode, output.read_text()


def started(tree: Path, command: list[str], interpreted: bool) -> tuple[int, str]:
    """In a process of its own, as CUDA and Triton's interpreter need it."""
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *command], cwd=tree, env=environment, text=True, timeout=SECONDS,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


def caught(status: int | None, said: str) -> bool:
    """A test failed, or CUDA ended the process: after an access out of bounds it may not get as far as a report."""
    return (status == 1 and " failed" in said) or (status != 0 and "CUDA error" in said)


def kind(mutant: Mutant) -> str:
    """Mutants of a kind have tests that can share a process: on the host, in the interpreter, or what they need."""
    return mutant.needs or ("kernels" if mutant.interpreted else "host")


def parameter(value: Any, name: str, needs: str) -> Any:
    return pytest.param(value, id=name, marks=pytest.mark.gpu if needs in NEEDS else ())


def skip_without(needs: str) -> None:
    if needs in NEEDS and not NEEDS[needs]():
        pytest.skip(f"needs {needs}")


KINDS = sorted(set(map(kind, MUTANTS)))


@pytest.mark.parametrize("chosen", [parameter(name, name, needs=name) for name in KINDS])
def test_without_a_bug_the_tests_pass(tree: Path, chosen: str) -> None:
    skip_without(chosen)
    tests = sorted({mutant.test for mutant in MUTANTS if kind(mutant) == chosen})
    status, said = run(tree, tests, chosen)
    assert status == 0, said[-2000:]


def test_every_seeded_bug_has_its_place() -> None:
    """Also those that are not tried here, and their tests: code moves on."""
    lost = [mutant.name for mutant in MUTANTS if (ROOT / mutant.file).read_text().count(mutant.old) != 1]
    for mutant in MUTANTS:
        file, _, name = mutant.test.partition("::")
        lost += [mutant.name] * (f"def {name.partition('[')[0]}(" not in (ROOT / file).read_text())
    assert not lost


@pytest.mark.parametrize("mutant", [parameter(mutant, mutant.name, mutant.needs) for mutant in MUTANTS])
def test_a_seeded_bug_is_caught(tree: Path, mutant: Mutant) -> None:
    skip_without(mutant.needs)
    path = tree / mutant.file
    source = path.read_text()
    path.write_text(source.replace(mutant.old, mutant.new))
    try:
        status, said = run(tree, [mutant.test], kind(mutant))
    finally:
        path.write_text(source)
    assert caught(status, said) and "out of memory" not in said, said[-4000:]
