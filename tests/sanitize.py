"""Sanitize: every kernel's launches under NVIDIA's compute-sanitizer, buffer by buffer, and a report of what it found.

python -m tests.sanitize         # or: make sanitize; needs an NVIDIA GPU and compute-sanitizer, takes some minutes
python -m tests.sanitize --tower "heads of 64" --dtype float16        # what runs under it, without it
python -m tests.sanitize --tool racecheck       # only this tool; the report keeps what the other one said
Plain launches, no graph, of towers of two blocks in a bucket of a few hundred rows. Each buffer is an allocation of its
own, filled with NaN, so that memcheck sees a kernel leave it, and racecheck sees two warps meet in shared memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from bench.timing import environment, save
from fused_vit.buckets import Bucket
from fused_vit.executor import define, launch
from fused_vit.kernels import config, linear, qkv, residual
from fused_vit.packing import items, table
from fused_vit.plan import ALIGN, build_plan
from fused_vit.spec import TowerSpec
from fused_vit.towers import parse_config
from fused_vit.weights.pack import byte_weights
from fused_vit.workspace import addresses, shapes
from tests.gpu.towers import DEVICE, random_weights

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "bench/results/sanitizer.json"
TOOLS = ("memcheck", "racecheck")
DTYPES = ("bfloat16", "float16", "float32")
QWEN3 = {"model_type": "qwen3_vl", "depth": 2, "out_hidden_size": 128, "deepstack_visual_indexes": [0]}
# config.json's vision part: every op in every form, at heads of all kinds and widths of two or three tiles
TOWERS: dict[str, dict[str, Any]] = {
    "heads of 64": {"model_type": "intern_vit_6b", "num_hidden_layers": 2, "qkv_bias": True, "hidden_size": 256,
                    "num_attention_heads": 4, "intermediate_size": 520, "patch_size": 14, "image_size": 56},
    "heads of 72": QWEN3 | {"hidden_size": 144, "num_heads": 2, "intermediate_size": 300},
    "windows, gated, heads of 80": {"model_type": "qwen2_5_vl", "depth": 2, "fullatt_block_indexes": [1],
                                    "hidden_size": 160, "num_heads": 2, "intermediate_size": 300,
                                    "out_hidden_size": 128, "window_size": 112, "patch_size": 14},
    "whole clips, pooled, heads of 72": {"model_type": "kimi_k25", "vt_num_hidden_layers": 2, "vt_hidden_size": 144,
                                         "vt_num_attention_heads": 2, "vt_intermediate_size": 300,
                                         "text_config": {"hidden_size": 128}},
    "heads of 128": QWEN3 | {"hidden_size": 256, "num_heads": 2, "intermediate_size": 520},
    "normed heads of 64, clamped": {"model_type": "glm5_next", "depth": 2, "hidden_size": 128, "num_heads": 2,
                                    "intermediate_size": 300, "out_hidden_size": 128,
                                    "projection_intermediate_size": 200},
}  # fmt: skip
OF_BYTES = {f"{name}, of bytes": name for name in ("heads of 64", "heads of 72")}  # pixels are uint8; else the same
TOWERS |= {of_bytes: TOWERS[name] for of_bytes, name in OF_BYTES.items()}
EVERY_FORM = ("heads of 72", "windows, gated, heads of 80")
GRID = [[1, 14, 18], [1, 2, 2], [2, 6, 10]]
POISON = {"int32": -1, "uint8": 255}  # of the other dtypes NaN
BARRIERS = 64  # of a program: the tools count what nvcc says a kernel has, and these are not of nvcc
ERROR = re.compile(r"^========= ((?:Invalid|Misaligned|Program hit|Error:|Warning:|Potential).*)$", re.M)
RACE = re.compile(r"^========= (?:Error|Warning): Race reported between (.*)\n((?:=========\s+and .*\n)+)", re.M)
SIDE = re.compile(r"(\w+) access at \S+ in (\S+)")
SUMMARY = re.compile(r"^========= (?:ERROR|RACECHECK) SUMMARY: (.*)$", re.M)


def forms_of(tower: str, kind: str) -> list[str]:
    """Of the matmuls: Triton's, and on Hopper what Gluon has, each in two towers that together have every op."""
    if tower in OF_BYTES:
        return ["plain"]  # of their own they have only the patch embedding
    every = range(max(map(len, config._HOPPER.values()))) if tower in EVERY_FORM else range(1)
    return ["plain"] + ([] if kind == "float32" else [f"gluon {n}" for n in every])


