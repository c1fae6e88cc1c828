"""What the compiler makes of every kernel at real sizes, without a GPU: registers, spills, shared memory, tensor cores.

`python -m tests.kernels.resources` rewrites resources.json, the table that test_compile.py holds the kernels to.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fused_vit.buckets import Bucket
from fused_vit.executor import launch as launch_all
from fused_vit.kernels import attention, config, linear, patch_embed, qkv, residual
from fused_vit.layouts import parts
from fused_vit.plan import Plan, build_plan
from fused_vit.towers import parse_config
from fused_vit.weights.pack import byte_weights, pack_tower
from fused_vit.workspace import Workspace, addresses, shapes

TABLE = Path(__file__).with_name("resources.json")
ARCHES = (80, 90, 100)
TENSOR_CORE = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# One block of each kind that a tower has, at published sizes: config.json's vision part (and what a projector needs).
QWEN2_5 = {"hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 3584}
TOWERS: dict[str, dict[str, Any]] = {
    "8B": {"model_type": "qwen3_vl", "depth": 1, "out_hidden_size": 4096, "deepstack_visual_indexes": [0]},
    "2B": {
        "model_type": "qwen3_vl", "depth": 1, "out_hidden_size": 2048, "hidden_size": 1024, "intermediate_size": 4096,
        "deepstack_visual_indexes": [0],
    },
    "Qwen3.5-0.8B": {
        "model_type": "qwen3_5", "depth": 1, "hidden_size": 768, "num_heads": 12, "intermediate_size": 3072,
        "out_hidden_size": 1024,
    },
    "Qwen2.5-VL-7B": {"model_type": "qwen2_5_vl", "depth": 2, "fullatt_block_indexes": [1], **QWEN2_5},
    "EXAONE": {
        "model_type": "exaone4_5", "depth": 1, "fullatt_block_indexes": [0], **QWEN2_5, "num_key_value_heads": 8,
    },
    "GLM-4.1V": {"model_type": "glm4v", "depth": 1},
    "GLM-5.3-Flash": {"model_type": "glm5_next", "depth": 1, "out_hidden_size": 4096},
    "Kimi-K2.5": {"model_type": "kimi_k25", "vt_num_hidden_layers": 1, "text_config": {"hidden_size": 7168}},
    "InternViT": {"model_type": "intern_vit_6b", "num_hidden_layers": 1, "qkv_bias": True},
    "SigLIP": {
        "model_type": "siglip_vision_model", "num_hidden_layers": 1, "hidden_size": 1152, "num_attention_heads": 16,
        "intermediate_size": 4304, "patch_size": 14, "image_size": 378,
    },
}  # fmt: skip
TOWERS["8B of bytes"] = TOWERS["8B"]
TOWERS["GLM-4.1V of bytes"] = TOWERS["GLM-4.1V"]
OF_BYTES = ("8B of bytes", "GLM-4.1V of bytes")  # pixels are uint8
PLAIN = ("unfold", "norm", "pool")  # kernels that multiply no matrices
_TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.uint8: "*u8",
    torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel with exactly the arguments that a launcher gave it."""

    label: str
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]
    grid: tuple[int, ...]


def launches(tower: str, tokens: int, arch: int) -> Iterator[Launch]:
    """Every launch of a tower of a block or two in a bucket, recorded instead of run, on tensors without data."""
    plan, weights = planned(tower, "meta")
    tile = config.attention_config(plan.spec.attention.head_dim, torch.bfloat16, arch).block_m
    yield from recorded_launches(tower, plan, weights, meta_buffers(plan, Bucket(tokens, 64), tile), tile, arch)


