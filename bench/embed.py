"""JPEG files to pooled vectors, end to end: what `fused-vit embed` does, beside Hugging Face's processor and tower.

python -m bench.embed --devices 1 2 --out bench/results/embed.json

Everything is made here: photographs, random weights of Qwen3-VL-8B's tower and its preprocessor_config.json. A process
for each GPU loads the tower once, captures its graphs, and embeds one archive after the other; each GPU has as many
images to do. A rate counts from the first prepared image, on any GPU, to the last shard on disk; what a process needs
before that is told beside it. Hugging Face runs three ways: image by image, in its best batch, and with as many
DataLoader workers as ours has. `python -m bench.report` writes the table of docs/embedding.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from bench.peers import rounded
from bench.timing import BenchError, environment, require_gpu, save, script
from fused_vit import archive
from fused_vit.archive import Job, State
from fused_vit.encoder import load
from fused_vit.errors import FusedVitError
from fused_vit.images import processor
from fused_vit.parity import exact_fp32, relative
from fused_vit.preparing import Preparer, default_workers

SIZES = {  # (width, height) of a case's photographs, which take turns
    "224²": [(224, 224)],
    "448²": [(448, 448)],
    "mixed": [(224, 224), (640, 480), (448, 448), (480, 640), (1024, 768), (320, 240), (1280, 720), (800, 600)],
}
# For each GPU: 13 to 23 seconds of encoding on an H100, since two processes begin up to 0.8 s apart.
IMAGES = {"224²": 60000, "448²": 8000, "mixed": 4000}
UNIQUE = 64  # photographs; the others are links to them, since decoding costs the same
BATCHES = (8, 32)  # that Hugging Face tries
PREFETCHED = 2  # batches that each of a DataLoader's workers makes ahead
CHECKED = 8  # images whose vectors are compared with fp32
PROCESSOR = {  # Qwen3-VL's published one, but for the least size, which would enlarge 224²
    "image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 224 * 224, "longest_edge": 1 << 24},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Peer:
    """Hugging Face's tower in 16 bits, its own processor and where its pixels go."""

    tower: nn.Module
    processor: Any
    device: torch.device

    def vectors(self, images: Sequence[Any]) -> torch.Tensor:
        """fp32 [images, out] on the CPU: the mean of every image's merged rows."""
        return self.means(self.processor(images=list(images), return_tensors="pt"))

    def means(self, batch: Any) -> torch.Tensor:
        dtype = next(self.tower.parameters()).dtype
        grid = batch["image_grid_thw"]
        with torch.no_grad():
            rows = self.tower(batch["pixel_values"].to(self.device, dtype), grid_thw=grid.to(self.device)).pooler_output
        rows = torch.cat(list(rows)) if isinstance(rows, (list, tuple)) else rows
        parts = rows.split((grid.prod(1) // 4).tolist())
        return torch.stack([part.mean(0, dtype=torch.float32) for part in parts]).cpu()


def photographs(folder: Path, sizes: Sequence[tuple[int, int]], count: int) -> list[Path]:
    """JPEG files that compress as photographs do: soft shapes with a little grain."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    paths = []
    for i in range(count):
        path = folder / f"{i:06d}.jpg"
        if i < UNIQUE:
            width, height = sizes[i % len(sizes)]
            soft = Image.fromarray(rng.integers(0, 256, (height // 32 + 2, width // 32 + 2, 3), dtype=np.uint8))
            shapes = np.asarray(soft.resize((width, height), Image.Resampling.BICUBIC), np.int16)
            grain = rng.normal(0, 6, shapes.shape).astype(np.int16)
            Image.fromarray((shapes + grain).clip(0, 255).astype(np.uint8)).save(path, quality=88)
        else:
            os.link(paths[i % UNIQUE], path)
        paths.append(path)
    return paths


def checkpoint(folder: Path, tower: nn.Module) -> None:
    """A checkpoint of a Qwen3-VL tower in bfloat16, with the processor's description."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.visual.{name}": t.to(torch.bfloat16).cpu() for name, t in tower.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    config: Any = tower.config
    vision = {**config.to_dict(), "model_type": "qwen3_vl"}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", "vision_config": vision}))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))


def own_processor(folder: Path) -> Any:
    """Hugging Face's choice with torchvision, which works on tensors; without it, the same over PIL."""
    import transformers

    try:
        return transformers.AutoImageProcessor.from_pretrained(folder)
    except ImportError:
        return transformers.Qwen2VLImageProcessorPil.from_pretrained(folder)


# --- ours ---


@dataclass(frozen=True, slots=True)
class Done:
    """One share of an archive, and when it began and ended by the clock that all processes see."""

    state: State
    began: float
    ended: float


def serve(device: str, checkpoint: str, jobs: Any, answers: Any) -> None:
    """A process for one GPU: seconds until its graphs are there, then a Done for every job, or a sentence."""
    try:
        start = time.time()
        vit = load(checkpoint, device=device)
        bytes_as = Preparer(vit.spec, processor(vit.spec, checkpoint)).normalisation
        (vit.for_bytes(*bytes_as) if bytes_as else vit).warmup()
        answers.put(time.time() - start)
        while (job := jobs.get()) is not None:
            state = archive.run(job, lambda state: None, vit)
            answers.put(Done(state, time.time() - state.seconds, time.time()))
    except (FusedVitError, OSError, ImportError, torch.OutOfMemoryError) as error:
        answers.put(f"{device}: {type(error).__name__}: {error}")


class Engines:
    """A process for each device, ready for archives; leave the `with` block and they end."""

    def __init__(self, devices: Sequence[str], checkpoint: Path) -> None:
        context, self.checkpoint = multiprocessing.get_context("spawn"), str(checkpoint)
        self.pipes = [(context.Queue(), context.Queue()) for _ in devices]
        self.processes = [
            context.Process(target=serve, args=(device, self.checkpoint, *pipes))
            for device, pipes in zip(devices, self.pipes, strict=True)
        ]
        start = time.time()
        for process in self.processes:
            process.start()
        self.warm_seconds = max(self.answer(i) for i in range(len(devices)))  # weights, kernels and graphs
        self.start_seconds = time.time() - start  # and all that a process imports

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *_: object) -> None:
        for process, (jobs, _) in zip(self.processes, self.pipes, strict=True):
            jobs.put(None)
            process.join(60)
            process.terminate()

    def answer(self, i: int) -> Any:
        """The next of process i. Raises BenchError where it fails or dies."""
        while True:
            try:
                found = self.pipes[i][1].get(timeout=1)
                break
            except queue.Empty:
                if not self.processes[i].is_alive():
                    raise BenchError(f"the process for device {i} died ({self.processes[i].exitcode})") from None
        if isinstance(found, str):
            raise BenchError(found)
        return found

    def embed(self, paths: Sequence[Path], output: Path, count: int, workers: int | None, **options: Any) -> list[Done]:
        """The images of `paths` in equal shares on the first `count` devices, at once."""
        shutil.rmtree(output, ignore_errors=True)
        listing = output.with_suffix(".txt")
        listing.write_text("\n".join(map(str, paths)) + "\n")
        job = Job(
            (str(listing),), self.checkpoint, output, kind="safetensors", workers=workers, parts=count,
            processes=count, **options,
        )  # fmt: skip
        for i in range(count):
            self.pipes[i][0].put(replace(job, part=i))
        return [self.answer(i) for i in range(count)]


STAGES = {"decode": "decode", "preprocess": "prepare", "copy": "copy", "encode": "encode", "write": "write"}


def summary(found: Sequence[Done]) -> dict[str, Any]:
    """images/s over all processes, from the first image that any of them prepared to the last one's last shard."""
    states = [done.state for done in found]
    times = [state.times for state in states if state.times is not None]
    failed = sum(state.failures for state in states)
    if failed or len(times) < len(states):
        raise BenchError(
            f"{failed} images failed: {[unread.reason for state in states for unread in state.failed][:3]}"
        )
    images, seconds = sum(state.done for state in states), max(d.ended for d in found) - min(d.began for d in found)
    sums = Counter[str]()
    for one in times:
        sums.update({name: seconds for name, seconds in asdict(one).items() if name in STAGES.values()})
    return {
        "images": images, "seconds": seconds, "images_s": images / seconds,
        "patches_s": sum(one.patches for one in times) / seconds,
        "waited_for_workers": max(one.start for one in times), "workers": [one.workers for one in times],
        "bound": [one.bound() for one in times], "shares": [one.shares() for one in times],
        "ms_an_image": {name: 1e3 * sums[part] / images for name, part in STAGES.items()},
    }  # fmt: skip


def vectors(output: Path) -> dict[str, torch.Tensor]:
    """Pooled vectors by key."""
    found: dict[str, torch.Tensor] = {}
    for path in output.glob("part-*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= dict(zip(json.loads(file.metadata()["keys"]), file.get_tensor("embedding"), strict=True))
    return found


# --- Hugging Face ---


def read(path: Path) -> Any:
    with Image.open(path) as image:
        return image.convert("RGB")


class Files(torch.utils.data.Dataset[Any]):
    """What a DataLoader's worker does for the peer: decode and preprocess one image."""

    def __init__(self, paths: Sequence[Path], folder: Path) -> None:
        self.paths, self.folder = paths, folder
        self.processor: Any = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Any:
        self.processor = self.processor or own_processor(self.folder)
        batch = self.processor(images=[read(self.paths[i])], return_tensors="pt")
        return batch["pixel_values"].bfloat16(), batch["image_grid_thw"]


def packed(items: Sequence[Any]) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.cat([p for p, _ in items]), "image_grid_thw": torch.cat([g for _, g in items])}


def timed(batches: Iterator[int], seconds: float, ahead: int = 1) -> dict[str, Any]:
    """images/s of an iterator that says how many it has done; time ends it.

    ahead: batches that warm up, or that may have been prepared before the clock starts.
    """
    for _ in range(ahead):
        next(batches, None)
    images, start = 0, time.perf_counter()
    for done in batches:
        images += done
        if time.perf_counter() - start > seconds:
            break
    spent = time.perf_counter() - start
    return {"images": images, "seconds": spent, "images_s": images / spent if images else None}


def in_batches(peer: Peer, paths: Sequence[Path], size: int) -> Iterator[int]:
    for i in range(0, len(paths), size):
        peer.vectors([read(path) for path in paths[i : i + size]])
        yield len(paths[i : i + size])


def with_workers(peer: Peer, paths: Sequence[Path], folder: Path, size: int, workers: int) -> Iterator[int]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.embed", type(peer.processor).__module__])  # once, not in each worker
    loader = torch.utils.data.DataLoader(
        Files(paths, folder), size, num_workers=workers, collate_fn=packed, multiprocessing_context=context,
        pin_memory=peer.device.type == "cuda", in_order=False,
    )  # fmt: skip
    for batch in loader:
        yield len(peer.means(batch))


def theirs(peer: Peer, paths: Sequence[Path], folder: Path, workers: int, seconds: float) -> dict[str, Any]:
    """The plain loop, the best of some batch sizes, and that size behind as many workers as ours has."""
    found: dict[str, Any] = {"loop": timed(in_batches(peer, paths, 1), seconds)}
    tried = {}
    for size in BATCHES:
        if len(paths) >= 2 * size:
            try:
                tried[size] = timed(in_batches(peer, paths, size), seconds)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
    best = max(tried, key=lambda size: tried[size]["images_s"] or 0, default=None)
    if best is not None:
        found["batch"] = tried[best] | {"size": best}
        ahead = min(PREFETCHED * workers, len(paths) // best // 2)
        found["workers"] = timed(with_workers(peer, paths, folder, best, workers), seconds, ahead)
        found["workers"] |= {"size": best, "workers": workers}
    return found | {"processor": type(peer.processor).__name__}


# --- all of it ---


def beside_fp32(output: Path, paths: Sequence[Path], tower: nn.Module, peer: Peer) -> dict[str, float]:
    """Errors of our vectors in `output`, and of the peer's, to those of the tower in fp32."""
    found, exact = vectors(output), replace(peer, tower=tower)
    pictures = [read(path) for path in paths[:CHECKED]]
    with exact_fp32():
        truth = torch.cat([exact.vectors([picture]) for picture in pictures])
    return {
        "error": relative(torch.stack([found[str(path)] for path in paths[:CHECKED]]), truth),
        "their_error": relative(torch.cat([peer.vectors([picture]) for picture in pictures]), truth),
    }


def ours(
    engines: Engines, name: str, place: Path, paths: Sequence[Path], tower: nn.Module, peer: Peer,
    arguments: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """One case on every number of devices, and for 448² once with all rows kept."""
    output, each = place / "out", len(paths) // max(arguments.devices)
    row: dict[str, Any] = {"jpeg_bytes": os.path.getsize(paths[0]), "ours": {}}
    for count in arguments.devices:
        workers = arguments.workers or default_workers(count)
        found = summary(engines.embed(paths[: count * each], output, count, workers, pool="mean"))
        row["ours"][str(count)] = found | {
            "whole_images_s": found["images"] / (engines.start_seconds + found["seconds"])
        }
        if count == arguments.devices[0]:
            row |= beside_fp32(output, paths, tower, peer)
    if name == "448²":
        count, workers = arguments.devices[0], arguments.workers or default_workers(arguments.devices[0])
        row["rows, not pooled"] = summary(engines.embed(paths[: count * each // 2], output, count, workers))
    return row


def table(cases: dict[str, Any]) -> Table:
    found = Table("images", "engine", "images/s", "error", "what bounded it", title="JPEG files to pooled vectors")
    for name, row in cases.items():
        first = next(iter(row["ours"].values()))
        for count, one in row["ours"].items():
            times = f" ({one['images_s'] / first['images_s']:.2f}x)" if one is not first else ""
            found.add_row(name, f"fused-vit embed, {count} GPU", f"{one['images_s']:.0f}{times}", f"{row['error']:.1e}",
                          one["bound"][0])  # fmt: skip
        for kind, one in row.get("theirs", {}).items():
            if isinstance(one, dict) and one["images_s"]:
                said = f"Hugging Face, {kind}" + (f" of {one['size']}" if kind == "batch" else "")
                found.add_row(name, said, f"{one['images_s']:.0f}", f"{row['their_error']:.1e}", "")
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.embed", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/embed.json"))
    parser.add_argument("--cases", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--images", type=int, help=f"of a case, for each GPU; default {IMAGES}")
    parser.add_argument("--devices", nargs="+", type=int, default=[1], help="numbers of GPUs to measure, such as 1 2")
    parser.add_argument("--workers", type=int, help="of each GPU's process; default its share of the cores")
    parser.add_argument("--seconds", type=float, default=3, help="for each way that Hugging Face runs; 0 leaves it out")
    parser.add_argument("--place", type=Path, help="folder for the files; default a temporary one")
    return parser.parse_args(argv)


def devices_of(count: int) -> list[str]:
    """Raises BenchError where there are fewer."""
    if count > torch.cuda.device_count():
        raise BenchError(f"--devices asks for {count} GPUs; torch sees {torch.cuda.device_count()} here")
    return [f"cuda:{i}" for i in range(count)]


def main(argv: Sequence[str] | None = None) -> None:
    from bench.encoder import tower_8b

    arguments = parse(argv)
    device, console = require_gpu(), Console()
    devices = devices_of(max(arguments.devices))
    report: dict[str, Any] = {
        "what": "JPEG files to pooled vectors, Qwen3-VL-8B's tower, random weights, bf16",
        "environment": environment() | {"cores": len(os.sched_getaffinity(0)), "gpus": torch.cuda.device_count()},
        "processor": PROCESSOR, "cases": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=arguments.place) as temporary:
        place, tower = Path(temporary), tower_8b()
        checkpoint(place / "checkpoint", tower)
        for parameter in tower.parameters():
            parameter.data = parameter.data.bfloat16().float()  # as the checkpoint has them
        peer = Peer(rounded(tower), own_processor(place / "checkpoint"), device)
        files = {
            name: photographs(place / name, SIZES[name], max(arguments.devices) * (arguments.images or IMAGES[name]))
            for name in arguments.cases
        }
        with Engines(devices, place / "checkpoint") as engines:
            first = next(iter(files.values()))[: 64 * len(devices)]  # a process's first workers take seconds longer
            engines.embed(first, place / "out", len(devices), arguments.workers, pool="mean")
            report |= {"start_seconds": engines.start_seconds, "warm_seconds": engines.warm_seconds}
            for name, paths in files.items():
                report["cases"][name] = ours(engines, name, place, paths, tower, peer, arguments)
                save(report, arguments.out)
        for name, paths in files.items() if arguments.seconds else ():
            workers = arguments.workers or default_workers()
            report["cases"][name]["theirs"] = theirs(peer, paths, place / "checkpoint", workers, arguments.seconds)
            save(report, arguments.out)
    console.print(table(report["cases"]))


if __name__ == "__main__":
    script(main)
