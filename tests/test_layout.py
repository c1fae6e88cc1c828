"""The tree as it is shipped: fused_vit.kernels and fused_vit.weights are the only names, from a path or a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKED = ("kernels", "weights")


def python(code: str, *paths: Path) -> str:
    """Output of a fresh interpreter that finds modules in `paths`, from a folder that holds none."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", LINKED)
def test_linked_folders_are_no_packages(name: str) -> None:
    link = ROOT / "fused_vit" / name
    assert link.is_symlink() and os.readlink(link) == f"../{name}"
    assert (ROOT / name).is_dir() and not list((ROOT / name).rglob("__init__.py"))


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs a git checkout")
@pytest.mark.parametrize("name", LINKED)
def test_git_stores_links(name: str) -> None:
    listing = subprocess.run(
        ["git", "ls-files", "--stage", f"fused_vit/{name}"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert listing.startswith("120000 ") and len(listing.splitlines()) == 1, listing


def test_names_import_from_a_plain_path() -> None:
    code = (
        "import fused_vit as f, fused_vit.kernels.ops, fused_vit.weights.checkpoint as c; print(f.__file__, c.__name__)"
    )
    assert python(code, ROOT) == f"{ROOT}/fused_vit/__init__.py fused_vit.weights.checkpoint"


def test_another_package_called_kernels_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    code = "import kernels, fused_vit.kernels.ops; print(kernels.__file__)"
    assert python(code, ROOT, tmp_path) == f"{tmp_path}/kernels/__init__.py"


def test_importing_is_light() -> None:
    heavy = ("triton", "transformers", "torch")
    code = f"import sys, fused_vit; print([m for m in {heavy} if m in sys.modules])"
    assert python(code, ROOT) == "[]"
    code = """
import sys, torch, fused_vit, fused_vit.cli
from fused_vit import FusedViT, VisionOutput, load
print([m for m in ("triton", "transformers") if m in sys.modules], torch.cuda.is_initialized())
"""
    assert python(code, ROOT) == "[] False"


def test_importing_leaves_a_gpu_alone() -> None:
    """Where torch says that there is one. (On a real one: tests/gpu/test_lifecycle_gpu.py.)"""
    code = """
import pkgutil, torch
def touched(*about): raise SystemExit("CUDA was touched")
torch.cuda.is_available, torch.cuda._lazy_init, torch.cuda.current_device = lambda: True, touched, touched
import fused_vit, fused_vit.adapters.hf, fused_vit.cli, fused_vit.kernels.ops, fused_vit.metrics, fused_vit.vllm
for module in pkgutil.iter_modules(fused_vit.__path__):
    __import__(f"fused_vit.{module.name}")
print("no")
"""
    assert python(code, ROOT) == "no"


def test_every_public_name_resolves() -> None:
    code = "import fused_vit; print([n for n in fused_vit.__all__ if getattr(fused_vit, n, None) is None])"
    assert python(code, ROOT) == "[]"


def test_a_wheel_holds_everything_once(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("fused_vit", *LINKED, "tests", "bench"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = ["pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), "."]
    done = subprocess.run([sys.executable, "-m", *build], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    sources = {f"fused_vit/{p.relative_to(ROOT / 'fused_vit')}" for p in (ROOT / "fused_vit").rglob("*.py")}
    sources |= {f"fused_vit/{p.relative_to(ROOT)}" for name in LINKED for p in (ROOT / name).rglob("*.py")}
    sources = {name for name in sources if "__pycache__" not in name}
    assert sources <= names and "fused_vit/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {"fused_vit", f"fused_vit-{version()}.dist-info"}
    code = "import fused_vit.kernels.ops, fused_vit.weights.checkpoint as c; print(c.__file__)"
    assert python(code, tmp_path / "site").startswith(str(tmp_path / "site"))


def version() -> str:
    import tomllib

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert python("import fused_vit; print(fused_vit.__version__)", ROOT) == declared
    return str(declared)
