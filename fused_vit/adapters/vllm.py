"""A FusedViT in the place of vLLM's vision tower: built, loaded and called by vLLM's models as their own.

Read against vLLM 0.20, 0.23 and 0.33 (docs/vllm.md). vLLM is imported in functions only, under its engine.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..calls import Grid
from ..devices import check_gpu
from ..encoder import FusedViT
from ..errors import CheckpointError, FusedVitError, SpecError
from ..layouts import Layout, choose_layout
from ..output import VisionOutput
from ..source import pack
from ..spec import ConvMergerSpec, MergerSpec, TowerSpec
from ..towers import Tower, find_tower, parse_config
from ..weights.read import check_module, reader

logger = logging.getLogger("vllm.fused_vit")
MAX_TOKENS = "FUSED_VIT_VLLM_MAX_TOKENS"
REMEDY = "FUSED_VIT_VLLM=0 runs vLLM's own tower"
DEVICES = ("cuda",)
ARGUMENTS = ("vision_config", "config", "text_config", "norm_eps", "quant_config", "input_norm", "prefix")
# Formats whose loaders fill parameters by vLLM's names, without load_weights, or quantize what they load.
UNLOADABLE = (
    "sharded_state", "runai_streamer_sharded", "tensorizer", "ipc_cache", "modelexpress", "bitsandbytes", "gguf",
)  # fmt: skip
LISTED = 8


def fuse(tower: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> FusedTower | None:
    """The fused tower for a call of vLLM's constructor; None, with one warning why, where vLLM's own must run."""
    if _place().type == "meta":
        return None  # vLLM throws it away: no image can reach it
    try:
        arguments = _arguments(tower, args, kwargs)
        dummy = _check_engine()
        fused = FusedTower(arguments, dummy=dummy)
        _check_quantization(arguments.get("quant_config"), arguments.get("prefix", ""), fused.row, fused.spec)
    except Exception as error:  # ours, or whatever a vLLM raises that moved what is asked of it here
        reason = str(error) if isinstance(error, FusedVitError) else repr(error)
        logger.warning("vLLM's own %s runs, not the fused one: %s", tower.__name__, reason)
        return None
    logger.info("the fused tower runs in place of %s (%s)", tower.__name__, fused.row.family)
    return fused


# --- whether it fits ---


def _arguments(tower: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name: versions of vLLM differ in which there are, and in their order."""
    try:
        bound = inspect.signature(inspect.unwrap(tower.__init__)).bind(None, *args, **kwargs)  # type: ignore[misc]
    except TypeError as error:  # not ours to report: the constructor of vLLM's tower will
        raise SpecError(f"its constructor was called with other arguments than it has ({error})") from error
    unknown = [name for name in list(bound.arguments)[1:] if name not in ARGUMENTS]  # but self
    if unknown:
        raise SpecError(f"this vLLM gives it {', '.join(unknown)}; known: {', '.join(ARGUMENTS)}")
    bound.apply_defaults()
    return dict(bound.arguments)


def _check_engine() -> bool:
    """Whether to make weights up (load format dummy). Raises FusedVitError where the engine wants what we lack."""
    from vllm.config import get_current_vllm_config
    from vllm.distributed import get_tensor_model_parallel_world_size
    from vllm.model_executor.models.vision import is_vit_use_data_parallel

    place = _place()
    if place.type not in DEVICES:
        raise SpecError(f"it is built on {place}; supported: {', '.join(DEVICES)}")
    if place.type == "cuda":
        check_gpu(place)
    config: Any = get_current_vllm_config()
    ranks = get_tensor_model_parallel_world_size()
    if ranks > 1 and not is_vit_use_data_parallel():
        raise SpecError(f"it is split over {ranks} ranks; supported: one, or --mm-encoder-tp-mode data")
    if getattr(config.lora_config, "enable_tower_connector_lora", False):
        raise SpecError("LoRA is enabled on the tower (enable_tower_connector_lora); supported: on the language model")
    if getattr(config.compilation_config, "cudagraph_mm_encoder", False):
        raise SpecError(
            "vLLM's encoder graphs are on (cudagraph_mm_encoder); expected off: the fused tower has its own"
        )
    attention = getattr(getattr(config.model_config, "multimodal_config", None), "mm_encoder_attn_dtype", None)
    if attention is not None:
        raise SpecError(f"mm_encoder_attn_dtype is {attention}; supported: the model's own")
    load_format = str(getattr(config.load_config.load_format, "value", config.load_config.load_format))
    if load_format in UNLOADABLE:
        raise SpecError(f"load_format is {load_format}; supported: those that hand over a checkpoint's tensors by name")
    return load_format == "dummy"


