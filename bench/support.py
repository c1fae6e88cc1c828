"""Support: the matrix of families, from the table of towers and what was measured, into docs/support.md and README.

python -m bench.support [--measure]     # --measure: compare every definition with its reference first, on the CPU
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.report import between

ROOT = Path(__file__).parent.parent
CPU, GPU = ROOT / "bench/results/families_cpu.json", ROOT / "bench/results/families.json"
PAGES = (ROOT / "README.md", ROOT / "docs/support.md")
START, END = "<!-- support:start -->", "<!-- support:end -->"
SPEED_START, SPEED_END = "<!-- speed:start -->", "<!-- speed:end -->"
HEAD = ("family", "sizes", "transformers class", "input", "CPU", "GPU, bf16", "notes")


def measure() -> dict[str, Any]:
    """The worst relative error of each family's definition, over its grids, from a checkpoint under the real names."""
    import torch

    import fused_vit
    from tests.families import FAMILIES, available, build, pixels
    from tests.test_families import outputs, save, worst

    errors = {}
    for family in FAMILIES:
        if available(family):
            tower = build(family, seed=1)
            with tempfile.TemporaryDirectory() as folder:
                vit = fused_vit.load(save(Path(folder), *family.hub(tower)), device="cpu")
            found = []
            for grid in family.grids.values():
                x = pixels(family, tower, grid, seed=2)
                found.append(worst(outputs(vit(x, grid)), family.call(tower, x, grid)))
            errors[family.name] = max(found)
    return {"torch": torch.__version__, "transformers": version("transformers"), "families": errors}


def table() -> str:
    """The matrix in markdown."""
    from fused_vit.towers import TOWERS

    cpu, gpu = (json.loads(path.read_text()) for path in (CPU, GPU))
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    for tower in TOWERS:
        error, measured = cpu["families"].get(tower.family), gpu["families"].get(tower.family)
        cells = (
            tower.family,
            ", ".join(tower.sizes) or "none published",
            ", ".join(f"`{name}`" for name in tower.hf_classes) or "none",
            "images, video" if tower.video else "images",
            "not measured" if error is None else f"{error:.0e}",
            "not measured" if measured is None else _gpu(measured["cases"]),
            tower.notes,
        )
        lines.append(f"| {' | '.join(cells)} |")
    about = (
        f"CPU: worst relative error of the definition to the reference in fp32, from a sharded checkpoint under the "
        f"real names (transformers {cpu['transformers']}; `{CPU.relative_to(ROOT)}`). GPU: error to fp32 at one "
        f"checkpoint's real sizes, ours / the reference's own in bf16, worst case on "
        f"{gpu['environment']['device']} (`{GPU.relative_to(ROOT)}`)."
    )
    return "\n".join([*lines, "", about])


def _gpu(cases: dict[str, Any]) -> str:
    row = max(cases.values(), key=lambda row: row["error"] / row["hf_error"])
    return f"{row['error']:.1e} / {row['hf_error']:.1e}" + ("" if "wall_ms" in row else ", too large")


def speeds() -> str:
    """Every family's case set in markdown: wall time, how many times its floor, and the reference's."""
    report = json.loads(GPU.read_text())
    environment = report["environment"]
    names = list(max((measured["cases"] for measured in report["families"].values()), key=len))
    lines = [f"| family | {' | '.join(names)} | TFLOP/s | commit |", "|" + "---|" * (3 + len(names))]
    for family, measured in report["families"].items():
        cells = [_speed(measured["cases"].get(name)) for name in names]
        roof = f"{measured['ceilings']['tflops']:.0f}"
        lines.append(f"| {family} | {' | '.join(cells)} | {roof} | {measured['commit'][:7]} |")
    about = (
        f"One call from Python until the device is idle, median, bf16; in brackets how many times the tower's floor "
        f"that is (useful FLOPs at the TFLOP/s that the card gave then, or weights at its bandwidth) and the"
        f" reference's own time (transformers with sdpa; for Kimi-VL the tests' plain torch). Random weights at "
        f"one checkpoint's sizes, on one {environment['device']}, torch {environment['torch']}, triton "
        f"{environment['triton']} (`{GPU.relative_to(ROOT)}`). "
        f"InternVL and SigLIP get 1080p as tiles."
    )
    return "\n".join([*lines, "", about])


def _speed(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if "wall_ms" not in row:
        return "wrong"
    return f"{row['wall_ms']:.1f} ms ({row['wall_ms'] / row['floor_ms']:.2f}x; {row['hf_wall_ms']:.0f} ms)"


def written(path: Path) -> str:
    """A file with its generated parts as they should be."""
    text = path.read_text()
    for start, end, part in ((START, END, table), (SPEED_START, SPEED_END, speeds)):
        if start in text:
            text = between(text, start, end, part())
    return text


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", action="store_true")
    if parser.parse_args().measure:
        CPU.write_text(json.dumps(measure(), indent=1) + "\n")
    for path in PAGES:
        path.write_text(written(path))


if __name__ == "__main__":
    main()
