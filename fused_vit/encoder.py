"""FusedViT: a vision tower that runs as Triton kernels in CUDA graphs, or as the plan's definition on a CPU."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

from .batch import KEPT_IMAGES, Batch, Pack, Views, make_batch
from .buckets import Bucket, as_buckets, ladder
from .calls import FLOATS, Grid, check_dense, flatten_call
from .devices import device_of
from .errors import InputError
from .executor import define, launch
from .graphs import BucketGraph, capture
from .output import VisionOutput
from .plan import Plan, build_plan
from .source import pack, read_module, read_tower
from .spec import TowerSpec
from .stills import Normalisation, byte_patches, normalisation
from .towers import find_tower, parse_config
from .turns import Turns
from .weights.checkpoint import Checkpoint
from .weights.pack import byte_weights
from .workspace import Workspace, addresses, needed

logger = logging.getLogger("fused_vit")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Buckets = Iterable[Bucket | int | Sequence[int]]
GRIDS = 1024  # of at most KEPT_IMAGES images that are kept


def load(
    path: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    buckets: Buckets | None = None,
    max_tokens: int = 16384,
    revision: str | None = None,
    projector: bool = False,
) -> FusedViT:
    """A tower from a checkpoint: a folder, a .safetensors file with config.json beside it, or a hub id.

    Only the tower's tensors are read, from only the shards that hold them.

    Args:
        device: default the current CUDA device, or the CPU where there is none.
        dtype: bfloat16, float16 or float32; default the checkpoint's own (float32 on a CPU).
        buckets: sizes to capture, as tokens or (tokens, segments); default buckets.ladder(max_tokens).
        max_tokens: patches of the largest default bucket.
        revision: of a hub id.
        projector: run the model's own projector behind the tower too (Kimi-VL, Kimi-K2.5).

    Raises:
        SpecError: the config describes no supported tower. CheckpointError: the files do not hold it.
    """
    checkpoint = Checkpoint.open(path, revision=revision)
    tower, spec = find_tower(checkpoint.config), parse_config(checkpoint.config, projector=projector)
    place = device_of(device)
    read, stored = read_tower(checkpoint, tower, spec)
    kept = dtype or (torch.float32 if place.type == "cpu" else stored)
    vit = FusedViT(spec, pack(spec, read, _checked(kept), place), buckets=buckets, max_tokens=max_tokens)
    vit._checkpoint = checkpoint.place
    return vit


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
        weight = weights["patch_embed.weight"]
        self.dtype, self.device = weight.dtype, weight.device
        self._turns = Turns(self.device)
        self.spec = spec
        self.weights = dict(weights)
        windowed = spec.attention.windows is not None
        self.buckets = as_buckets(buckets) if buckets is not None else ladder(max_tokens, windowed)
        least = spec.merge**2 + spec.class_token
        if self.buckets[0].tokens < least:
            raise InputError(
                f"the smallest bucket is of {self.buckets[0].tokens} patches; the smallest image has {least}"
            )
        self._plan = build_plan(spec)
        self._lean = self._plan.lean()  # of a workspace: calls bring memory for their outputs
        self._outputs = self._plan.output_buffers()
        finals = list(self._plan.finals())
        self._cells = [1 + finals.index(name) if name in finals else 0 for name in self._plan.outputs]
        self._graphs: dict[Bucket, BucketGraph] = {}
        self._workspace: Workspace | None = None
        self._oversize: Workspace | None = None
        self._counts: Counter[str] = Counter()
        self._replays: Counter[Bucket] = Counter()
        self._asked: Counter[Bucket] = Counter()  # rows
        self._warned = False
        self._for_bytes: dict[Normalisation, FusedViT] = {}
        self._checkpoint: tuple[str, str | None] | None = None  # with its commit, where `load` read one
        tile = self.tile if self.device.type == "cuda" else None
        self._batch = lru_cache(GRIDS)(partial(make_batch, spec, self.buckets, tile))
        with self._turns.take():
            pass  # the first turn, on the stream that packs the weights: calls on others wait for them

    @classmethod
    def from_module(
        cls,
        module: torch.nn.Module,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        buckets: Buckets | None = None,
        max_tokens: int = 16384,
        hidden_state: bool = False,
    ) -> FusedViT:
        """From a loaded Hugging Face tower; its parameters are read, not changed.

        hidden_state: return the last block's output too, where a final norm follows it.
        Raises SpecError if unsupported, wrapped by adapters, quantized or offloaded.
        """
        config: dict[str, Any] = module.config.to_dict()  # type: ignore[operator,union-attr]
        tower, spec = find_tower(config), parse_config(config)
        if hidden_state and spec.final_norm:
            spec = replace(spec, hidden_state=True)
        read = read_module(module, tower, spec)
        parameter = next(module.parameters())
        place = device_of(device if device is not None else parameter.device)
        weights = pack(spec, read, _checked(dtype or parameter.dtype), place)
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
    def embedding_width(self) -> int:
        """Of merged rows, or of the last block's where a tower merges none: what `encode` gives."""
        last_hidden, pooled, *_ = self._outputs
        read = pooled or last_hidden
        assert read is not None, "every tower has a last_hidden_state"
        return int(read.shape[1])

    @property
    def predicted_bytes(self) -> int:
        """Of the workspace, known before it is made: `workspace_bytes` after `warmup`. A CPU needs none."""
        if self.device.type == "cpu":
            return 0
        return needed(self._lean, self.buckets, self.dtype.itemsize, self.tile)[0]

    @cached_property
    def processor(self) -> Any:
        """The image processor of the checkpoint that `load` read; Qwen3-VL's where it describes none.

        Raises InputError of an encoder from a module; CheckpointError as `images.processor` does.
        """
        if self._checkpoint is None:
            raise InputError(
                "processor is missing, and this encoder was made from a module: give the checkpoint's path or hub id, "
                "or its image processor (fused_vit.images.processor)"
            )
        from .images import processor

        path, revision = self._checkpoint
        return processor(self.spec, path, revision=revision)

    @cached_property
    def tile(self) -> int:
        """Query rows of one attention program."""
        from .kernels.config import attention_config, device_arch

        return attention_config(self.spec.attention.head_dim, self.dtype, device_arch(self.device)).block_m

    def plan(self) -> Plan:
        """The plan, the same for every bucket; print it for the listing."""
        return self._plan

    def stats(self) -> dict[str, Any]:
        """Calls, images, rows asked and rows of capacity they ran in, of each bucket too; bytes, capture seconds.

        Those of photographs as bytes are among them: `encode_images`, `encode`, `stream`.
        """
        both = (self, *self._for_bytes.copy().values())
        counts, replays, asked = Counter[str](), Counter[Bucket](), Counter[Bucket]()
        graphs: list[BucketGraph] = []
        for vit in both:  # copies: other threads count and capture meanwhile
            counts.update(vit._counts.copy())
            replays.update(vit._replays.copy())
            asked.update(vit._asked.copy())
            graphs += vit._graphs.copy().values()
        return {
            "backend": self.backend,
            **{k: counts[k] for k in ("calls", "images", "rows", "bucket_rows", "oversize_calls")},
            "buckets": {
                f"{b.tokens}x{b.segments}": {"replays": replays[b], "rows": asked[b], "capacity": replays[b] * b.tokens}
                for b in self.buckets
            },
            "graphs": len(graphs),
            "capture_seconds": sum(graph.capture_seconds for graph in graphs),
            "weight_bytes": sum({w.data_ptr(): w.nbytes for vit in both for w in vit.weights.copy().values()}.values()),
            "workspace_bytes": sum(vit.workspace_bytes for vit in both),
        }

    # --- running ---

    def warmup(self, *, photographs: bool = False) -> FusedViT:
        """Compile every kernel and capture every bucket, the largest first. After it, a call compiles nothing.

        But for a call with a segment larger than any bucket, whose size may want other forms of the matmuls.

        Args:
            photographs: the tower for bytes too, in which `encode`, `stream` and `encode_images` run those that the
                loaded checkpoint's processor only resizes, cuts and normalises.
        """
        self._check_usable()
        if self.device.type == "cuda":
            with self._turns.take(), torch.no_grad():
                self._check_open()  # it may have been closed while others had their turn
                for bucket in reversed(self.buckets):
                    self._graph(bucket)
        if photographs:
            self.for_bytes(*normalisation(self.processor, self.spec.patch.channels)).warmup()
        return self

    def __call__(self, pixel_values: torch.Tensor, grid_thw: Grid | None = None) -> VisionOutput:
        """Encode packed images.

        Args:
            pixel_values: [patches, channels * temporal * size * size] in the processor's row order, or any shape of
                more dims with as many numbers a patch, such as [patches, channels, size, size]; floating point, on the
                encoder's device. Without a grid: whole images [images, channels, height, width].
            grid_thw: [images, 3] frames, height and width in patches ([images, 2] without frames, where a patch has but
                one); a tensor on any device, or nested lists. On the GPU it costs one small read; on the CPU the call
                does not synchronise.

        Returns:
            VisionOutput in the encoder's dtype; fresh tensors that no later call touches.

        Raises:
            InputError: (a ValueError) before anything is launched; the encoder stays usable.
        """
        weights = self.weights  # of this call, should another thread close the encoder meanwhile
        self._check_usable()
        self._check_tensor(pixel_values)
        values = pixel_values.detach() if pixel_values.requires_grad else pixel_values  # a dispatch less
        pixels, grid = flatten_call(self.spec, values, grid_thw)
        kept = self._batch if len(grid) <= KEPT_IMAGES else self._batch.__wrapped__
        batch = kept(tuple(map(tuple, grid)), len(pixels))
        if self.device.type == "cpu":
            pixels = pixels if self.spec.patch.bytes else pixels.to(self.dtype)
            with torch.autocast("cpu", enabled=False):  # which would round what runs in float32
                outputs = define(self._plan, weights, pixels, batch.items)
        else:
            outputs = self._run(pixels, batch)
        with self._turns.lock:
            self._counts["calls"] += 1
            self._counts["images"] += len(batch.items)
            self._counts["rows"] += len(pixels)
        deepstack = [t for t in outputs[2 : 2 + len(self.spec.deepstack)] if t is not None]
        hidden = outputs[-1] if self.spec.hidden_state else None
        assert outputs[0] is not None, "every tower has a last_hidden_state"
        return VisionOutput(outputs[0], outputs[1], deepstack, batch.merged, batch.rows, hidden)

    def encode_images(self, images: Sequence[Any], processor: Any = None) -> VisionOutput:
        """Encode photographs: the processor resizes and cuts them as bytes; this tower normalises and embeds those.

        As `self(*processor(images))` but for rounding, with an eighth of the numbers' memory: no pixel is ever a float
        outside a multiprocessor, and both frames of a still are one.

        Args:
            images: uint8 tensors or arrays [height, width, 3] on any device, or PIL images of any mode.
            processor: the checkpoint's Hugging Face image processor, default the loaded checkpoint's. One of
                torchvision's kind works on this encoder's device.

        Raises:
            InputError: (a ValueError) naming the image, or what of the processor cannot be folded into weights.
        """
        self._check_usable()
        processor = self.processor if processor is None else processor
        mean, std = normalisation(processor, self.spec.patch.channels)
        patches, grid = byte_patches(self.spec, processor, images, self.device)
        return self.for_bytes(mean, std)(patches, grid)

    def for_bytes(self, mean: tuple[float, ...], std: tuple[float, ...]) -> FusedViT:
        """This tower for uint8 pixels [patches, channels * size * size] of stills, which it normalises itself.

        It has its own graphs and workspace, which this one's `stats` count and its own `warmup` captures; the weights
        but for the patch embedding's are shared. The next call with these numbers returns it again.

        Raises:
            InputError: (a ValueError) of numbers that are not finite, of a std that is not above 0.
        """
        self._check_usable()
        mean, std = tuple(mean), tuple(std)
        found = self._for_bytes.get((mean, std))
        if found is not None and found.weights:
            return found
        numbers, channels = (*mean, *std), self.spec.patch.channels
        if not (len(mean) == len(std) == channels and all(map(math.isfinite, numbers)) and min(std) > 0):
            raise InputError(f"mean {mean}, std {std}; expected {channels} finite numbers each, and no std of 0")
        with self._turns.take():  # it is made of weights that another stream may be packing
            self._check_open()  # it may have been closed while others had their turn
            found = self._for_bytes.get((mean, std))
            if found is None or not found.weights:  # or somebody closed it alone
                spec = replace(self.spec, patch=replace(self.spec.patch, bytes=True))
                weights = byte_weights(self.spec, self.weights, mean, std)
                self._for_bytes[mean, std] = FusedViT(spec, weights, buckets=self.buckets)
            return self._for_bytes[mean, std]

    def encode(
        self,
        images: Any,
        *,
        processor: Any = None,
        pool: Literal["mean"] | None = None,
        batch_tokens: int | None = None,
        normalize_embeddings: bool = False,
        convert_to_numpy: bool = False,
        show_progress_bar: bool = False,
        workers: int | None = None,
    ) -> Any:
        """Encode photographs of any sizes and in any number, in full batches, prepared by threads.

        Args:
            images: paths, PIL images, files' bytes, or uint8 arrays or tensors [height, width, 3]; one, or many.
            processor: a checkpoint's path or hub id, or its image processor (`images.processor`); default the loaded
                checkpoint's.
            pool: "mean" for one vector an image, in float32; None for its merged rows.
            batch_tokens: patches of a batch; default those of the largest bucket.
            normalize_embeddings: vectors of length one, with a pool.
            convert_to_numpy: arrays instead of tensors; bfloat16, which numpy lacks, as float32.
            workers: threads that decode and preprocess; default the cores of this process less one.

        Returns:
            In the order of `images`, on the CPU: a list of [rows, out] in the encoder's dtype, or with pool one
            [images, out]; of a single image without the list, or [out].

        Raises:
            InputError: an image cannot be read or encoded; names it by its number. `stream` yields such an error in the
                image's place and goes on with the others.
        """
        from .streams import encode

        return encode(
            self, images, processor=processor, pool=pool, batch_tokens=batch_tokens,
            normalize_embeddings=normalize_embeddings, convert_to_numpy=convert_to_numpy,
            show_progress_bar=show_progress_bar, workers=workers,
        )  # fmt: skip

    def stream(
        self,
        images: Iterable[Any] | AsyncIterable[Any],
        *,
        processor: Any = None,
        pool: Literal["mean"] | None = None,
        batch_tokens: int | None = None,
        workers: int | None = None,
    ) -> AsyncIterator[tuple[int, torch.Tensor | InputError]]:
        """For servers: `async for number, rows in vit.stream(images, processor=...)`, as they are done.

        A batch takes what came while the last one ran: a lone image does not wait for others. Arguments as in `encode`;
        `images` may arrive over time. An image that cannot be read or encoded yields its InputError.
        """
        from .streams import stream

        return stream(
            self, images, processor=processor, pool=pool, batch_tokens=batch_tokens, workers=workers
        )  # fmt: skip

    def _check_open(self) -> None:
        if not self.weights:
            raise InputError("this encoder was closed; load it again")

    def _check_usable(self) -> None:
        self._check_open()
        if self._turns.forked():
            raise InputError(
                f"this encoder belongs to process {self._turns.process}, and CUDA does not survive a fork: load one in "
                "this process, or start it by spawn"
            )
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise InputError(
                "the current stream is being captured into a CUDA graph; call the encoder before or after: it replays "
                "graphs of its own"
            )

    def _check_tensor(self, pixels: torch.Tensor) -> None:
        if not isinstance(pixels, torch.Tensor):
            features = self.spec.patch.features
            raise InputError(f"pixel_values is {type(pixels).__name__}; expected a tensor [patches, {features}]")
        check_dense("pixel_values", pixels)
        if self.spec.patch.bytes and pixels.dtype != torch.uint8:
            raise InputError(f"pixel_values is {pixels.dtype}; expected uint8, which this encoder normalises itself")
        if not self.spec.patch.bytes and pixels.dtype not in FLOATS:
            raise InputError(f"pixel_values is {pixels.dtype}; expected floating point, normalised by the processor")
        if pixels.device != self.device:
            raise InputError(f"pixel_values is on {pixels.device}; the encoder is on {self.device}: move it there")

    def _run(self, pixels: torch.Tensor, batch: Batch) -> list[torch.Tensor | None]:
        """Every pack through its graph, which reads the pixels in place and writes into fresh tensors."""
        with self._turns.take():
            self._check_open()  # it may have been closed while others had their turn
            outputs = self._fresh(batch)
            if len(batch.packs) == 1:
                self._run_pack(pixels, batch.packs[0], outputs)
                return outputs
            begin, filled = 0, {"rows": 0, "merged": 0}
            for pack in batch.packs:
                end = {dim: n + pack.sizes[dim] for dim, n in filled.items()}
                parts = [
                    None if buffer is None or output is None else output[filled[dim] : end[dim]]
                    for buffer, output in zip(self._outputs, outputs, strict=True)
                    for dim in [str(buffer.shape[0]) if buffer else ""]
                ]
                self._run_pack(pixels[begin : begin + pack.pixels], pack, parts)
                begin, filled = begin + pack.pixels, end
        return outputs

    def _fresh(self, batch: Batch) -> list[torch.Tensor | None]:
        """New tensors for a batch's outputs. By shape, dtype and device torch takes twice as long as by a likeness."""
        if batch.outputs is None:
            any_number = self.weights["patch_embed.weight"][0, 0]
            batch.outputs = [
                any_number.expand(batch.sizes[str(b.shape[0])], *map(int, b.shape[1:])) if b else None
                for b in self._outputs
            ]
        return [
            None if like is None else torch.empty_like(like, memory_format=torch.contiguous_format)
            for like in batch.outputs
        ]

    def _run_pack(self, pixels: torch.Tensor, pack: Pack, outputs: Sequence[torch.Tensor | None]) -> None:
        """Run one pack through the graph of its bucket, or by plain launches where it is larger than any."""
        rows, bucket = pack.sizes["rows"], pack.bucket
        if bucket is not None:
            views = self._views_of_graph(bucket, pack)
            views.fill(pixels, outputs, pack)
            self._graphs[bucket].replay()
            self._replays[bucket] += 1
            self._asked[bucket] += rows
            self._counts["bucket_rows"] += bucket.tokens
        else:
            own = Bucket(rows, pack.segments)
            buffers = self._grown(own)
            views = self._views_of(buffers, pack)
            views.fill(pixels, outputs, pack)
            elsewhere = addresses(self._plan, own, self.dtype, self.tile, buffers["table"])
            launch(self._plan, self.weights, buffers, self.tile, elsewhere=elsewhere)
            self._counts["oversize_calls"] += 1
            self._counts["bucket_rows"] += rows
        for output, result in zip(outputs, views.results, strict=True):
            if output is not None and result is not None:
                output.copy_(result)

    def _views_of_graph(self, bucket: Bucket, pack: Pack) -> Views:
        """Cut once for a pack: it costs 10 us, 50 where the processor has gone cold."""
        if pack.views is None:
            pack.views = self._views_of(self._graph(bucket).buffers, pack)
        return pack.views

    def _views_of(self, buffers: Mapping[str, torch.Tensor], pack: Pack) -> Views:
        results = [
            buffers[b.name][: pack.sizes[str(b.shape[0])]] if b and not cell else None
            for b, cell in zip(self._outputs, self._cells, strict=True)
        ]
        pixels = buffers["pixels"][: pack.pixels, : self.spec.patch.features]
        return Views(buffers["table"][: len(pack.table)], pixels, self._cells, results)

    def _graph(self, bucket: Bucket) -> BucketGraph:
        if bucket not in self._graphs:
            if self._workspace is None:
                self._workspace = Workspace(self._lean, self.buckets, self.dtype, self.device, self.tile)
            self._graphs[bucket] = capture(self._plan, self.weights, self._workspace, bucket)
        return self._graphs[bucket]

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
                self._turns.wait()
                self._oversize = None
        self._oversize = Workspace(self._lean, [bucket], self.dtype, self.device, self.tile)
        return self._oversize.buffers(bucket)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an encoder holds graphs and device memory and cannot be copied: load it again where it is needed"
        )

    def close(self) -> None:
        """Free graphs, workspace and weights. The encoder cannot be called afterwards."""
        if self._turns.forked():  # they are the other process's
            return
        with self._turns.lock:
            self._turns.wait()
            self._graphs.clear()
            self.weights = {}
            self._batch.cache_clear()
            for encoder in self._for_bytes.values():
                encoder.close()
            self._for_bytes.clear()
            self._workspace = self._oversize = None

    def __del__(self) -> None:
        if hasattr(self, "_turns") and not self._turns.forked():  # it may have been refused half made
            self._turns.wait()
