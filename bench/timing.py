"""Timing: medians of whole calls and of device work, and what a result file must say about where it was measured."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fused_vit.errors import FusedVitError

Roof = dict[str, float]


class BenchError(FusedVitError):
    """What keeps a benchmark from running."""


def require_gpu() -> torch.device:
    """The device to measure on. Raises BenchError where there is none: a time of the CPU's definition says nothing."""
    if not torch.cuda.is_available():
        raise BenchError("benchmarks time kernels on an NVIDIA GPU, and torch sees none here")
    return torch.device("cuda", torch.cuda.current_device())


def script(main: Callable[[], None]) -> None:
    """Run a module's main; what a user can cause is one line on stderr and exit code 1."""
    try:
        main()
    except FusedVitError as error:
        sys.exit(f"error: {error}")


def judged(error: float, allowed: float, speed: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A result's error and, only where that is at most `allowed` (a NaN is not), its speed."""
    row = {"error": error, "allowed": allowed}
    return row | speed() if error <= allowed else row


def speed(us: float, flops: float, size: float, roof: Roof) -> dict[str, float]:
    """Achieved TFLOP/s and TB/s of one launch, and its floor as a share of its time."""
    return {"us": us, "tflops": flops / us / 1e6, "tbs": size / us / 1e6, "share": floor_us(flops, size, roof) / us}


def floor_us(flops: float, size: float, roof: Roof) -> float:
    """What the measured ceilings allow at best for that many FLOPs and bytes through device memory."""
    return 1e6 * max(flops / (roof["tflops"] * 1e12), size / (roof["tbs"] * 1e12))


def copies(size: float, cache: int) -> int:
    """How many copies of a launch's operands to go round, so that a launch finds none of its own in the L2."""
    return min(64, max(2, -(-2 * cache // max(int(size), 1)) + 1))


def save(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def wall_ms(call: Callable[[], Any], repeats: int = 20, warmup: int = 3) -> dict[str, float]:
    """One call from Python until the device is idle: median, 10th and 90th percentile, milliseconds."""
    for _ in range(warmup):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    times.sort()
    return {"median": statistics.median(times), "p10": times[len(times) // 10], "p90": times[-1 - len(times) // 10]}


def device_ms(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median device time of a call that only enqueues work, by events around it."""
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def graph_us(launches: Sequence[Callable[[], Any]], repeats: int = 20, least: int = 10) -> float:
    """Median device time of one of these launches, in microseconds: all of them in turn, in one graph.

    Results are kept until the graph is whole, so that what allocates gets other memory every time.
    """
    for launch in launches:
        launch()  # compiles, and lets libraries choose
    torch.cuda.synchronize()
    rounds = -(-least // len(launches))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [launch() for _ in range(rounds) for launch in launches]
    graph.replay()
    us = 1e3 * device_ms(graph.replay, repeats) / len(results)
    del results
    return us


def host_us(call: Callable[[], Any], repeats: int = 30, burst: int = 1) -> float:
    """Median host time of a call: after a wait for the device, or in a burst, whose first one does not count."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        for nth in range(burst):
            start = time.perf_counter()
            call()
            if nth or burst == 1:
                times.append(1e6 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    """This device's own: bf16 matmul TFLOP/s on random data, copy TB/s counting bytes read and written."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(big)
    a @ b, other.copy_(big)
    matmul, copy = device_ms(lambda: a @ b), device_ms(lambda: other.copy_(big))
    return {"tflops": 2 * 8192**3 / matmul / 1e9, "tbs": 2 * big.numel() / copy / 1e9}


def environment() -> dict[str, Any]:
    """Device, versions and commit of a measurement."""
    import triton

    def run(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    def asked(what: str) -> str:
        """nvidia-smi's answer about this device. It counts all of them, so it is asked by name."""
        uuid = f"GPU-{torch.cuda.get_device_properties().uuid}"
        return run("nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader", f"--id={uuid}")

    return {
        "device": torch.cuda.get_device_name(),
        "driver": asked("driver_version"),
        "clocks_mhz": asked("clocks.sm,clocks.mem"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": os.environ.get("COMMIT") or run("git", "rev-parse", "HEAD"),  # COMMIT: where no .git travels along
    }