def _place() -> torch.device:
    """Where vLLM builds: it makes that the default while it does."""
    return torch.empty(0).device


def _check_quantization(quant_config: Any, prefix: str, row: Tower, spec: TowerSpec) -> None:
    """Raises SpecError if vLLM would quantize any matmul of the tower. Many quantized models leave the tower alone."""
    if quant_config is None:
        return
    from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod

    with torch.device("meta"):
        linear = ReplicatedLinear(8, 8, prefix=prefix)  # a stand-in: what is asked is the method for a name
    for name, shape in _vllm_layout(row).expected(spec).items():
        if len(shape) != 2 or not name.endswith(".weight") or "pos_emb" in name or "position" in name:
            continue
        module = f"{prefix}.{name.removesuffix('.weight')}"
        try:
            method = quant_config.get_quant_method(linear, module)
        except Exception as error:  # whatever a method's own check raises
            raise SpecError(f"{type(quant_config).__name__} cannot tell how {module} is quantized ({error})") from error
        if method is not None and not isinstance(method, UnquantizedLinearMethod):
            raise SpecError(f"{module} is quantized ({type(method).__name__}); supported: a tower in 16 bits or wider")


# --- names ---


def _vllm_layout(row: Tower) -> Layout:
    """The family's layout with the hub's names, which vLLM's towers keep: transformers' own comes before it."""
    return row.layouts[-1]


def _spellings(row: Tower) -> Iterator[Layout]:
    """A family's layouts, also with q, k and v in pieces and gates fused, which vLLM's towers load as well."""
    for layout in row.layouts:
        for qkv in ("", "q", "q_proj"):
            for fused in (False, True):
                yield replace(layout, names={k: _spelled(v, qkv, fused) for k, v in layout.names.items()})


def _spelled(name: str | tuple[str, ...], qkv: str, fused: bool) -> str | tuple[str, ...]:
    if isinstance(name, str) and name.endswith(".qkv") and qkv:
        return tuple(name.removesuffix("qkv") + qkv.replace("q", n, 1) for n in "qkv")
    if isinstance(name, tuple) and name[0].endswith(".gate_proj") and fused:
        return name[0].removesuffix("gate_proj") + "gate_up_proj"
    return name


# --- the tower ---


