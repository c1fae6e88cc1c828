"""Report: the figures of README and docs/embedding.md, and docs/latency.svg, from bench/results. Invents nothing.

python -m bench.report
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.cases import CASES, PEERS

START, END = "<!-- figures:start -->", "<!-- figures:end -->"
RESULT, PLOT = "bench/results/encoder.json", "docs/latency.svg"
# One run each: the page has a table for every machine that there is a result of.
ARCHIVES = tuple(f"bench/results/embed{which}.json" for which in ("", "_two_h100", "_two_h200", "_four_h200"))
WHOLE = "rows, not pooled"
ARCHIVES_PAGE = "docs/embedding.md"
ARCHIVES_START, ARCHIVES_END = "<!-- archives:start -->", "<!-- archives:end -->"


def engines(report: dict[str, Any]) -> list[str]:
    """Ours, and the peers that any case has a time for."""
    return ["fused_vit", *(p for p in PEERS if any("wall_ms" in row.get(p, {}) for row in report["cases"].values()))]


def wall(row: dict[str, Any], engine: str) -> float | None:
    """Median of a call, where there is one."""
    median: float | None = row.get(engine, {}).get("wall_ms", {}).get("median")
    return median


def table(report: dict[str, Any], source: str) -> str:
    """Floor, ours and every peer's whole call in markdown."""
    environment, roof, names = report["environment"], report["ceilings"], engines(report)
    heads = ["input", "patches", "floor", *(PEERS.get(name, name) for name in names), "the fastest other / ours"]
    lines = [
        f"{report['what']}. One {environment['device']}, torch {environment['torch']}, triton {environment['triton']}. "
        f"Median of a call from Python until the device is idle, in ms; in brackets the error relative to fp32. "
        f"*Floor*: useful FLOPs at the measured {roof['tflops']:.0f} TFLOP/s, or weights at {roof['tbs']:.2f} TB/s. "
        f"Graphs that fit exactly are of one call's grids and know them before. Source: `{source}`.",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    for name, row in report["cases"].items():
        ours, others = wall(row, "fused_vit"), [found for peer in names[1:] if (found := wall(row, peer))]
        ratio = f"{min(others) / ours:.2f}" if ours and others else ""
        cells = [cell(row, engine) for engine in names]
        lines.append(f"| {name} | {row['tokens']} | {row['floor_ms']:.2f} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines)


def cell(row: dict[str, Any], engine: str) -> str:
    """A time and its error; "wrong" for what has an error only, nothing for what did not run."""
    median = wall(row, engine)
    if median is None:
        return "wrong" if "error" in row.get(engine, {}) else ""
    return f"{median:.2f} ({row[engine]['error']:.1e})"


def parts(report: dict[str, Any]) -> str:
    """Where a call of ours goes, in markdown; columns that no case has are left out."""
    host = "host, us, after a wait / in a burst"
    heads = ["input", "patches / bucket", "eager", "replay", "whole call", host, "same bits again"]
    rows = []
    for name, row in report["cases"].items():
        ours = row["fused_vit"]
        times = [ours.get("eager_ms"), ours.get("replay_ms"), wall(row, "fused_vit")]
        cells = ["" if time is None else f"{time:.2f}" for time in times]
        spent = " / ".join(f"{ours[key]:.0f}" for key in ("host_us", "host_in_a_burst_us") if key in ours)
        same = {True: "yes", False: "no", None: ""}[ours.get("bitwise")]
        capacity = ours["bucket"][0] if "bucket" in ours else "?"
        rows.append([name, f"{row['tokens']} / {capacity}", *cells, spent, same])
    kept = [i for i in range(len(heads)) if any(row[i] for row in rows)]
    table = [[row[i] for i in kept] for row in (heads, ["---"] * len(heads), *rows)]
    about = "Of fused_vit's calls, in ms; *eager*: the same launches one by one; *replay*: the graph alone."
    return "\n".join([about, "", *(f"| {' | '.join(cells)} |" for cells in table)])


def follows(report: dict[str, Any]) -> str:
    """The sentence on calls between two sizes; nothing where it was not measured."""
    found = report.get("cost_follows_tokens")
    if not found:
        return ""
    return (
        f"A call of {found['part']['rows']} patches, {found['share']:.0%} of {found['full']['rows']}, takes "
        f"{found['ratio']:.2f} of the time of one of {found['full']['rows']}, attention left out."
    )


def single(name: str) -> bool:
    """Whether a case is one image: batches and clips of as many patches attend less, and lie on no line with it."""
    return len(CASES.get(name, ())) == 1 and CASES[name][0][0] == 1


def lines(report: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """label -> (tokens, ms) of the single images, by tokens."""
    rows = sorted((row for name, row in report["cases"].items() if single(name)), key=lambda row: row["tokens"])
    found = {"floor": [(row["tokens"], row["floor_ms"]) for row in rows]}
    for engine in engines(report):
        points = [(row["tokens"], ms) for row in rows if (ms := wall(row, engine)) is not None]
        found[PEERS.get(engine, engine)] = points
    return {label: points for label, points in found.items() if points}


def plot(report: dict[str, Any], path: Path) -> None:
    """Latency against tokens, both logarithmic. The same report gives the same bytes."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("error: the plot needs matplotlib: pip install -e '.[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "fused_vit", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        for label, points in lines(report).items():
            ours, floor = label == "fused_vit", label == "floor"
            style = {"color": "black", "linestyle": "--", "marker": ""} if floor else {"marker": "o", "markersize": 3}
            axes.plot(*zip(*points, strict=True), label=label, linewidth=2 if ours else 1, **style)
        tokens = [n for n, _ in lines(report)["floor"]]
        axes.set(xscale="log", yscale="log", xlabel="patches of one image", ylabel="whole call, ms")
        axes.set_xticks(tokens, [f"{n}" for n in tokens])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        axes.set_title(f"{report['environment']['device']}, bf16", fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def between(page: str, start: str, end: str, part: str) -> str:
    """A page whose text between two marks is `part`."""
    before, rest = page.split(start)
    return f"{before}{start}\n{part}\n{rest[rest.index(end) :]}"


def written(readme: str, report: dict[str, Any]) -> str:
    """The README with its figures as they should be."""
    text = [table(report, RESULT), f"![whole calls against patches]({PLOT})", parts(report), follows(report)]
    return between(readme, START, END, "\n\n".join(filter(None, text)))


def archives(root: Path) -> str:
    """Archives end to end in markdown, of every result that there is."""
    found = {source: json.loads((root / source).read_text()) for source in ARCHIVES if (root / source).exists()}
    return "\n\n".join(archive(report, source) for source, report in found.items())


def archive(report: dict[str, Any], source: str) -> str:
    """One run: rates beside Hugging Face's, and what one image costs each stage."""
    environment = report["environment"]
    counts = list(dict.fromkeys(count for row in report["cases"].values() for count in row["ours"]))
    kinds = list(dict.fromkeys(kind for row in report["cases"].values() for kind in _ways(row)))
    heads = ["images/s", *(f"{count} GPU{'s' if count != '1' else ''}" for count in counts)]
    heads += [f"Hugging Face, {kind}" for kind in kinds]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, row in report["cases"].items():
        cells = [_rate(row["ours"], count, row["error"]) for count in counts]
        theirs = f" ({row['their_error']:.1e})"
        cells += [f"{_ways(row)[kind]['images_s']:.0f}{theirs}" if kind in _ways(row) else "" for kind in kinds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    whole = {f"{n}, every row kept": row[WHOLE] for n, row in report["cases"].items() if WHOLE in row}
    lines += [f"| {name} | {one['images_s']:.0f} |{'  |' * (len(heads) - 2)}" for name, one in whole.items()]
    stages = list(next(iter(next(iter(report["cases"].values()))["ours"].values()))["ms_an_image"])
    lines += ["", f"| ms an image | {' | '.join(stages)} | |", "|" + "---|" * (len(stages) + 2)]
    runs = {(name, count): one for name, row in report["cases"].items() for count, one in row["ours"].items()}
    for (name, count), one in (runs | {(name, counts[0]): one for name, one in whole.items()}).items():
        costs = " | ".join(f"{one['ms_an_image'][stage]:.2f}" for stage in stages)
        lines.append(f"| {name}, {count} GPU{'s' if count != '1' else ''} | {costs} | {one['bound'][0]} |")
    about = (
        f"{report['what']}; {environment['device']}, {environment['cores']} cores, torch {environment['torch']} "
        f"(`{source}`, commit {environment['commit'][:7]}). From the first prepared image to the last shard on disk; "
        f"in brackets the gain over one GPU and the error of the vectors to fp32. A process takes "
        f"{report['start_seconds']:.0f} s before that: imports, "
        f"weights, and {report['warm_seconds']:.0f} s of kernels and graphs."
    )
    if kinds:
        about += (
            " Hugging Face runs its own processor and tower on one GPU: image by image, in its best batch, and behind "
            "as many DataLoader workers as ours has."
        )
    return "\n".join([about, "", *lines])


def _ways(row: dict[str, Any]) -> dict[str, Any]:
    """How Hugging Face ran, where that has a rate."""
    found = row.get("theirs", {})
    return {kind: one for kind, one in found.items() if isinstance(one, dict) and one["images_s"]}


def _rate(ours: dict[str, Any], count: str, error: float) -> str:
    if count not in ours:
        return ""
    first, rate = next(iter(ours)), ours[count]["images_s"]
    beside = f"{error:.1e}" if count == first else f"{rate / ours[first]['images_s']:.2f}x"
    return f"{rate:.0f} ({beside})"


def main() -> None:
    root = Path(__file__).parent.parent
    report = json.loads((root / RESULT).read_text())
    readme = root / "README.md"
    readme.write_text(written(readme.read_text(), report))
    plot(report, root / PLOT)
    page = root / ARCHIVES_PAGE
    page.write_text(between(page.read_text(), ARCHIVES_START, ARCHIVES_END, archives(root)))


if __name__ == "__main__":
    main()
