"""The reports of long runs: the page shows them as they are, and a sanitizer's output is read for what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import sanitize
from tests.long import PAGE, RUNS, result, tried, written


@pytest.mark.parametrize("name", RUNS)
def test_the_report_passed_at_full_length_and_is_on_the_page(name: str) -> None:
    if not result(name).exists():
        pytest.skip("never run")
    page, report = PAGE.read_text(), json.loads(result(name).read_text())
    assert written(page, name, report) == page, f"run python -m tests.long {name} --page"
    assert all(row["outcome"] == "passed" for row in report["tests"].values())
    assert report["lengths"] == RUNS[name].lengths


def test_only_tests_that_recorded_something_are_in_a_report(tmp_path: Path) -> None:
    properties = '<properties><property name="calls" value="7"/></properties>'
    cases = (
        f'<testcase classname="a" name="one" time="1.5">{properties}</testcase>'
        f'<testcase classname="a" name="two" time="2">{properties}<failure/></testcase>'
        '<testcase classname="a" name="three" time="3"/>'
    )
    (tmp_path / "junit.xml").write_text(f"<testsuite>{cases}</testsuite>")
    assert tried(tmp_path / "junit.xml") == {
        "a::one": {"outcome": "passed", "seconds": 1.5, "calls": "7"},
        "a::two": {"outcome": "failed", "seconds": 2.0, "calls": "7"},
    }


FOUND = """========= COMPUTE-SANITIZER
ran heads of 64, bfloat16, plain
========= Invalid __global__ read of size 2 bytes
=========     at attention_kernel+0x1230
========= Invalid __global__ read of size 2 bytes
========= ERROR SUMMARY: 2 errors
"""
RACES = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at hopper_attention_kernel+0x4b60 in hopper_attention.py:113
=========     and Read access at hopper_attention_kernel+0x2a30 in hopper_attention.py:112 [512 hazards]
=========     and Write access at hopper_attention_kernel+0x2b30 in hopper_attention.py:113 [16 hazards]
=========
========= Warning: Detected overflow of tracked cuda::barrier structures. Results might be incorrect.
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
SIDES = ("Write", 113), ("Read", 112), ("Write", 113)


@pytest.mark.parametrize(
    ("output", "errors", "kinds"),
    [
        ("========= ERROR SUMMARY: 0 errors\n", 0, {}),
        (FOUND, 2, {"Invalid __global__ read of size N bytes": 2}),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0, {}),
        ("========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)\n", 3, {}),
        (
            RACES,
            1,
            {" and ".join(f"{access} in hopper_attention.py:{line}" for access, line in SIDES): 1}
            | {"Warning: Detected overflow of tracked cuda::barrier structures. Results might be incorrect.": 1},
        ),
        ("", 1, {}),
    ],
    ids=["clean", "reads out of bounds", "no race", "races", "a race's lines", "nothing"],
)
def test_a_sanitizers_output_is_read(output: str, errors: int, kinds: dict[str, int]) -> None:
    found = sanitize.read(output)
    assert (found["errors"], found["kinds"]) == (errors, kinds)
    assert found["ran"] == (["heads of 64, bfloat16, plain"] if output is FOUND else [])


def test_every_form_of_a_kernel_is_sanitized() -> None:
    """Fails where a form is added to kernels.config and no tower of tests.sanitize runs it."""
    from fused_vit.kernels import config, linear

    number = {op: len(forms) for op, forms in config._HOPPER.items()}
    for name in sanitize.EVERY_FORM:
        assert len(sanitize.forms_of(name, "bfloat16")) == 1 + max(number.values())
    with sanitize.forced("gluon 3"):
        chosen = linear.hopper_config("linear", 256, 256, 256, sanitize.torch.bfloat16, 90, 132)
    assert chosen == (config._HOPPER["linear"][3] if config.has_gluon() else None)
    with sanitize.forced("plain"):
        assert linear.hopper_config("linear", 256, 256, 256, sanitize.torch.bfloat16, 90, 132) is None
