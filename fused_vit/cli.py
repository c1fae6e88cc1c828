"""fused-vit: describe a checkpoint's tower, encode images, check against Hugging Face, report a machine, measure it."""

from __future__ import annotations

import importlib
import io
import math
import os
import platform
import sys
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import __version__
from .buckets import ladder
from .encoder import FusedViT, load
from .errors import FusedVitError, InputError
from .layouts import choose_layout
from .packing import items
from .plan import Plan, build_plan, cost
from .sources import is_text, shown
from .spec import TowerSpec
from .towers import find_tower, parse_config
from .weights.checkpoint import Checkpoint, TowerTensors
from .workspace import place

out = Console()
# Every shape that packing treats differently: square, tiny, odd sides, clips
CHECKED = ((1, 8, 8), (1, 1, 1), (1, 3, 5), (4, 4, 7), (1, 17, 10))  # (frames, height, width) in merged patches


class OneLineErrors(typer.core.TyperGroup):
    """What a user can cause, and what a machine lacks, is one line on stderr and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name that it cannot print must not end the command
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except (FusedVitError, OSError, ImportError, torch.OutOfMemoryError) as error:
            print(f"error: {shown(' '.join(str(error).split()))}", file=sys.stderr)
            raise typer.Exit(1) from None
        except MemoryError:  # says nothing itself
            print("error: not enough memory on this host; give fewer or smaller images at once", file=sys.stderr)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=OneLineErrors, no_args_is_help=True, add_completion=False,
    rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Vision towers as fused Triton kernels in CUDA graphs.",
)  # fmt: skip


class Dtype(StrEnum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def _torch(dtype: Dtype | None) -> torch.dtype | None:
    return None if dtype is None else getattr(torch, dtype.value)


Source = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="folder, .safetensors file or hub id")]
Revision = Annotated[str | None, typer.Option(help="branch, tag or commit of a hub id")]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu; default a GPU where there is one")]
Precision = Annotated[Dtype | None, typer.Option("--dtype", help="default the checkpoint's own, float32 on a CPU")]


@app.command()
def describe(
    checkpoint: Source,
    grid: Annotated[str, typer.Option(help="TxHxW in patches, what steps are costed for")] = "1x64x64",
    max_tokens: Annotated[int, typer.Option(help="patches of the largest bucket")] = 16384,
    revision: Revision = None,
) -> None:
    """Print a tower's spec, its plan with FLOPs and bytes per step, and the memory it takes. Reads headers only."""
    opened = Checkpoint.open(checkpoint, revision=revision)
    row, spec = find_tower(opened.config), parse_config(opened.config)
    layout = choose_layout(row.layouts, spec, opened.files)
    tensors = opened.tower(layout.prefixes, layout.expected(spec), layout.unused)
    plan = build_plan(spec)
    out.print(f"{row.family} tower in {checkpoint}, {len(tensors)} tensors under {tensors.prefix!r}", highlight=False)
    for name in spec.__slots__:
        out.print(f"  {name:<12} {getattr(spec, name)}", highlight=False, soft_wrap=True)
    out.print(str(plan), highlight=False, soft_wrap=True, markup=False)
    out.print(_costs(plan, _grid(grid), grid))
    out.print(_memory(plan, tensors, max_tokens))


def _grid(text: str) -> list[int]:
    sides = text.split("x")
    if len(sides) != 3 or not all(side.isdecimal() for side in sides):
        raise InputError(f"--grid is {text!r}; expected TxHxW in patches, such as 1x64x64")
    return [int(side) for side in sides]


