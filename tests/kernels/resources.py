"""What the compiler makes of every kernel at real sizes, without a GPU: registers, spills, shared memory, tensor cores.

`python -m tests.kernels.resources` rewrites resources.json, the table that test_compile.py holds the kernels to.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fused_vit.buckets import Bucket
from fused_vit.executor import launch_step
from fused_vit.kernels import attention, config, linear, patch_embed, qkv, residual
from fused_vit.plan import Plan, build_plan
from fused_vit.towers import _tensors, parse_config
from fused_vit.weights.pack import pack_tower
from fused_vit.workspace import shapes

TABLE = Path(__file__).with_name("resources.json")
ARCHES = (80, 90, 100)
TENSOR_CORE = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TOWERS = {
    "8B": {"depth": 1, "out_hidden_size": 4096, "deepstack_visual_indexes": [0]},
    "2B": {
        "depth": 1, "out_hidden_size": 2048, "hidden_size": 1024, "intermediate_size": 4096,
        "deepstack_visual_indexes": [0],
    },
}  # fmt: skip
_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}


@dataclass(frozen=True)
class Launch:
    """A kernel with exactly the arguments that a launcher gave it."""

    label: str
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


def launches(tower: str, tokens: int, arch: int) -> Iterator[Launch]:
    """Every distinct launch of a one-block tower in a bucket, recorded instead of run, on tensors without data."""
    spec = parse_config({"model_type": "qwen3_vl", "vision_config": TOWERS[tower]})
    source = {(part, i): torch.empty(shape, device="meta") for part, i, shape in _tensors(spec)}
    weights = pack_tower(spec, lambda part, i: source[part, i], dtype=torch.bfloat16, device="meta")
    plan, seen = build_plan(spec), set()
    tile = config.attention_config(spec.attention.head_dim, torch.bfloat16, arch).block_m
    buffers = meta_buffers(plan, Bucket(tokens, 64), tile)
    for step in plan.steps:
        with record(arch) as recorded:
            launch_step(step, weights, buffers, tile)
        kernel, arguments, options = recorded[0]
        label = f"{tower} {tokens} {step.name.removeprefix('block.0.')}"
        key = (
            kernel.fn.__name__,
            str(sorted((k, str(v)) for k, v in described(kernel, arguments).items())),
            str(options),
        )
        if key not in seen:
            seen.add(key)
            yield Launch(label, kernel, arguments, options)


def meta_buffers(plan: Plan, bucket: Bucket, tile: int) -> dict[str, torch.Tensor]:
    dtypes = {"model": torch.bfloat16, "float32": torch.float32, "int32": torch.int32}
    shape = shapes(plan, bucket, tile)
    return {b.name: torch.empty(shape[b.name], dtype=dtypes[b.dtype], device="meta") for b in plan.buffers}


class record:
    """While entered, launches are appended to a list as (kernel, arguments, options) and devices pose as `arch`."""

    def __init__(self, arch: int) -> None:
        self.list: list[tuple[Any, dict[str, Any], dict[str, int]]] = []
        modules = (attention, linear, patch_embed, qkv, residual)
        self.patches = [mock.patch.object(m, "device_arch", lambda _: arch) for m in modules]
        self.patches.append(mock.patch.object(JITFunction, "run", self.run_in_place(self.list)))

    @staticmethod
    def run_in_place(into: list[Any]) -> Any:
        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
            into.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs, options))

        return run

    def __enter__(self) -> list[Any]:
        for patch in self.patches:
            patch.start()
        return self.list

    def __exit__(self, *_: object) -> None:
        for patch in self.patches:
            patch.stop()


def described(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Argument -> what the compiler specialises on: a pointer type, a constant, or an integer's divisibility."""
    found: dict[str, Any] = {}
    for p in kernel.params:
        value = arguments[p.name]
        if p.is_constexpr or value is None:
            found[p.name] = ("constexpr", value)
        elif isinstance(value, torch.Tensor):
            aligned = value.storage_offset() * value.itemsize % 16 == 0
            found[p.name] = (_TYPES[value.dtype], aligned)
        elif isinstance(value, float):
            found[p.name] = ("fp32", False)
        else:
            found[p.name] = ("i32", value % 16 == 0)
    return found


def compiled(launch: Launch, arch: int) -> Any:
    """The kernel compiled as the launch would, for a GPU that need not be there."""
    about = described(launch.kernel, launch.arguments)
    names = list(about)
    signature = {name: kind for name, (kind, _) in about.items()}
    constants = {(names.index(n),): value for n, (kind, value) in about.items() if kind == "constexpr"}
    aligned = [n for n, (kind, value) in about.items() if kind != "constexpr" and value]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(launch.kernel, signature, constants, attrs)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def resources(launch: Launch, arch: int) -> dict[str, int]:
    """Registers and spilled bytes a thread, shared bytes a program, tensor-core instructions in the PTX."""
    kernel = compiled(launch, arch)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK"))
    mma = len(re.findall(re.escape(TENSOR_CORE[arch]), kernel.asm["ptx"]))
    return {"registers": registers, "stack": stack, "shared": kernel.metadata.shared, "tensor_core": mma}


def cases() -> Iterator[tuple[str, int, Launch]]:
    """(key, arch, launch): every bucket class of the 8B on sm_90, one of each tower on the others."""
    for arch in ARCHES:
        for tower, tokens in (("8B", 256), ("8B", 2048), ("8B", 8192), ("2B", 8192)):
            if arch == 90 or (tokens, tower) == (8192, "8B"):
                for launch in launches(tower, tokens, arch):
                    yield f"sm_{arch} {launch.label}", arch, launch


def main() -> None:
    table = {key: resources(launch, arch) for key, arch, launch in cases()}
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(row)}" for key, row in table.items())
    TABLE.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
