"""Long: the tests that try things at random or over and over, at full length, and a report of what they tried.

python -m tests.long --out bench/results/fuzz.json        # or: make fuzz; about a quarter of an hour on two cores
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
from pathlib import Path
from typing import Any

import torch

from bench.report import between

ROOT = Path(__file__).parent.parent
REPORT, PAGE = ROOT / "bench/results/fuzz.json", ROOT / "docs/reliability.md"
START, END = "<!-- fuzz:start -->", "<!-- fuzz:end -->"
LENGTHS = {"FUZZ": "10000", "FLIPS": "10000", "CALLS": "10000"}
TESTS = ("tests/test_calls.py", "tests/test_encoder.py", "tests/test_images.py", "tests/weights/test_hostile.py")


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


def table(report: dict[str, Any]) -> str:
    """What each test tried and what came of it, in markdown."""
    lines = ["| test | what came of what it tried | |", "|---|---|---|"]
    for name, row in report["tests"].items():
        test = name.removeprefix("tests.").replace("::", ": ")
        found = ", ".join(f"{key}: {value}" for key, value in row.items() if key not in ("outcome", "seconds"))
        lines.append(f"| {test} | {found} | {row['outcome']} |")
    about = ", ".join(f"{key} {value[:12]}" for key, value in report["environment"].items())
    return "\n".join([*lines, "", f"At full length, on a CPU: {about}."])


def written(page: str, report: dict[str, Any]) -> str:
    """The page with its report as it should be."""
    return between(page, START, END, table(report))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=REPORT)
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "long.xml"
        command = [sys.executable, "-m", "pytest", "-q", *TESTS, f"--junitxml={junit}", "-o", "junit_family=xunit1"]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **LENGTHS, "PYTHONPATH": str(ROOT)})
        tests = tried(junit)
    environment = {"python": platform.python_version(), "torch": torch.__version__, "commit": commit or "unknown"}
    report = {"environment": environment, "lengths": LENGTHS, "tests": tests}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.out == REPORT:
        PAGE.write_text(written(PAGE.read_text(), report))
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
