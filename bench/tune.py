"""Tune: time candidate configurations of every matmul and of attention, and print rows for kernels/config.py.

Each candidate is checked against the definition before it is timed; a wrong one is reported, never timed.
python -m bench.tune --out bench/results/tune.json        # or: fused-vit bench tune
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.table import Table

from bench.timing import environment, require_gpu, save, script
from fused_vit.kernels import attention as attention_file
from fused_vit.kernels import linear as linear_file
from fused_vit.kernels import qkv as qkv_file
from fused_vit.kernels import residual as residual_file
from fused_vit.kernels.config import AttentionConfig, GemmConfig, HopperConfig, device_arch
from fused_vit.spec import AttentionSpec, RopeSpec
from fused_vit.weights.fold import rotary_frequencies

GEMMS = [
    GemmConfig(m, n, k, w, s)
    for (m, n, w), (k, s) in product(
        [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8)],
        [(64, 3), (64, 4), (128, 2)],
    )
]
HOPPERS = [
    HopperConfig(128, 128, 2, 5), HopperConfig(128, 192, 2, 4), HopperConfig(192, 192, 3, 4),
    HopperConfig(192, 128, 3, 4), HopperConfig(256, 128, 1, 4), HopperConfig(128, 192, 1, 5),
    HopperConfig(128, 128, 1, 5), HopperConfig(128, 64, 1, 6), HopperConfig(128, 64, 2, 6),
]  # fmt: skip
ATTENTIONS = [
    AttentionConfig(m, n, w, s) for m, n, w in [(64, 64, 4), (128, 64, 8), (128, 128, 8), (64, 128, 4)] for s in (2, 3)
]
WIDTH, HEADS, MLP = 1152, 16, 4352


def milliseconds(call: Any) -> float:
    """Median time of one launch inside a graph of many. Buffers do not rotate: small operands stay in the L2."""
    return float(triton.testing.do_bench_cudagraph(call, rep=30, return_mode="median"))


def matmuls(rows: int) -> dict[str, Any]:
    """name -> (module to patch, launch, result tensor, definition) at this many rows."""
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    x, hidden = torch.randn(rows, WIDTH, **bf16), torch.randn(rows, MLP, **bf16)
    sums = torch.stack([x.float().sum(1), x.float().square().sum(1)])[:, None].repeat(1, 18, 1) / 18
    places = torch.randint(128, (2, rows), device="cuda").float()
    heads_of = AttentionSpec(16, 16, 72)
    frequencies = rotary_frequencies(RopeSpec(), heads_of, torch.float32).cuda()
    count = torch.tensor([rows], device="cuda", dtype=torch.int32)

    def weights(n: int, k: int) -> list[torch.Tensor]:
        w = torch.randn(n, k, **bf16) * k**-0.5
        return [w, torch.randn(n, device="cuda"), w.float().sum(1)]

    q, p, up, down = weights(3456, WIDTH), weights(WIDTH, WIDTH), weights(MLP, WIDTH), weights(WIDTH, MLP)
    merge_up, merge_down = weights(4 * WIDTH, 4 * WIDTH), weights(4096, 4 * WIDTH)
    heads, out, y = torch.empty(48, rows, 80, **bf16), torch.empty_like(x), torch.empty(rows, MLP, **bf16)
    merging, pooled = torch.empty(rows // 4, 4 * WIDTH, **bf16), torch.empty(rows // 4, 4096, **bf16)
    wide, merged = x.view(-1, 4 * WIDTH), torch.tensor([rows // 4], device="cuda", dtype=torch.int32)
    new = torch.empty(2, 18, rows, device="cuda")
    norm: dict[str, Any] = {"eps": 1e-6, "centred": True}
    rope: dict[str, Any] = {"head_dim": 72, "rotated": 32, "normed": 0, "head_eps": 0.0, **norm}
    plain: dict[str, Any] = {"gated": False, "limit": None, **norm}
    mlp: dict[str, Any] = {"activation": "gelu_tanh", **plain}
    first, second = {**mlp, "activation": "gelu"}, {**mlp, "activation": "none"}
    return {
        "qkv": (qkv_file, lambda: qkv_file.qkv(heads, x, sums, places, *q, None, frequencies, **rope, count=count),
                heads,
                lambda: qkv_file.qkv_ref(x, sums, places, *q, None, frequencies, **rope)),
        "proj": (residual_file, lambda: residual_file.residual(out, new, x, x, *p[:2], count=count), out,
                 lambda: residual_file.residual_ref(x, x, *p[:2])[0]),
        "fc1": (linear_file, lambda: linear_file.linear(y, x, sums, None, *up, **mlp, count=count), y,
                lambda: linear_file.linear_ref(x, sums, None, *up, **mlp)),
        "fc2": (residual_file, lambda: residual_file.residual(out, new, x, hidden, *down[:2], count=count), out,
                lambda: residual_file.residual_ref(x, hidden, *down[:2])[0]),
        "merger.fc1": (
            linear_file, lambda: linear_file.linear(merging, wide, None, None, *merge_up[:2], None, **first,
                                                    count=merged), merging,
            lambda: linear_file.linear_ref(wide, None, None, *merge_up[:2], None, **first)),
        "merger.fc2": (
            linear_file, lambda: linear_file.linear(pooled, wide, None, None, *merge_down[:2], None, **second,
                                                    count=merged), pooled,
            lambda: linear_file.linear_ref(wide, None, None, *merge_down[:2], None, **second)),
    }  # fmt: skip


@contextmanager
def forced(module: Any, config: GemmConfig | HopperConfig) -> Iterator[None]:
    """A module's matmul runs in this configuration, in the form that it belongs to."""
    hopper = config if isinstance(config, HopperConfig) else None
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, "hopper_config", lambda *_: hopper))
        stack.enter_context(mock.patch.object(module, "gemm_config", lambda *_: config))
        yield