def _costs(plan: Plan, grid: list[int], title: str) -> Table:
    """Steps of the same kind in different blocks cost the same: one row for them, with how many there are."""
    kinds: dict[str, list[tuple[float, float]]] = {}
    for name, step in cost(plan, items(plan.spec, [grid], math.prod(grid))).items():
        kind = ".".join(part for part in name.split(".") if not part.isdecimal())
        kinds.setdefault(kind, []).append((step.flops, step.bytes))
    table = Table("step", *(f"{n}" for n in ("launches", "GFLOP each", "MB each", "FLOP/byte", "GFLOP")), title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, steps in kinds.items():
        flops, size = steps[0]
        each = (f"{flops / 1e9:.3f}", f"{size / 1e6:.2f}", f"{flops / size:.0f}", f"{len(steps) * flops / 1e9:.2f}")
        table.add_row(kind, str(len(steps)), *each)
    every = [step for steps in kinds.values() for step in steps]
    table.add_section()
    table.add_row("all", str(len(every)), "", "", "", f"{sum(flops for flops, _ in every) / 1e9:.2f}")
    return table


def _memory(plan: Plan, tensors: TowerTensors, max_tokens: int) -> Table:
    from .kernels.config import attention_config

    table = Table("memory", "MiB", show_edge=False)
    table.columns[1].justify = "right"
    table.add_row("tensors in the checkpoint", f"{tensors.bytes / 2**20:.1f}")
    for dtype, arch in ((torch.bfloat16, 90), (torch.float32, 90)):
        tile = attention_config(plan.spec.attention.head_dim, dtype, arch).block_m
        largest = ladder(max_tokens, plan.spec.attention.windows is not None)[-1]
        size = place(plan, largest, dtype.itemsize, tile)[1]
        table.add_row(f"workspace for {max_tokens} tokens, {str(dtype).removeprefix('torch.')}", f"{size / 2**20:.1f}")
    return table


@app.command()
def encode(
    images: Annotated[list[Path], typer.Argument(help="photographs: JPEG, PNG, WEBP, GIF, BMP, TIFF or PPM")],
    checkpoint: Annotated[str, typer.Option(help="folder, .safetensors file or hub id")],
    output: Annotated[Path, typer.Option("-o", "--output", help=".safetensors to write")] = Path("out.safetensors"),
    pca: Annotated[Path | None, typer.Option(help="picture to write: each photo beside its patches' PCA")] = None,
    device: Device = None,
    dtype: Precision = None,
    revision: Revision = None,
) -> None:
    """Encode images. Each gets its merged rows under its path, with .grid_thw and .deepstack.K beside them.

    What was done stays in OUTPUT.parts until all is: after an interruption the same command does the rest.
    """
    from .encoding import Done, Failed, Parts, encode_photos, identity, merge

    if pca is not None and os.path.realpath(output) == os.path.realpath(pca):
        raise InputError(f"{output}: is the name of both, features and picture; give another with -o or --pca")
    photographs = {os.path.realpath(image) for image in images}
    for target in [output] if pca is None else [output, pca]:
        if not target.parent.is_dir():
            raise InputError(f"{target}: there is no folder {target.parent}; make it first")
        if target.is_dir():
            raise InputError(f"{target}: is a folder; give the name of a file in it")
        if os.path.realpath(target) in photographs:
            raise InputError(f"{target}: is one of the photographs; give another name")
    _check_opens(output)
    vit = load(checkpoint, device=device, dtype=_torch(dtype), revision=revision)
    parts = Parts(output.with_name(f"{output.name}.parts"), identity(vit, vit.processor), pca is not None)
    with parts.locked():
        with Progress(console=Console(stderr=True)) as progress:
            rows = encode_photos(vit, vit.processor, progress.track(images, description="encoding"), parts)
        done, failed = [row for row in rows if isinstance(row, Done)], [row for row in rows if isinstance(row, Failed)]
        if done:
            maps = merge(done, output, {"fused_vit": __version__, "checkpoint": checkpoint})
            text = f"{len(done)} images to {output} ({vit.backend} on {vit.device})"
            out.print(text, highlight=False, soft_wrap=True, markup=False)
            if pca is not None:
                _draw([row.photo for row in done], maps, pca, output)
        if not failed:
            parts.remove()
    for bad in failed:
        out.print(shown(f"failed: {bad.photo}: {bad.reason}"), highlight=False, soft_wrap=True, markup=False)
    if failed:
        raise InputError(
            f"{len(failed)} of {len(images)} images failed, the first {failed[0].photo}: {failed[0].reason} "
            "(the same command tries only those again)"
        )


def _draw(photos: list[Path], maps: list[torch.Tensor], pca: Path, output: Path) -> None:
    from .images import read_image
    from .pca import picture

    try:
        picture((read_image(photo) for photo in photos), maps).save(pca)
    except InputError as error:
        raise InputError(f"{pca}: {error}; the features are in {output}") from error
    except ValueError as error:  # pillow's word for an unknown suffix
        raise InputError(f"{pca}: {error}; take .png") from error
    out.print(f"picture: {pca}", highlight=False, soft_wrap=True, markup=False)


def _check_opens(output: Path) -> None:
    """safetensors writes under any name, and then cannot read it."""
    if not is_text(str(output)):
        raise InputError(f"{output}: its name is not UTF-8, and safetensors opens no such file; choose another with -o")


class Format(StrEnum):
    parquet = "parquet"
    safetensors = "safetensors"


class PoolOf(StrEnum):
    none = "none"
    mean = "mean"


@app.command()
def embed(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="folders, globs in quotes, .txt lists of paths, WebDataset .tar, .parquet, photographs, videos",
        ),
    ],
    checkpoint: Annotated[str, typer.Option(help="folder, .safetensors file or hub id")],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder of shards; a run adds what it lacks")],
    format: Annotated[Format, typer.Option(help="of the shards")] = Format.parquet,
    pool: Annotated[PoolOf, typer.Option(help="none: all merged rows of an image; mean: one vector")] = PoolOf.none,
    store: Annotated[
        Dtype | None, typer.Option(help="default float32 pooled, else the encoder's; Parquet has no bfloat16")
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="patches of a batch; default the largest bucket's")] = None,
    max_tokens: Annotated[int, typer.Option(help="patches of the largest bucket")] = 16384,
    workers: Annotated[
        int | None, typer.Option(help="processes that decode and preprocess; 0: a thread; default the cores")
    ] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: this share of n; default torchrun's RANK/WORLD_SIZE")] = None,
    devices: Annotated[str | None, typer.Option(help="a process on each: all, or 0,1")] = None,
    device: Device = None,
    dtype: Precision = None,
    column: Annotated[str | None, typer.Option(help="of Parquet files, where it is not clear which has images")] = None,
    fps: Annotated[float | None, typer.Option(help="frames a second of videos; default the checkpoint's")] = None,
    frames: Annotated[int | None, typer.Option(help="frames of every video, instead of so many a second")] = None,
    shard_images: Annotated[int, typer.Option(help="of one shard at most; one also ends at 256 MiB")] = 4096,
    revision: Revision = None,
) -> None:
    """Embed archives into a folder of Parquet or safetensors shards: resumable, on any number of GPUs and machines.

    A second run does what is left, and nothing where nothing is. Failures are in OUTPUT/_report-*.json.
    """
    from .archive import Job, devices_of, ended_as_by_ctrl_c, local_rank, part_of, run, run_on
    from .progress import EmbedProgress

    if shard_images < 1:
        raise InputError(f"--shard-images is {shard_images}; expected at least 1")
    if format is Format.safetensors:
        _check_opens(output)
    if device is not None and devices is not None:
        raise InputError("--device and --devices are both there; take --devices for several, --device for one")
    part, parts = part_of(shard)
    place = local_rank()
    if place is not None and devices is None and device is None and torch.cuda.is_available():
        device = f"cuda:{place[0] % torch.cuda.device_count()}"
    job = Job(
        tuple(sources), checkpoint, output, format.value, "mean" if pool is PoolOf.mean else None,
        store.value if store else None, batch_tokens, max_tokens, workers, part, parts, device, _torch(dtype), revision,
        column, fps, frames, shard_images, place[1] if place else 1,
    )  # fmt: skip
    ended_as_by_ctrl_c()
    try:
        with EmbedProgress() as bar:
            states = [run(job, bar.tell)] if devices is None else run_on(job, devices_of(devices), bar.tell)
    except KeyboardInterrupt:
        print(f"interrupted: what was done is in {output}; the same command does the rest", file=sys.stderr)
        raise
    done, failures = sum(state.done for state in states), sum(state.failures for state in states)
    before, seconds = sum(state.before for state in states), max(state.seconds for state in states)
    rate = f", {done / seconds:.1f} images/s" if done else ""
    text = f"{done} images to {output} in {seconds:.1f} s{rate}; {before} were there, {failures} failed"
    if ignored := max(state.ignored for state in states):  # each process lists all sources
        text += f"; {ignored} other files left out"
    out.print(text, highlight=False, soft_wrap=True, markup=False)
    for state in states:
        name = f"shard {state.part}, {state.backend}: " if len(states) > 1 else f"{state.backend}: "
        if state.times is not None:
            out.print(name + state.times.bound(), highlight=False, soft_wrap=True, markup=False)
    failed = [bad for state in states for bad in state.failed]
    for bad in failed[:SHOWN]:
        out.print(shown(f"failed: {bad.key}: {bad.reason}"), highlight=False, soft_wrap=True, markup=False)
    if failed:
        text = (
            f"{len(failed)} images failed, the first {failed[0].key}: {failed[0].reason} "
            f"(all are in {output}/_report-*.json; the same command tries only those again)"
        )
        if place is None or shard is not None:
            raise InputError(text)
        out.print(text, highlight=False, soft_wrap=True, markup=False)  # torchrun would end every other rank


