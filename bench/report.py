"""Report: the README's figures from the newest JSON under bench/results, between its markers. Invents nothing.

python -m bench.report
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

START, END = "<!-- figures:start -->", "<!-- figures:end -->"


def table(report: dict[str, Any], source: str) -> str:
    environment, roof = report["environment"], report["ceilings"]
    lines = [
        f"{report['what']}. One {environment['device']}, torch {environment['torch']}, triton {environment['triton']}. "
        f"Median of a call from Python until the device is idle, in ms; in brackets the error relative to fp32. "
        f"*Floor*: useful FLOPs at the measured {roof['tflops']:.0f} TFLOP/s, or weights at {roof['tbs']:.2f} TB/s. "
        f"Source: `{source}`.",
        "",
        "| input | patches | floor | fused_vit | Hugging Face sdpa | sdpa, Conv3d as linear | ours vs linear |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in report["cases"].items():
        cells = []
        for engine in ("fused_vit", "hf_sdpa", "hf_sdpa_linear"):
            wall = row[engine].get("wall_ms", {}).get("median")
            cells.append("wrong" if wall is None else f"{wall:.2f} ({row[engine]['error']:.1e})")
        ratio = row["hf_sdpa_linear"]["wall_ms"]["median"] / row["fused_vit"]["wall_ms"]["median"]
        lines.append(f"| {name} | {row['tokens']} | {row['floor_ms']:.2f} | {' | '.join(cells)} | {ratio:.1f}x |")
    return "\n".join(lines)


def main() -> None:
    root = Path(__file__).parent.parent
    source = "bench/results/encoder.json"
    text = table(json.loads((root / source).read_text()), source)
    readme = root / "README.md"
    before, rest = readme.read_text().split(START)
    readme.write_text(f"{before}{START}\n{text}\n{rest[rest.index(END) :]}")


if __name__ == "__main__":
    main()
