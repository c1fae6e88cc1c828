"""Timeline: one block's launches one after the other, before the forms for few rows and with them, as a picture.

python -m bench.timeline        # docs/block.svg from bench/results/blocks.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.blocks import BLOCK, FORMS

ROOT = Path(__file__).parent.parent
RESULT, PLOT = ROOT / "bench/results/blocks.json", ROOT / "docs/block.svg"
GAP_US = 0.5  # between two launches of a graph (bench/results/hopper_blocks.json)
ROWS = {"128²": 64, "256²": 256, "448²": 784}
# What the rule took in the buckets of 256 and 1024 rows before there were forms for few rows (commit f154cfa).
BEFORE = {
    "128²": {"qkv": "tall", "proj": "tall", "fc1": "tall", "fc2": "slim"},
    "256²": {"qkv": "tall", "proj": "tall", "fc1": "tall", "fc2": "slim"},
    "448²": {"qkv": "tall", "proj": "tall", "fc1": "tall", "fc2": "tall"},
}


def chosen(case: str) -> dict[str, str]:
    """Step -> name of the form that the rule takes on an H100, in the bucket of a case of the 8B tower."""
    import torch

    from fused_vit.buckets import choose, ladder
    from fused_vit.kernels.config import hopper_config

    bucket = choose(ladder(16384), ROWS[case], 1)
    assert bucket is not None, "a case fits the largest bucket"
    shapes = {"qkv": ("qkv", 3456, 1152), "proj": ("residual", 1152, 1152), "fc1": ("linear", 4352, 1152),
              "fc2": ("residual", 1152, 4352)}  # fmt: skip
    found = {}
    for step, (op, columns, depth) in shapes.items():
        form = hopper_config(op, bucket.tokens, columns, depth, torch.bfloat16, 90, 132)
        found[step] = next(name for name, known in FORMS.items() if known is form)
    return found


def spans(report: dict[str, Any], case: str, forms: dict[str, str]) -> list[tuple[str, float, float]]:
    """(label, begin, us) of the five launches of a block."""
    rows = {row["form"]: row for row in report["rows"] if row["case"] == case}
    begin, found = 0.0, []
    for step in BLOCK:
        form = forms.get(step, "small")  # attention has one form
        about = FORMS.get(form)
        label = f"{step} {about.block_m}x{about.block_n}" if step in forms and about else step
        us = rows[form][step]
        found.append((label, begin, us))
        begin += us + GAP_US
    return found


def plot(report: dict[str, Any], path: Path) -> None:
    """Two bars a case. The same report gives the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "fused_vit", "svg.fonttype": "none", "font.size": 8}):
        figure, axes = pyplot.subplots(figsize=(10, 3.4), layout="constrained")
        names = []
        for case in ROWS:
            for when, forms in (("before", BEFORE[case]), ("now", chosen(case))):
                for i, (label, begin, us) in enumerate(spans(report, case, forms)):
                    axes.barh(len(names), us, left=begin, color=f"C{i}", height=0.7)
                    axes.text(begin + us / 2, len(names), f"{label}\n{us:.1f}", ha="center", va="center", fontsize=5.5)
                names.append(f"{case}, {ROWS[case]} rows, {when}")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set(xlabel="us, one block of 27", xlim=(0, None))
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def main() -> None:
    plot(json.loads(RESULT.read_text()), PLOT)


if __name__ == "__main__":
    main()