SHOWN = 20  # failures, of as many as there are in the report


@app.command()
def check(
    checkpoint: Source,
    steps: Annotated[bool, typer.Option("--steps", help="compare every step, wrong output or not")] = False,
    device: Device = None,
    dtype: Precision = None,
    revision: Revision = None,
) -> None:
    """Compare with Hugging Face on this machine. Where they differ, names the first bad step and exits with 1."""
    from .parity import Compared, Peer, hf_tower, random_call

    vit = load(checkpoint, device=device, dtype=_torch(dtype), revision=revision)
    tower = hf_tower(Checkpoint.open(checkpoint, revision=revision), vit.device)
    grid = checked_grid(vit.spec)
    peer = Peer(tower, vit, random_call(vit, grid), grid)
    rows = peer.outputs()
    good = all(row.ok for row in rows)
    out.print(_errors(rows, f"{vit.backend} on {vit.device}, {str(vit.dtype).removeprefix('torch.')}"))
    if good and not steps:
        out.print("same as Hugging Face")
        return
    walked: list[Compared] = []
    for row in peer.steps():
        walked.append(row)
        if not row.ok and not steps:
            break
    out.print(_errors(walked if steps else walked[-3:], "step by step"))
    bad = next((i for i, row in enumerate(walked) if not row.ok), None)
    if bad is not None:
        raise FusedVitError(f"first bad step: {walked[bad].name}{_between(vit, walked, bad)}")
    if not good:
        raise FusedVitError("every step is right, but an output of the whole call is not: suspect the graphs")
    out.print("same as Hugging Face, at every step")