def timed(
    label: str, config: Any, patch: Any, launch: Any, result: torch.Tensor, truth: torch.Tensor
) -> dict[str, Any]:
    with patch:
        try:
            result.fill_(float("nan"))
            launch()
            error = float((result.float() - truth.float()).norm() / truth.float().norm())
            if not error < 1e-2:
                print(f"{label} {config}: WRONG, relative error {error:.1e}")
                return {"case": label, "config": asdict(config), "error": error}
            return {"case": label, "config": asdict(config), "error": error, "us": 1e3 * milliseconds(launch)}
        except (triton.runtime.errors.OutOfResources, RuntimeError) as failure:
            return {"case": label, "config": asdict(config), "failure": str(failure)[:80]}


def attentions() -> dict[str, Any]:
    """name -> segment lengths."""
    return {"S=784 x1": [784], "S=784 x8": [784] * 8, "S=4096 x1": [4096], "S=112 x100": [112] * 100}


def best(results: Sequence[dict[str, Any]], most: int = 4) -> Table:
    """The fastest right candidates of each case, as rows of kernels/config.py."""
    table = Table("case", "us", "error", "configuration")
    for case in dict.fromkeys(r["case"] for r in results):
        for r in sorted((r for r in results if r["case"] == case and "us" in r), key=lambda r: r["us"])[:most]:
            configuration = ", ".join(f"{k}={v}" for k, v in r["config"].items())
            table.add_row(case, f"{r['us']:.1f}", f"{r['error']:.1e}", configuration)
        table.add_section()
    return table


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fused-vit bench tune", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/tune.json"))
    parser.add_argument("--rows", type=int, nargs="*", default=[256, 1024, 4096, 8160])
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    require_gpu()
    results: list[dict[str, Any]] = []
    gemms: list[GemmConfig | HopperConfig] = [*GEMMS, *(HOPPERS if device_arch(torch.device("cuda", 0)) == 90 else [])]
    for rows in arguments.rows:
        for name, (module, launch, result, reference) in matmuls(rows).items():
            truth = reference()
            for config in gemms:
                results.append(timed(f"{name} {rows}", config, forced(module, config), launch, result, truth))
    for name, lengths in attentions().items():
        rows = sum(lengths)
        qkv = torch.randn(48, rows, 80, device="cuda", dtype=torch.bfloat16)
        qkv[:, :, 72:] = torch.eye(1, 8)  # what kernels.qkv leaves behind a head
        out = torch.empty(rows, WIDTH, device="cuda", dtype=torch.bfloat16)
        for attention in ATTENTIONS:
            tiles, start = [], 0
            for n in lengths:
                tiles += [
                    (q, min(q + attention.block_m, start + n), start, start + n)
                    for q in range(start, start + n, attention.block_m)
                ]
                start += n
            table = torch.tensor(tiles, dtype=torch.int32, device="cuda")
            count = torch.tensor([len(tiles)], dtype=torch.int32, device="cuda")
            truth = attention_file.attention_ref(qkv, table, heads=HEADS, head_dim=72, windowed=False)
            patch = mock.patch.object(attention_file, "attention_config", lambda *_, c=attention: c)
            call = partial(
                attention_file.attention, out, qkv, table, heads=HEADS, head_dim=72, windowed=False, count=count
            )
            results.append(timed(f"attention {name}", attention, patch, call, out, truth))
    Console().print(best(results))
    save({"environment": environment(), "results": results}, arguments.out)


if __name__ == "__main__":
    script(main)
