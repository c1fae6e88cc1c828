"""FusedViT: a vision tower that runs as Triton kernels in CUDA graphs, or as the plan's definition on a CPU."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .buckets import Bucket, as_buckets, choose, ladder
from .errors import InputError
from .executor import define, launch
from .graphs import BucketGraph, capture
from .output import VisionOutput
from .packing import Item, items, split, table
from .plan import Plan, build_plan
from .spec import TowerSpec
from .towers import find_tower, parse_config
from .weights.checkpoint import Checkpoint
from .weights.pack import pack_tower
from .workspace import Workspace

logger = logging.getLogger("fused_vit")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Grid = torch.Tensor | Sequence[Sequence[int]]
Buckets = Iterable[Bucket | int | Sequence[int]]


def load(
    path: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    buckets: Buckets | None = None,
    max_tokens: int = 16384,
    revision: str | None = None,
) -> FusedViT:
    """A tower from a checkpoint: a folder, a .safetensors file with config.json beside it, or a hub id.

    Only the tower's tensors are read, from only the shards that hold them.

    Args:
        device: default the current CUDA device, or the CPU where there is none.
        dtype: bfloat16, float16 or float32; default the checkpoint's own (float32 on a CPU).
        buckets: sizes to capture, as tokens or (tokens, segments); default powers of two up to max_tokens.
        max_tokens: patches of the largest default bucket.
        revision: of a hub id.

    Raises:
        SpecError: the config describes no supported tower. CheckpointError: the files do not hold it.
    """
    checkpoint = Checkpoint.open(path, revision=revision)
    tower, spec = find_tower(checkpoint.config), parse_config(checkpoint.config)
    tensors = checkpoint.tower(tower.prefixes, tower.expected(spec))
    place = _device(device)
    kept = dtype or (torch.float32 if place.type == "cpu" else tensors[tower.name("merger.fc1.weight")].dtype)
    weights = pack_tower(spec, lambda part, i: tensors[tower.name(part, i)], dtype=_checked(kept), device=place)
    return FusedViT(spec, weights, buckets=buckets, max_tokens=max_tokens)


def _device(device: torch.device | str | None) -> torch.device:
    place = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    if place.type not in ("cuda", "cpu"):
        raise InputError(f"device is {place}; supported: cuda (kernels and graphs), cpu (the definition)")
    return place


def _checked(dtype: torch.dtype) -> torch.dtype:
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype}; supported: {', '.join(map(str, DTYPES))}")
    return dtype


class FusedViT:
    """Callable tower: (pixel_values, grid_thw) -> VisionOutput. Threads and streams may share one; calls take turns."""

    def __init__(
        self,
        spec: TowerSpec,
        weights: Mapping[str, torch.Tensor],
        *,
        buckets: Buckets | None = None,
        max_tokens: int = 16384,
    ) -> None:
        """From a spec and packed weights (weights.pack); `load` and `from_module` make both."""
        self.spec = spec
        self.weights = dict(weights)
        weight = weights["merger.fc1.weight"]
        self.dtype, self.device = weight.dtype, weight.device
        self.buckets = as_buckets(buckets) if buckets is not None else ladder(max_tokens)
        self._plan = build_plan(spec)
        self._graphs: dict[Bucket, BucketGraph] = {}
        self._workspace: Workspace | None = None
        self._oversize: Workspace | None = None
        self._lock = threading.Lock()
        self._done: torch.cuda.Event | None = None
        self._counts: Counter[str] = Counter()
        self._calls: Counter[Bucket] = Counter()
        self._warned = False

    @classmethod
    def from_module(
        cls,
        module: torch.nn.Module,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        buckets: Buckets | None = None,
        max_tokens: int = 16384,
    ) -> FusedViT:
        """From a loaded Hugging Face tower; its parameters are read, not changed. Raises SpecError if unsupported."""
        config: dict[str, Any] = module.config.to_dict()  # type: ignore[operator,union-attr]
        tower, spec = find_tower(config), parse_config(config)
        state = {
            name.replace("patch_embed.linear_proj", "patch_embed.proj"): t for name, t in module.state_dict().items()
        }
        shapes = tower.expected(spec)

        def read(part: str, i: int) -> torch.Tensor:
            name = tower.name(part, i)
            tensor: torch.Tensor = state[name].reshape(shapes[name])
            return tensor

        parameter = next(module.parameters())
        place = _device(device if device is not None else parameter.device)
        weights = pack_tower(spec, read, dtype=_checked(dtype or parameter.dtype), device=place)
        return cls(spec, weights, buckets=buckets, max_tokens=max_tokens)

    # --- properties ---

    @property
    def backend(self) -> str:
        return "cuda graphs" if self.device.type == "cuda" else "definition"

    @property
    def weight_bytes(self) -> int:
        return sum(w.nbytes for w in self.weights.values())

    @property
    def workspace_bytes(self) -> int:
        return sum(w.slab.numel() for w in (self._workspace, self._oversize) if w is not None)

    @property
    def tile(self) -> int:
        """Query rows of one attention program."""
        from .kernels.config import attention_config, device_arch

        return attention_config(self.spec.attention.head_dim, self.dtype, device_arch(self.device)).block_m

    def plan(self) -> Plan:
        """The plan, the same for every bucket; print it for the listing."""
        return self._plan

    def stats(self) -> dict[str, Any]:
        """Calls, images, rows asked and rows of capacity they ran in, replays per bucket, bytes, capture seconds."""
        return {
            "backend": self.backend,
            **{k: self._counts[k] for k in ("calls", "images", "rows", "bucket_rows", "oversize_calls")},
            "replays": {f"{b.tokens}x{b.segments}": self._calls[b] for b in self.buckets},
            "graphs": len(self._graphs),
            "capture_seconds": sum(g.capture_seconds for g in self._graphs.values()),
            "weight_bytes": self.weight_bytes,
            "workspace_bytes": self.workspace_bytes,
        }

    # --- running ---

    def warmup(self) -> FusedViT:
        """Compile every kernel and capture every bucket, the largest first. After it, a call compiles nothing."""
        if self.device.type == "cuda":
            with self._lock, torch.cuda.device(self.device), torch.no_grad():
                self._wait_turn()
                for bucket in reversed(self.buckets):
                    self._graph(bucket)
                self._end_turn()
        return self

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor, grid_thw: Grid) -> VisionOutput:
        """Encode packed images.

        Args:
            pixel_values: [patches, channels * temporal * size * size], floating point, on the encoder's device.
            grid_thw: [images, 3] frames, height and width in patches; a tensor on any device, or nested lists.
                On the GPU it costs one small read; on the CPU the call does not synchronise.

        Returns:
            VisionOutput in the encoder's dtype; fresh tensors that no later call touches.

        Raises:
            InputError: (a ValueError) before anything is launched; the encoder stays usable.
        """
        if not self.weights:
            raise InputError("this encoder was closed; load it again")
        self._check_pixels(pixel_values)
        all_items = items(self.spec, self._read_grid(grid_thw), pixel_values.shape[0])
        self._counts.update(calls=1, images=len(all_items), rows=pixel_values.shape[0])
        if self.device.type == "cpu":
            outputs = define(self._plan, self.weights, pixel_values.to(self.dtype), all_items)
        else:
            outputs = self._run(pixel_values, all_items)
        merged = tuple(item.rows // self.spec.merger.patches for item in all_items)
        return VisionOutput(outputs[0], outputs[1], outputs[2:], merged)

    def _check_pixels(self, pixels: torch.Tensor) -> None:
        features = self.spec.patch.features
        if not isinstance(pixels, torch.Tensor):
            raise InputError(f"pixel_values is {type(pixels).__name__}; expected a tensor [patches, {features}]")
        if pixels.ndim != 2 or pixels.shape[1] != features:
            p = self.spec.patch
            raise InputError(
                f"pixel_values has shape {list(pixels.shape)}; expected [patches, {features}] "
                f"({p.channels} channels x {p.temporal} frames x {p.size} x {p.size}, as the processor lays them out)"
            )
        if not pixels.is_floating_point():
            raise InputError(f"pixel_values is {pixels.dtype}; expected floating point, normalised by the processor")
        if pixels.device != self.device:
            raise InputError(f"pixel_values is on {pixels.device}; the encoder is on {self.device}: move it there")

    def _read_grid(self, grid: Grid) -> list[list[int]]:
        if isinstance(grid, torch.Tensor):
            if grid.is_floating_point() or grid.is_complex() or grid.dtype == torch.bool:
                raise InputError(f"grid_thw is {grid.dtype}; expected integers")
            shape, rows = tuple(grid.shape), grid
        else:
            try:
                rows = torch.tensor([list(row) for row in grid])
            except (TypeError, ValueError) as error:
                raise InputError(f"grid_thw is {grid!r}; expected [images, 3] integers (t, h, w)") from error
            shape = tuple(rows.shape)
            if rows.is_floating_point() and rows.numel():
                raise InputError("grid_thw holds fractions; expected integers")
        if len(shape) != 2 or shape[1] != 3:
            raise InputError(
                f"grid_thw has shape {list(shape)}; expected [images, 3] of (frames, height, width) in patches"
            )
        values: list[list[int]] = rows.tolist()
        return values

    def _run(self, pixels: torch.Tensor, all_items: list[Item]) -> list[torch.Tensor]:
        spec, rows = self.spec, pixels.shape[0]
        merged = rows // spec.merger.patches
        widths = [spec.merger.out] * (1 + len(spec.deepstack))
        with self._lock, torch.cuda.device(self.device):
            self._wait_turn()
            outputs = [torch.empty(rows, spec.width, dtype=self.dtype, device=self.device)]
            outputs += [torch.empty(merged, width, dtype=self.dtype, device=self.device) for width in widths]
            begin = 0
            for pack in split(all_items, self.buckets[-1]):
                count = sum(item.rows for item in pack)
                buffers = self._run_pack(pixels[begin : begin + count], pack)
                for name, output in zip(self._plan.outputs, outputs, strict=True):
                    scale = rows // len(output)
                    output[begin // scale : (begin + count) // scale].copy_(buffers[name][: count // scale])
                begin += count
            self._end_turn()
        return outputs

    def _run_pack(self, pixels: torch.Tensor, pack: list[Item]) -> Mapping[str, torch.Tensor]:
        """Run one pack through the graph of its bucket, or by plain launches where it is larger than any."""
        rows, segments = len(pixels), sum(item.segments for item in pack)
        bucket = choose(self.buckets, rows, segments)
        if bucket is not None:
            graph = self._graph(bucket)
            self._fill(graph.buffers, pixels, pack)
            graph.replay()
            self._calls[bucket] += 1
            self._counts["bucket_rows"] += bucket.tokens
            return graph.buffers
        buffers = self._grown(Bucket(rows, segments))
        self._fill(buffers, pixels, pack)
        launch(self._plan, self.weights, buffers, self.tile)
        self._counts["oversize_calls"] += 1
        self._counts["bucket_rows"] += rows
        return buffers

    def _fill(self, buffers: Mapping[str, torch.Tensor], pixels: torch.Tensor, pack: list[Item]) -> None:
        integers = torch.tensor(table(pack, self.spec.merger.size, self.tile), dtype=torch.int32)
        buffers["table"][: len(integers)].copy_(integers, non_blocking=True)  # pageable: staged before the call returns
        buffers["pixels"][: len(pixels)].copy_(pixels)

    def _graph(self, bucket: Bucket) -> BucketGraph:
        if bucket not in self._graphs:
            if self._workspace is None:
                self._workspace = Workspace(self._plan, self._largest(), self.dtype, self.device, self.tile)
            self._graphs[bucket] = capture(self._plan, self.weights, self._workspace, bucket)
        return self._graphs[bucket]

    def _largest(self) -> Bucket:
        return Bucket(max(b.tokens for b in self.buckets), max(b.segments for b in self.buckets))

    def _grown(self, bucket: Bucket) -> Mapping[str, torch.Tensor]:
        """Buffers for a pack beyond the buckets, kept for the next one; graphs keep their own slab."""
        if not self._warned:
            self._warned = True
            logger.warning(
                "a segment of %d patches exceeds the largest bucket (%d): launching without a graph; raise max_tokens",
                bucket.tokens, self.buckets[-1].tokens,
            )  # fmt: skip
        if self._oversize is not None:
            try:
                return self._oversize.buffers(bucket)
            except ValueError:
                self._oversize = None
        self._oversize = Workspace(self._plan, bucket, self.dtype, self.device, self.tile)
        return self._oversize.buffers(bucket)

    def _wait_turn(self) -> None:
        """The workspace is shared: this stream's work starts after the last call's, on whatever stream that was."""
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)

    def _end_turn(self) -> None:
        self._done = self._done or torch.cuda.Event()
        self._done.record(torch.cuda.current_stream())

    def close(self) -> None:
        """Free graphs, workspace and weights. The encoder cannot be called afterwards."""
        with self._lock:
            if self._done is not None:
                self._done.synchronize()
            self._graphs.clear()
            self.weights.clear()
            self._workspace = self._oversize = None
