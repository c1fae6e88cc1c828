"""Tune: time candidate configurations of every matmul and of attention, and print rows for kernels/config.py.

Each candidate is checked against the definition before it is timed; a wrong one is reported, never timed.
python -m bench.tune --out bench/results/tune.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

from bench.timing import environment
from fused_vit.kernels import attention as attention_file
from fused_vit.kernels import linear as linear_file
from fused_vit.kernels import qkv as qkv_file
from fused_vit.kernels import residual as residual_file
from fused_vit.kernels.config import AttentionConfig, GemmConfig

GEMMS = [
    GemmConfig(m, n, k, w, s)
    for (m, n, w), (k, s) in product(
        [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8)],
        [(64, 3), (64, 4), (128, 2)],
    )
]
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
    cos, sin = torch.randn(2, rows, 36, device="cuda")
    count = torch.tensor([rows], device="cuda", dtype=torch.int32)

    def weights(n: int, k: int) -> list[torch.Tensor]:
        w = torch.randn(n, k, **bf16) * k**-0.5
        return [w, torch.randn(n, device="cuda"), w.float().sum(1)[None]]

    q, p, up, down = weights(3456, WIDTH), weights(WIDTH, WIDTH), weights(MLP, WIDTH), weights(WIDTH, MLP)
    heads, out, y = torch.empty(48, rows, 72, **bf16), torch.empty_like(x), torch.empty(rows, MLP, **bf16)
    new = torch.empty(2, 18, rows, device="cuda")
    norm = {"eps": 1e-6, "centred": True}
    rope = {"head_dim": 72, "rotated": 32, **norm}
    mlp = {"merge": 1, "groups": 1, **norm, "activation": "gelu_tanh"}
    return {
        "qkv": (qkv_file, lambda: qkv_file.qkv(heads, x, sums, cos, sin, *q, **rope, count=count), heads,
                lambda: qkv_file.qkv_ref(x, sums, cos, sin, *q, **rope)),
        "proj": (residual_file, lambda: residual_file.residual(out, new, x, x, *p[:2], count=count), out,
                 lambda: residual_file.residual_ref(x, x, *p[:2])[0]),
        "fc1": (linear_file, lambda: linear_file.linear(y, x, sums, *up, **mlp, count=count), y,
                lambda: linear_file.linear_ref(x, sums, *up, **mlp)),
        "fc2": (residual_file, lambda: residual_file.residual(out, new, x, hidden, *down[:2], count=count), out,
                lambda: residual_file.residual_ref(x, hidden, *down[:2])[0]),
    }  # fmt: skip


def timed(
    label: str, config: Any, patch: Any, launch: Any, result: torch.Tensor, truth: torch.Tensor
) -> dict[str, Any] | None:
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("bench/results/tune.json"))
    parser.add_argument("--rows", type=int, nargs="*", default=[256, 784, 4096])
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    for rows in arguments.rows:
        for name, (module, launch, result, reference) in matmuls(rows).items():
            truth = reference()
            for config in GEMMS:
                patch = mock.patch.object(module, "gemm_config", lambda *_, c=config: c)
                results.append(timed(f"{name} {rows}", config, patch, launch, result, truth) or {})
    for name, lengths in attentions().items():
        rows = sum(lengths)
        qkv = torch.randn(48, rows, 72, device="cuda", dtype=torch.bfloat16)
        out = torch.empty(rows, WIDTH, device="cuda", dtype=torch.bfloat16)
        for config in ATTENTIONS:
            tiles, start = [], 0
            for n in lengths:
                tiles += [
                    (q, min(q + config.block_m, start + n), start, start + n)
                    for q in range(start, start + n, config.block_m)
                ]
                start += n
            table = torch.tensor(tiles, dtype=torch.int32, device="cuda")
            count = torch.tensor([len(tiles)], dtype=torch.int32, device="cuda")
            truth = attention_file.attention_ref(qkv, table, heads=HEADS)
            patch = mock.patch.object(attention_file, "attention_config", lambda *_, c=config: c)
            call = partial(attention_file.attention, out, qkv, table, heads=HEADS, count=count)
            results.append(timed(f"attention {name}", config, patch, call, out, truth) or {})
    for case in dict.fromkeys(r["case"] for r in results):
        best = sorted((r for r in results if r["case"] == case and "us" in r), key=lambda r: r["us"])[:4]
        print(case, "; ".join(f"{r['us']:.1f} us {tuple(r['config'].values())}" for r in best), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"environment": environment(), "results": results}) + "\n")


if __name__ == "__main__":
    main()
