"""Long: the tests that try things at random or over and over, at full length, and reports of what they tried.

python -m tests.long fuzz        # or: make fuzz; on a CPU, about a quarter of an hour on two cores
python -m tests.long soak        # or: make soak; on a GPU, about six minutes
Each writes bench/results/NAME.json and its table in docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.report import between
from bench.timing import environment, save

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/reliability.md"


def on_a_cpu() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": os.environ.get("COMMIT") or commit or "unknown",
    }


@dataclass(frozen=True)
class Run:
    """Which tests, with what in their environment, and what is said of where they ran."""

    tests: tuple[str, ...]
    lengths: dict[str, str]
    where: str
    environment: Callable[[], dict[str, Any]]


RUNS = {
    "fuzz": Run(
        ("tests/test_calls.py", "tests/test_encoder.py", "tests/test_images.py", "tests/weights/test_hostile.py"),
        {"FUZZ": "10000", "FLIPS": "10000", "CALLS": "10000"}, "on a CPU", on_a_cpu,
    ),
    "soak": Run(
        tuple(f"tests/gpu/test_{name}_gpu.py" for name in ("calls", "determinism", "threads", "memory", "lifecycle")),
        {"CALLS": "10000", "SOAK_SECONDS": "60", "REPEATS": "250"}, "on a GPU", environment,
    ),
}  # fmt: skip


def tried(path: Path) -> dict[str, dict[str, Any]]:
    """Test -> outcome, seconds and what it recorded, of those in a junit file that recorded something."""
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        recorded = {p.get("name", ""): p.get("value") for p in case.iter("property")}
        if recorded:
            bad = any(case.find(kind) is not None for kind in ("failure", "error"))
            name = f"{case.get('classname')}::{case.get('name')}"
            about = {"outcome": "failed" if bad else "passed", "seconds": round(float(case.get("time", 0)), 1)}
            found[name] = about | recorded
    return found


def table(report: dict[str, Any], where: str) -> str:
    """What each test tried and what came of it, in markdown."""
    lines = ["| test | what came of what it tried | |", "|---|---|---|"]
    for name, row in report["tests"].items():
        test = name.removeprefix("tests.").replace("::", ": ")
        found = ", ".join(f"{key}: {value}" for key, value in row.items() if key not in ("outcome", "seconds"))
        lines.append(f"| {test} | {found} | {row['outcome']} |")
    seen = report["environment"] | {"commit": report["environment"]["commit"][:12]}
    about = ", ".join(f"{key} {value}" for key, value in seen.items() if key != "clocks_mhz")
    return "\n".join([*lines, "", f"At full length, {where}: {about}."])


def written(page: str, name: str, report: dict[str, Any]) -> str:
    """The page with a report as it should be."""
    return between(page, f"<!-- {name}:start -->", f"<!-- {name}:end -->", table(report, RUNS[name].where))


def result(name: str) -> Path:
    return ROOT / f"bench/results/{name}.json"


def render(name: str) -> None:
    PAGE.write_text(written(PAGE.read_text(), name, json.loads(result(name).read_text())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", choices=RUNS)
    parser.add_argument("--out", type=Path, help="default bench/results/NAME.json; elsewhere, the page stays as it is")
    parser.add_argument("--page", action="store_true", help="run nothing: only the page, from the result that is there")
    arguments = parser.parse_args()
    if arguments.page:
        render(arguments.run)
        return
    run, out = RUNS[arguments.run], arguments.out or result(arguments.run)
    if run.environment is environment and not torch.cuda.is_available():
        sys.exit("error: these tests run on an NVIDIA GPU, and torch sees none here")
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "long.xml"
        command = [sys.executable, "-m", "pytest", "-q", *run.tests, f"--junitxml={junit}", "-o", "junit_family=xunit1"]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **run.lengths, "PYTHONPATH": str(ROOT)})
        tests = tried(junit)
    report = {"environment": run.environment(), "lengths": run.lengths, "tests": tests}
    save(report, out)
    if out == result(arguments.run):
        render(arguments.run)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