class FusedTower(nn.Module):
    """What stands at `model.visual` or `model.vision_tower`, with what vLLM's models read of their own."""

    def __init__(self, arguments: Mapping[str, Any], *, dummy: bool = False) -> None:
        """From vLLM's arguments by name. dummy: make weights up if none are loaded. Raises SpecError."""
        super().__init__()
        self.config = arguments.get("vision_config", arguments.get("config"))
        fields = self.config.to_dict()
        self.row, self.spec = find_tower(fields), parse_config(fields)
        spec, eps = self.spec, arguments.get("norm_eps")
        if eps is not None and eps != spec.norm.eps:
            raise SpecError(f"norm_eps is {eps}; expected {spec.norm.eps}, as its vision_config has it")
        self.input_norm: nn.Module | None = arguments.get("input_norm")
        # vLLM reads dtype and device of the first parameter, and takes a tower whose parameters were not loaded for
        # an error: this one counts as loaded when every tensor is.
        self.all_tensors = nn.Parameter(torch.empty(0), requires_grad=False)
        # Kimi-K2.5's model prepares what vLLM's encoder needs beside the pixels: nothing here.
        self.encoder = SimpleNamespace(prepare_encoder_metadata=lambda *_, **__: {})
        merger = spec.merger
        width = merger.out if isinstance(merger, (MergerSpec, ConvMergerSpec)) else spec.width
        self.out_hidden_size = width * (1 + len(spec.deepstack))
        self.hidden_size, self.num_heads, self.patch_size = spec.width, spec.attention.heads, spec.patch.size
        self.temporal_patch_size = spec.patch.temporal
        self.spatial_merge_size, self.merge_kernel_size = spec.merge, (spec.merge, spec.merge)
        self.deepstack_visual_indexes = list(spec.deepstack)
        self._max_tokens = _max_tokens()
        self._dummy = dummy
        self._collected: dict[str, torch.Tensor] = {}
        self._vit: FusedViT | None = None
        self._warm = False

    @property
    def dtype(self) -> torch.dtype:
        return self.all_tensors.dtype

    @property
    def device(self) -> torch.device:
        return self.all_tensors.device

    @property
    def vit(self) -> FusedViT | None:
        """The encoder, e.g. for stats(); None before weights are loaded."""
        return self._vit

    def extra_repr(self) -> str:
        return f"{self.row.family}, {self.dtype}, {self.device}"

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take tensors by the names of vLLM's tower, in as many calls as they come; the last one builds or updates.

        Returns the names taken and, once every tensor has come, that of the tower's parameter.
        """
        taken = set()
        for name, tensor in weights:
            if not name.endswith("rotary_emb.inv_freq") and not name.startswith(_vllm_layout(self.row).unused):
                self._collected[name] = tensor.to("cpu", copy=True)  # loaders reuse their buffers
            taken.add(name)
        layout = next((one for one in _spellings(self.row) if self._has_all(one)), None)
        if layout is None:
            return taken
        with _plain():
            self._build(layout)
        return taken | {"all_tensors"}

    def _has_all(self, layout: Layout) -> bool:
        return layout.expected(self.spec).keys() <= self._collected.keys()

    def _build(self, layout: Layout) -> None:
        """Pack what was collected: into a new encoder, or over the old one's weights, which its graphs read."""
        expected = layout.expected(self.spec)
        extra = sorted(self._collected.keys() - expected.keys())
        if extra:
            raise CheckpointError(f"tensors that are not of a {self.row.family} tower: {_list(extra)}. {REMEDY}.")
        check_module(f"{self.row.family} tower", expected, self._collected)
        packed = pack(self.spec, reader(layout, self.spec, self._collected), self.dtype, self.device)
        self._collected.clear()
        if self._vit is None:
            self._vit = FusedViT(self.spec, packed, max_tokens=self._max_tokens)
        else:
            for name, tensor in packed.items():
                self._vit.weights[name].copy_(tensor)

    def forward(
        self, pixel_values: torch.Tensor, grid_thw: Grid | None = None, *, encoder_metadata: Any = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """The call of vLLM's tower, and its result: fresh tensors. What vLLM prepared beside the pixels is not read."""
        vit = self._ready()
        pixels = pixel_values.to(self.device)
        if self.input_norm is not None:
            pixels = self.input_norm(pixels.flatten(1), self.dtype)  # a Kimi's come as [rows, 3, size, size]
        return _as_vllm(vit(pixels, grid_thw))

    def _ready(self) -> FusedViT:
        """The encoder with its graphs captured: in vLLM's profiling run, so that it counts their memory.

        Not when weights are loaded: sleep mode moves all that is allocated there to the host and back.
        """
        if self._vit is None and self._dummy:
            shapes = _vllm_layout(self.row).expected(self.spec)
            self.load_weights((name, torch.empty(shape).uniform_(-1e-3, 1e-3)) for name, shape in shapes.items())
        if self._vit is None or self._collected:
            raise CheckpointError(self._incomplete())
        if not self._warm:
            with _plain():
                self._vit.warmup()
            self._warm = True
        return self._vit

    def _incomplete(self) -> str:
        expected = choose_layout(list(_spellings(self.row)), self.spec, self._collected).expected(self.spec)
        missing = [name for name in expected if name not in self._collected]
        extra = [name for name in self._collected if name not in expected]
        return (
            f"of {len(expected)} tensors of a {self.row.family} tower {len(missing)} were not loaded: {_list(missing)};"
            f" not of it: {_list(extra)}. Load all of one checkpoint or of one update. {REMEDY}."
        )


def _as_vllm(out: VisionOutput) -> torch.Tensor | list[torch.Tensor]:
    """Merged rows of all images; deepstack features beside them; a Kimi's, [rows, patches, width], as a list."""
    assert out.pooler_output is not None, "every tower that vLLM's models share has one"
    if out.pooler_output.ndim == 3:
        return out.split()
    if out.deepstack_features:
        return torch.cat([out.pooler_output, *out.deepstack_features], dim=1)
    return out.pooler_output


@contextmanager
def _plain() -> Iterator[None]:
    """torch's defaults, which vLLM changes while it loads: half precision, the GPU, inference mode.

    Weights are packed in fp32, and what a graph reads must take updates in any mode.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def _max_tokens() -> int:
    text = os.environ.get(MAX_TOKENS, "16384")
    if not text.isdecimal() or int(text) == 0:
        raise SpecError(f"{MAX_TOKENS} is {text!r}; expected a positive number of patches, such as 16384")
    return int(text)


def _list(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return (", ".join(names[:LISTED]) or "none") + more