def owned_launches(tower: str, tokens: int, arch: int) -> tuple[set[int], Iterator[Launch]]:
    """The same in a workspace on the CPU, and where the memory of workspace and weights begins."""
    plan, weights = planned(tower, "cpu")
    tile = config.attention_config(plan.spec.attention.head_dim, torch.bfloat16, arch).block_m
    workspace = Workspace(plan, [Bucket(tokens, 64)], torch.bfloat16, torch.device("cpu"), tile)
    owned = {storage(t) for t in (workspace.slab, *weights.values())}
    buffers = workspace.buffers(Bucket(tokens, 64))
    return owned, recorded_launches(tower, plan, weights, buffers, tile, arch)


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in a launch's arguments, in tuples and behind descriptors too."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, TensorDescriptor):
        yield value.base
    elif isinstance(value, dict | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(item)


def planned(tower: str, device: str) -> tuple[Plan, dict[str, torch.Tensor]]:
    """A tower's plan and packed weights, without values."""
    fields = TOWERS[tower]
    spec = parse_config(fields, projector="text_config" in fields)
    source = {(p.name, p.block): torch.empty(p.shape, device=device) for p in parts(spec)}
    weights = pack_tower(spec, lambda part, i: source[part, i], dtype=torch.bfloat16, device=device)
    if tower in OF_BYTES:
        weights = byte_weights(spec, weights, [0.5] * 3, [0.5] * 3)
        spec = replace(spec, patch=replace(spec.patch, bytes=True))
    return build_plan(spec), weights


def recorded_launches(
    tower: str,
    plan: Plan,
    weights: Mapping[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
    tile: int,
    arch: int,
) -> Iterator[Launch]:
    tokens = buffers["pixels"].shape[0]
    elsewhere = addresses(plan, Bucket(tokens, 64), torch.bfloat16, tile, buffers["table"])
    with record(arch) as recorded:
        launch_all(plan, weights, buffers, tile, elsewhere=elsewhere)
    for step, found in zip(plan.steps, recorded, strict=True):
        label = f"{tower} {tokens} {step.op} {step.name.removeprefix('block.0.')}"
        yield Launch(label, *found)


def meta_buffers(plan: Plan, bucket: Bucket, tile: int) -> dict[str, torch.Tensor]:
    dtypes = {"model": torch.bfloat16, "float32": torch.float32, "int32": torch.int32, "uint8": torch.uint8}
    shape = shapes(plan, bucket, tile)
    return {b.name: torch.empty(shape[b.name], dtype=dtypes[b.dtype], device="meta") for b in plan.buffers}


class record:
    """While entered, launches are appended to a list as the fields of Launch, and devices pose as `arch`."""

    def __init__(self, arch: int) -> None:
        self.list: list[tuple[Any, dict[str, Any], dict[str, int], tuple[int, ...]]] = []
        modules = (attention, linear, patch_embed, qkv, residual)
        self.patches = [mock.patch.object(m, "device_arch", lambda _: arch) for m in modules]
        self.patches.append(mock.patch.object(JITFunction, "run", self.run_in_place(self.list)))

    @staticmethod
    def run_in_place(into: list[Any]) -> Any:
        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages", "maxnreg") if k in kwargs}
            into.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs, options, grid))

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
        elif isinstance(value, TensorDescriptor):
            found[p.name] = (str(value.block_shape), str(value.layout))
        elif isinstance(value, tuple):
            found[p.name] = (", ".join(_TYPES[v.dtype] if isinstance(v, torch.Tensor) else str(v) for v in value), "")
        elif isinstance(value, float):
            found[p.name] = ("fp32", False)
        else:
            found[p.name] = ("i32", value % 16 == 0)
    return found


class _Target:
    """A driver without a GPU: what triton's JIT asks before it compiles."""

    def __init__(self, arch: int) -> None:
        self.get_current_target = lambda: GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(launch: Launch, arch: int) -> Any:
    """The kernel compiled as the launch would, for a GPU that need not be there."""
    if isinstance(launch.kernel, GluonJITFunction):  # its descriptors have types that only its own JIT spells
        with mock.patch.object(driver, "_active", _Target(arch)):
            return launch.kernel.warmup(grid=(1,), **launch.arguments, **launch.options)
    about = described(launch.kernel, launch.arguments)
    names = list(about)
    signature = {name: kind for name, (kind, _) in about.items()}
    constants = {(names.index(n),): value for n, (kind, value) in about.items() if kind == "constexpr"}
    aligned = [n for n, (kind, value) in about.items() if kind != "constexpr" and value]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(launch.kernel, signature, constants, attrs)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def resources(kernel: Any, arch: int) -> dict[str, int]:
    """Registers and spilled bytes a thread, shared bytes a program, tensor-core instructions in the PTX."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK"))
    mma = len(re.findall(re.escape(TENSOR_CORE[arch]), kernel.asm["ptx"]))
    return {"registers": registers, "stack": stack, "shared": kernel.metadata.shared, "tensor_core": mma}


def reused_barriers(kernel: Any) -> set[int]:
    """Addresses of barriers in shared memory whose bytes hold plain data later.

    PTX forbids it of a barrier that is still valid, and an H100 that preempts the kernel puts the barrier back.
    """
    ptx = kernel.asm["ptx"]
    offsets = {name: int(value) for name, value in re.findall(r"add\.s32 \t(%r\d+), %r\d+, (\d+);", ptx)}
    barriers = re.findall(r"mbarrier\.init\.shared::cta\.b64 \[(%r\d+)\]", ptx)
    stores = re.findall(r"st\.shared(?:\.v(\d))?\.b(\d+) \t\[(?:%r\d+|global_smem)\+(\d+)\]", ptx)
    plain = {int(at) + i for lanes, bits, at in stores for i in range(int(lanes or 1) * int(bits) // 8)}
    invalidated = re.findall(r"mbarrier\.inval\.shared::cta\.b64 \[(%r\d+)\]", ptx)
    return {offsets[barrier] for barrier in set(barriers) - set(invalidated)} & plain


def cases() -> Iterator[tuple[str, int, Launch]]:
    """(key, arch, launch): the 8B in every class of bucket on sm_90, the rest in a large one; each kernel form once.

    Towers share most forms; on the other architectures those of the 8B and the most unlike towers stand for them.
    """
    seen = set()
    for arch in ARCHES:
        for tower in TOWERS:
            for tokens in (64, 256, 896, 1024, 8192) if (arch, tower) == (90, "8B") else (8192,):
                if arch != 90 and tower not in ("8B", "Qwen2.5-VL-7B", "GLM-5.3-Flash", "InternViT"):
                    continue
                for launch in launches(tower, tokens, arch):
                    about = sorted((k, str(v)) for k, v in described(launch.kernel, launch.arguments).items())
                    form = (arch, launch.kernel.fn.__name__, str(about), str(launch.options))
                    if form not in seen:
                        seen.add(form)
                        yield f"sm_{arch} {launch.label}", arch, launch


def main() -> None:
    table = {key: resources(compiled(launch, arch), arch) for key, arch, launch in cases()}
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(row)}" for key, row in table.items())
    TABLE.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