def checked_grid(spec: TowerSpec) -> list[list[int]]:
    """CHECKED in this tower's patches, clips no longer than it takes."""
    frames = spec.position.frames if spec.position and spec.position.frames else max(t for t, _, _ in CHECKED)
    return [[min(t, frames), h * spec.merge, w * spec.merge] for t, h, w in CHECKED]


def _between(vit: FusedViT, walked: list[Any], bad: int) -> str:
    """The steps before it that have no counterpart to compare with, such as qkv, and may be the cause."""
    names = [step.name for step in vit.plan().steps]
    first = names.index(walked[bad - 1].name) + 1 if bad else 0
    silent = names[first : names.index(walked[bad].name)]
    return f" (or {', '.join(silent)}, which Hugging Face computes in another layout)" if silent else ""


def _errors(rows: list[Any], title: str) -> Table:
    table = Table("relative error of", "fused_vit", "Hugging Face", "allowed", "", title=title)
    for row in rows:
        verdict = "ok" if row.ok else "[bold red]bad"
        table.add_row(row.name, f"{row.error:.2e}", f"{row.theirs:.2e}", f"{row.allowed:.2e}", verdict)
    return table


@app.command()
def env() -> None:
    """Print what a bug report needs."""
    lines = {"fused_vit": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in ("torch", "triton", "transformers", "safetensors", "huggingface_hub", "numpy"):
        try:
            lines[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            lines[name] = "absent"
    lines["torch's CUDA"] = torch.version.cuda or "none (a CPU build)"
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        lines[f"cuda:{i}"] = f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB"
    lines["runs"] = "Triton kernels in CUDA graphs" if torch.cuda.is_available() else "the definition, in torch"
    try:
        importlib.import_module("fused_vit.kernels.ops")
        lines["kernels"] = "import"
    except ImportError as error:
        lines["kernels"] = f"do not import: {error}"
    for name, value in lines.items():
        out.print(f"{name:<16} {value}", highlight=False, soft_wrap=True, markup=False)


bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure on this machine's GPU.")
app.add_typer(bench, name="bench")


def _bench(name: str, arguments: list[str]) -> None:
    """A module of bench/, which lies beside the package in a checkout and is no part of what pip installs."""
    root = Path(__file__).parent.parent
    if not (root / "bench" / f"{name}.py").is_file():
        raise FusedVitError(
            "the benchmarks are not installed with the package; they run from a checkout of its source: "
            "pip install -e '.[bench]' there, then run this again"
        )
    sys.path.insert(0, str(root))
    importlib.import_module(f"bench.{name}").main(arguments)


def _command(name: str, text: str) -> None:
    """A command whose options are the module's own, --help included."""

    @bench.command(
        name, help=text, add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )  # fmt: skip
    def run(context: typer.Context) -> None:
        _bench(name, context.args)


_command("encoder", "Whole towers, eager, replayed and called, beside Hugging Face and other peers.")
_command("kernels", "Every kernel beside cuBLAS and torch's attentions, with its share of the measured ceiling.")
_command("tune", "Candidates for the tables in kernels/config.py.")


if __name__ == "__main__":
    app()