@contextmanager
def forced(form: str) -> Iterator[None]:
    """Attention and matmuls in a form; of a Gluon op that has fewer, the rest."""
    number, choose = int(form.split()[-1]) if form != "plain" else 0, config.hopper_config

    def chosen(op: str, *about: Any) -> config.HopperConfig | None:
        forms = config._HOPPER[op]
        return forms[number % len(forms)] if choose(op, *about) else None

    with ExitStack() as stack:
        if form == "plain":
            stack.enter_context(mock.patch.object(config, "has_gluon", lambda: False))
        for module in (linear, qkv, residual):
            stack.enter_context(mock.patch.object(module, "hopper_config", chosen))
        yield


def pixels_of(spec: TowerSpec, patches: int, dtype: torch.dtype) -> torch.Tensor:
    shape, generator = (patches, spec.patch.features), torch.Generator().manual_seed(0)
    if spec.patch.bytes:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return torch.randn(shape, generator=generator).to(dtype)


def launches(tower: str, kind: str) -> None:
    """Eager passes over poisoned workspaces that fit the images but for a few rows, each buffer by itself."""
    fields, dtype = TOWERS[tower], getattr(torch, kind)
    spec = parse_config(fields, projector="text_config" in fields)
    kept = random_weights(spec, dtype, "cpu")
    if tower in OF_BYTES:
        kept = byte_weights(spec, kept, (0.5, 0.4, 0.3), (0.5, 0.3, 0.2))
        spec = replace(spec, patch=replace(spec.patch, bytes=True))
    weights = {name: t.to(DEVICE) for name, t in kept.items()}
    patches = sum(t * h * w for t, h, w in GRID)
    pack, plan = items(spec, GRID, patches), build_plan(spec)
    bucket = Bucket(sum(item.rows for item in pack) + 12, sum(item.segments for item in pack) + 3)
    pixels = pixels_of(spec, patches, dtype)
    exact = pixels if spec.patch.bytes else pixels.float()
    want = define(plan, {name: t.float() for name, t in kept.items()}, exact, pack)
    dtypes = {"model": dtype, "float32": torch.float32, "int32": torch.int32, "uint8": torch.uint8}
    for form in forms_of(tower, kind):
        with forced(form):
            arch = config.device_arch(torch.device(DEVICE))
            tile = config.attention_config(spec.attention.head_dim, dtype, arch).block_m
            buffers = {}
            for buffer in plan.lean().buffers:  # made on the CPU: torch's kernels are none of the sanitizer's business
                shape, poison = shapes(plan, bucket, tile)[buffer.name], POISON.get(buffer.dtype, float("nan"))
                buffers[buffer.name] = torch.full(shape, poison, dtype=dtypes[buffer.dtype])
            integers = torch.tensor(table(pack, tile), dtype=torch.int32)
            buffers["table"][: len(integers)] = integers
            del buffers["pixels"]
            wanted = {name: true for name, true in zip(plan.outputs, want, strict=True) if true is not None}
            places = {name: torch.full_like(wanted[name], float("nan"), dtype=dtype) for name in plan.finals()}
            places["pixels"] = F.pad(pixels, (0, -pixels.shape[1] % ALIGN))  # to the row, as a call brings them
            buffers, places = ({name: t.to(DEVICE) for name, t in group.items()} for group in (buffers, places))
            elsewhere = addresses(plan, bucket, dtype, tile, buffers["table"])
            for name, at in elsewhere.items():
                at.cell.copy_(torch.tensor([places[name].data_ptr()]))
            launch(plan, weights, buffers, tile, elsewhere=elsewhere)
            torch.cuda.synchronize()
        for name, true in wanted.items():
            got = (places if name in places else buffers)[name].cpu()[: len(true)].float()
            error = float((got - true).norm() / true.norm())
            assert error < 0.05, f"{tower}, {kind}, {form}: {name} is {error:.2e} off: no case for a sanitizer"
        print(f"ran {tower}, {kind}, {form}")


