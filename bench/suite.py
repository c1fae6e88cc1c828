"""Suite: what runs of the GPU tests said, from pytest's junit files, as one JSON with device, versions and commits.

python -m pytest -m gpu --junitxml=gpu.xml
python -m bench.suite COMMIT:gpu.xml ... --environment bench/results/families.json
A later run of a test stands for an earlier one, unless it was skipped; tests that did not run again keep what the
report says of them, as long as there are such tests.
"""

from __future__ import annotations

import argparse
import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path


def outcomes(path: Path, commit: str) -> dict[str, dict[str, object]]:
    """Test -> outcome, seconds and the commit it ran at."""
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        outcome = next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed")
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = {"outcome": outcome, "seconds": round(float(case.get("time", 0)), 2), "commit": commit}
    return found


def exists(name: str) -> bool:
    """Whether a test of the report is still one."""
    module, _, test = name.partition("::")
    file = Path(__file__).parent.parent / f"{module.replace('.', '/')}.py"
    return file.exists() and f"def {test.partition('[')[0]}(" in file.read_text()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+", help="COMMIT:FILE.xml, in the order of time")
    parser.add_argument("--environment", type=Path, required=True, help="a result of the same machine")
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu_suite.json"))
    arguments = parser.parse_args()
    tests: dict[str, dict[str, object]] = {}
    if arguments.out.exists():
        tests |= json.loads(arguments.out.read_text())["tests"]
    for run in arguments.runs:
        commit, _, path = run.partition(":")
        found = outcomes(Path(path), commit)
        tests |= {name: row for name, row in found.items() if row["outcome"] != "skipped" or name not in tests}
    tests = {name: row for name, row in tests.items() if exists(name)}
    environment = json.loads(arguments.environment.read_text())["environment"]
    environment.pop("commit")
    report = {
        "command": "python3 -m pytest -m gpu", "environment": environment,
        "counts": Counter(str(test["outcome"]) for test in tests.values()), "tests": tests,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(report, indent=0) + "\n")


if __name__ == "__main__":
    main()
