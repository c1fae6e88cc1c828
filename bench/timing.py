"""Timing: medians of whole calls and of device work, and what a result file must say about where it was measured."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch


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


def host_us(call: Callable[[], Any], repeats: int = 30) -> float:
    """Median host time of a call, the device left to catch up in between."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
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

    return {
        "device": torch.cuda.get_device_name(),
        "driver": run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "clocks_mhz": run("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": os.environ.get("COMMIT") or run("git", "rev-parse", "HEAD"),  # COMMIT: where no .git travels along
    }
