"""Who may import whom, read from the sources: a kernel author never meets Hugging Face, nothing imports upwards."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module may import those of its own row and of the rows above it, and no two may import each other.
LAYERS = (
    ("errors", "spec"),
    ("layouts",),
    ("output", "towers", "packing", "buckets", "calls", "devices", "tars"),
    ("plan",),
    ("workspace", "executor"),
    ("graphs", "batch", "source", "turns", "images", "stills", "videos", "sources", "shards", "slots"),
    ("preparing",),
    ("embedding",),
    ("streams",),
    ("encoder",),
    ("pca", "parity", "metrics", "adapters"),
    ("encoding", "ray", "vllm"),
    ("archive",),
    ("progress",),
    ("cli",),
)
RANK = {name: i for i, row in enumerate(LAYERS) for name in row}
LEAVES = {  # fused_vit.kernels and fused_vit.weights: what they may import of fused_vit, and who may import them
    "kernels": ({"kernels"}, {"workspace", "executor", "encoder", "cli"}),
    "weights": ({"weights", "spec", "errors", "layouts"}, {"source", "encoder", "adapters", "parity", "cli"}),
}
THIRD_PARTY = {  # package -> modules that may import it; torch is everybody's
    "triton": {"kernels"},
    "safetensors": {"weights", "encoding", "shards"},
    "huggingface_hub": {"weights"},
    "transformers": {"adapters", "images", "videos", "parity"},
    "torchvision": {"videos"},  # Hugging Face's video processors need it
    "av": {"videos"},
    "pyarrow": {"sources", "shards", "archive"},
    "typer": {"cli"},
    "rich": {"cli", "progress", "streams"},
    "numpy": {
        "images",
        "pca",
        "stills",
        "weights",
        "videos",
        "preparing",
        "embedding",
        "streams",
        "shards",
        "slots",
        "ray",
    },
    "PIL": {"images", "pca", "preparing"},
    "prometheus_client": {"metrics"},
    "vllm": {"adapters"},
    "einops": set(RANK) | {"weights"},
}
PURE = {"errors", "spec", "layouts", "towers", "packing", "buckets", "plan"}  # no torch either


def sources() -> dict[str, Path]:
    """Dotted name under fused_vit -> file, the linked folders included, `fused_vit/__init__.py` left out."""
    found = {}
    for base, prefix in ((ROOT / "fused_vit", ()), (ROOT / "kernels", ("kernels",)), (ROOT / "weights", ("weights",))):
        for path in sorted(base.rglob("*.py")):
            inside = path.relative_to(base)
            if prefix or (inside.parts[0] not in LEAVES and inside != Path("__init__.py")):
                found[".".join((*prefix, *inside.with_suffix("").parts)).removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import in a file, at whatever depth, relative ones resolved."""
    package = ["fused_vit", *name.split(".")]
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            # `from . import x` and `from fused_vit import x` import a module called x
            tails = [f".{alias.name}" for alias in node.names] if module == "fused_vit" else [""]
            yield from ((node.lineno, module + tail) for tail in tails)


def top(name: str) -> str:
    return name.partition(".")[0]


SOURCES = sources()


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_down(name: str) -> None:
    own = top(name)
    assert own in RANK or own in LEAVES, f"{name} has no layer: give it a row in LAYERS"
    for line, module in imports(name, SOURCES[name]):
        where = f"{SOURCES[name].relative_to(ROOT)}:{line} imports {module}"
        package, _, rest = module.partition(".")
        if package == "fused_vit":
            target = top(rest)
            if own in LEAVES:
                assert target in LEAVES[own][0], where
            elif target in LEAVES:
                assert own in LEAVES[target][1], where
            elif rest and target != "__version__":
                assert RANK[target] <= RANK[own], where
        elif package == "torch":
            assert own not in PURE, where
        elif package not in sys.stdlib_module_names:
            assert own in THIRD_PARTY.get(package, set()), where


def test_no_two_modules_import_each_other() -> None:
    edges = {
        (top(name), top(module.removeprefix("fused_vit.")))
        for name, path in SOURCES.items()
        for _, module in imports(name, path)
        if module.startswith("fused_vit.")
    }
    assert not {(a, b) for a, b in edges if a < b and (b, a) in edges}


def test_the_package_itself_imports_only_errors() -> None:
    """At run time: the rest is resolved on first use, so that importing fused_vit costs nothing."""
    tree = ast.parse((ROOT / "fused_vit" / "__init__.py").read_text())
    relative = {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.level}
    assert relative == {"errors"}