def find_sanitizer() -> str | None:
    """compute-sanitizer: on the path, in a CUDA toolkit, or in one of NVIDIA's wheels."""
    homes = [Path(home) for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    homes += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    places = [home / part for home in homes for part in ("bin", "compute-sanitizer")]
    places += [path.parent for folder in sys.path for path in Path(folder or ".").glob("nvidia/**/compute-sanitizer")]
    return shutil.which("compute-sanitizer") or next(
        (found for place in places if (found := shutil.which("compute-sanitizer", path=str(place)))), None
    )


def read(output: str) -> dict[str, Any]:
    """What a sanitizer's output says: its summary, how many errors, and of what kind. No summary is an error too.

    A race's kind is the lines of its two sides.
    """
    summary = SUMMARY.search(output)
    counts = [int(n) for n in re.findall(r"(\d+) (?:error|hazard)", summary[1])] if summary else []
    kinds = Counter(re.sub(r"0x[0-9a-f]+|\d+", "N", line) for line in ERROR.findall(RACE.sub("", output)))
    for sides in RACE.findall(output):
        kinds[" and ".join(f"{access} in {line}" for access, line in SIDE.findall("\n".join(sides)))] += 1
    return {
        "summary": summary[1] if summary else "none",
        "errors": max(counts) if counts else 1,
        "kinds": dict(kinds.most_common(40)),
        "ran": sorted(re.findall(r"^ran (.*)$", output, re.M)),
    }


def checked(sanitizer: str, tool: str, kind: str, seconds: float) -> dict[str, Any]:
    """Every tower in a dtype under one tool, in one process: starting it takes longer than the launches."""
    command = [sanitizer, "--tool", tool, "--target-processes", "application-only", "--print-limit", "10000"]
    command += ["--num-cuda-barriers", str(BARRIERS)]
    command += [sys.executable, "-m", "tests.sanitize", "--dtype", kind]
    settings = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    done = subprocess.run(
        ["timeout", "-k", "5", str(seconds), *command],  # with what it started
        cwd=ROOT, env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    found = read(done.stdout) | {"exit": done.returncode, "seconds": round(time.monotonic() - start, 1)}
    found["complete"] = len(found["ran"]) == sum(len(forms_of(tower, kind)) for tower in TOWERS)
    if bad(found):
        print(f"--- {tool}, {kind}\n{done.stdout[-6000:]}", file=sys.stderr)
    return found


def bad(run: dict[str, Any]) -> bool:
    return bool(run["errors"] or run["exit"] or not run["complete"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=REPORT)
    parser.add_argument("--seconds", type=float, default=240, help="for each run; all of them at once")
    parser.add_argument("--tool", action="append", help=f"default {' and '.join(TOOLS)}; also synccheck, initcheck")
    parser.add_argument("--dtype", choices=DTYPES, help="only launch, in this process")
    parser.add_argument("--tower", choices=TOWERS, help="with --dtype: only this one")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: kernels are sanitized on an NVIDIA GPU, and torch sees none here")
    if arguments.dtype:
        for tower in [arguments.tower] if arguments.tower else TOWERS:
            launches(tower, arguments.dtype)
        return
    sanitizer = find_sanitizer()
    if sanitizer is None:
        sys.exit("error: compute-sanitizer is neither on the path nor in a CUDA toolkit; it comes with NVIDIA's")
    version = subprocess.run([sanitizer, "--version"], capture_output=True, text=True).stdout
    about = environment() | {"compute-sanitizer": (re.findall(r"[Vv]ersion (\S+)", version) or ["unknown"])[0]}
    jobs = [(tool, kind) for tool in arguments.tool or TOOLS for kind in DTYPES]
    with ThreadPoolExecutor(8) as compiling:  # outside the sanitizer, into Triton's cache
        parts = [[sys.executable, "-m", "tests.sanitize", "--dtype", k, "--tower", t] for k in DTYPES for t in TOWERS]
        list(compiling.map(lambda part: subprocess.run(part, cwd=ROOT, check=True, stdout=subprocess.DEVNULL), parts))
    with ThreadPoolExecutor(len(jobs)) as threads:
        found = list(threads.map(lambda job: checked(sanitizer, *job, arguments.seconds), jobs))
    runs = {f"{tool}, {kind}": {"commit": about["commit"]} | run for (tool, kind), run in zip(jobs, found, strict=True)}
    before = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else {}
    save({"environment": about, "runs": before | runs}, arguments.out)
    for name, run in runs.items():
        print(f"{name}: {run['summary']} in {run['seconds']} s")
    sys.exit(any(map(bad, runs.values())))


if __name__ == "__main__":
    main()
