"""JPEG files to pooled vectors, end to end: `fused-vit embed` beside Hugging Face's processor and tower.

python -m bench.embed --devices 1 2 --out bench/results/embed.json

Everything is made here: photographs, random weights of Qwen3-VL-8B's tower and its preprocessor_config.json. Hugging
Face runs three ways: image by image, in its best batch, and with as many DataLoader workers as ours has.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from bench.timing import environment, require_gpu, save, script
from fused_vit.parity import exact_fp32, relative
from fused_vit.preparing import default_workers

SIZES = {  # (width, height) of a case's photographs, which take turns
    "224²": [(224, 224)],
    "448²": [(448, 448)],
    "mixed": [(224, 224), (640, 480), (448, 448), (480, 640), (1024, 768), (320, 240), (1280, 720), (800, 600)],
}
UNIQUE = 64  # photographs; the others are links to them, since decoding costs the same
BATCHES = (8, 32, 128)  # that Hugging Face tries
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


def ours(folder: Path, checkpoint: Path, output: Path, options: Sequence[object]) -> dict[str, Any]:
    """One run of the command line: images/s from the first prepared image to the last shard; seconds with the start."""
    shutil.rmtree(output, ignore_errors=True)
    arguments = ("--checkpoint", checkpoint, "-o", output, "--format", "safetensors", *options)
    command = [sys.executable, "-m", "fused_vit.cli", "embed", str(folder), *map(str, arguments)]
    root = Path(__file__).parent.parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    total = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    reports = [json.loads(path.read_text()) for path in sorted(output.glob("_report-*.json"))]
    images, seconds = sum(report["done"] for report in reports), max(report["seconds"] for report in reports)
    return {
        "images": images, "images_s": images / seconds, "seconds": seconds, "total_seconds": total,
        "bound": [report["bound"] for report in reports], "shares": [report["shares"] for report in reports],
        "workers": [report["times"]["workers"] for report in reports],
        "patches": sum(report["times"]["patches"] for report in reports),
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


def timed(batches: Iterator[int], seconds: float) -> dict[str, Any]:
    """images/s of an iterator that says how many it has done; the first batch warms up, and time ends it."""
    next(batches)
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
    loader = torch.utils.data.DataLoader(
        Files(paths, folder), size, num_workers=workers, collate_fn=packed, multiprocessing_context="spawn",
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
        found["workers"] = timed(with_workers(peer, paths, folder, min(best, 32), workers), seconds)
        found["workers"] |= {"size": min(best, 32), "workers": workers}
    return found | {"processor": type(peer.processor).__name__}


# --- all of it ---


def measure(
    name: str, place: Path, tower: nn.Module, peer: Peer, arguments: argparse.Namespace, device: str
) -> dict[str, Any]:
    paths = photographs(place / name, SIZES[name], arguments.images)
    folder, row = place / "checkpoint", {"images": len(paths), "ours": {}}
    each = os.path.getsize(paths[0])
    for count in arguments.devices:
        where = ["--device", device] if count == 1 else ["--devices", ",".join([str(i) for i in range(count)])]
        workers = ["--workers", arguments.workers] if arguments.workers is not None else []
        row["ours"][str(count)] = ours(place / name, folder, place / "out", [*where, *workers, "--pool", "mean"])
        if count == 1:
            found = vectors(place / "out")
            exact = Peer(tower, peer.processor, peer.device)
            pictures = [read(path) for path in paths[:CHECKED]]
            with exact_fp32():
                truth = torch.cat([exact.vectors([picture]) for picture in pictures])
            row["error"] = relative(torch.stack([found[str(path)] for path in paths[:CHECKED]]), truth)
            row["their_error"] = relative(torch.cat([peer.vectors([picture]) for picture in pictures]), truth)
    if name == "448²":
        row["rows, not pooled"] = ours(place / name, folder, place / "out", ["--device", device])
    workers = arguments.workers or default_workers()
    row["theirs"] = theirs(peer, paths, folder, workers, arguments.seconds)
    return row | {"jpeg_bytes": each}


def table(cases: dict[str, Any]) -> Table:
    found = Table("images", "engine", "images/s", "error", "what bounded it", title="JPEG files to pooled vectors")
    for name, row in cases.items():
        for count, one in row["ours"].items():
            found.add_row(name, f"fused-vit embed, {count} GPU", f"{one['images_s']:.0f}", f"{row['error']:.1e}",
                          one["bound"][0])  # fmt: skip
        for kind, one in row["theirs"].items():
            if isinstance(one, dict) and one["images_s"]:
                said = f"Hugging Face, {kind}" + (f" of {one['size']}" if kind == "batch" else "")
                found.add_row(name, said, f"{one['images_s']:.0f}", f"{row['their_error']:.1e}", "")
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/embed.json"))
    parser.add_argument("--cases", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--images", type=int, default=4000, help="of a case")
    parser.add_argument("--devices", nargs="+", type=int, default=[1], help="numbers of GPUs to measure, such as 1 2")
    parser.add_argument("--workers", type=int, help="of one process; default its share of the cores")
    parser.add_argument("--seconds", type=float, default=15, help="at most for each way that Hugging Face runs")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    from bench.encoder import tower_8b

    arguments = parse(argv)
    device, console = require_gpu(), Console()
    report: dict[str, Any] = {
        "what": "JPEG files to pooled vectors, Qwen3-VL-8B's tower, random weights, bf16",
        "environment": environment() | {"cores": len(os.sched_getaffinity(0)), "gpus": torch.cuda.device_count()},
        "processor": PROCESSOR, "cases": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        place, tower = Path(temporary), tower_8b()
        checkpoint(place / "checkpoint", tower)
        for parameter in tower.parameters():
            parameter.data = parameter.data.bfloat16().float()  # as the checkpoint has them
        peer = Peer(rounded(tower), own_processor(place / "checkpoint"), device)
        for name in arguments.cases:
            report["cases"][name] = measure(name, place, tower, peer, arguments, str(device))
            save(report, arguments.out)
    console.print(table(report["cases"]))


if __name__ == "__main__":
    script(main)
