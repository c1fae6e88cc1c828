"""attach / detach: a FusedViT at `model.visual` of a loaded Hugging Face model, and the original back.

Inference only: no gradient reaches the tower. The original is kept, outside the module tree, so that an attached model
saves the same checkpoint as before; `model.parameters()` and `model.to()` do not see it.
"""

from __future__ import annotations

import itertools
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from ..buckets import Bucket
from ..encoder import FusedViT
from ..errors import FusedVitError, SpecError
from ..output import VisionOutput
from ..towers import TOWERS, find_tower, parse_config

logger = logging.getLogger("fused_vit")
Grid = torch.Tensor | Sequence[Sequence[int]]
UNSEEN = ("output_hidden_states", "output_attentions")  # what fused kernels never write


def attach(
    model: nn.Module,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    buckets: Iterable[Bucket | int | Sequence[int]] | None = None,
    max_tokens: int = 16384,
) -> FusedViT:
    """Replace the vision tower of a loaded Hugging Face model, in place, by a fused one.

    The tower is found by its class, wherever it sits: `model.model.visual`, `model.visual`, inside a wrapper. On a GPU
    the original's parameters move to CPU memory until `detach`; on a CPU they stay.

    Args:
        model: holds one supported tower, on transformers 5.x or 4.57.
        device, dtype: default the tower's own. buckets, max_tokens: as in `load`.

    Returns:
        The encoder, e.g. for `warmup()` and `stats()`.

    Raises:
        SpecError: no supported tower in the model. FusedVitError: already attached. Both are ValueErrors, and the model
            is as before.

    Example:
        >>> fused_vit.attach(model).warmup()
        >>> model.generate(**inputs)
    """
    if next(_places(model, lambda child: isinstance(child, FusedVisual)), None):
        raise FusedVitError(f"{type(model).__name__} has a fused tower already; call fused_vit.detach(model) first")
    tower = _find(model)
    _check_tensors(tower)
    encoder = FusedViT.from_module(tower, device=device, dtype=dtype, buckets=buckets, max_tokens=max_tokens)
    fused = FusedVisual(encoder, tower)
    for parent, name, _ in list(_places(model, lambda child: child is tower)):
        setattr(parent, name, fused)
    fused.park()
    return encoder


def detach(model: nn.Module) -> None:
    """Put the original tower back, the same module object on its own device, and close the encoder.

    Raises:
        FusedVitError: (a ValueError) the model has no fused tower.
    """
    places = list(_places(model, lambda child: isinstance(child, FusedVisual)))
    if not places:
        raise FusedVitError(f"{type(model).__name__} has no fused tower; fused_vit.attach(model) puts one in")
    for parent, name, fused in places:
        assert isinstance(fused, FusedVisual), "_places found it by this type"
        setattr(parent, name, fused.original)
        fused.encoder.close()
        fused.unpark()


class FusedVisual(nn.Module):
    """What stands at `model.visual`: called as the original, and answering with its output class and attributes."""

    encoder: FusedViT
    original: nn.Module

    def __init__(self, encoder: FusedViT, original: nn.Module) -> None:
        super().__init__()
        self.training = original.training
        self.encoder = encoder
        self.__dict__["original"] = original  # no submodule: model.to() and model.parameters() leave it alone
        self._output_class = _output_class(original)
        self._homes: list[tuple[torch.Tensor, torch.device]] = []
        self._warned: set[str] = set()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled model breaks its graph here
    def forward(
        self,
        hidden_states: torch.Tensor | None = None,
        grid_thw: Grid | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The original's call: pixels, whatever their name and device, and grids, from which all else is derived.

        Other keywords are accepted and have no effect: generate's flags, and tensors such as `cu_seqlens` that a caller
        computed ahead. Hidden states and attentions of single layers do not exist; asking for them warns once.
        """
        pixels = hidden_states if hidden_states is not None else pixel_values
        if pixels is None or grid_thw is None:
            raise TypeError("a vision tower needs pixel_values (or hidden_states) and grid_thw")
        for flag in UNSEEN:
            if kwargs.get(flag):
                self._warn(flag, f"{flag} is ignored by the vision tower: fused kernels do not keep them")
        if self.training and torch.is_grad_enabled() and any(p.requires_grad for p in self.original.parameters()):
            self._warn("training", "the fused vision tower is inference only: it gets no gradient; detach to train it")
        out = self.encoder(pixels.to(self.device), grid_thw)
        if return_dict is None:
            return_dict = getattr(self.original.config, "return_dict", True)
        return self._as_original(out, return_dict)

    def _as_original(self, out: VisionOutput, return_dict: bool) -> Any:
        if self._output_class is None:  # transformers 4
            return out.pooler_output, out.deepstack_features
        answer = self._output_class(
            last_hidden_state=out.last_hidden_state,
            pooler_output=out.pooler_output,
            deepstack_features=out.deepstack_features,
        )
        return answer if return_dict else answer.to_tuple()

    def _warn(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            logger.warning(message)

    # --- what a parent touches ---

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.dtype

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def __getattr__(self, name: str) -> Any:
        """Anything else public is the original's: config, spatial_merge_size, patch_size, blocks."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "original" not in self.__dict__:
                raise
        value = getattr(self.original, name)
        if name in ("get_dtype", "get_device"):
            return lambda: getattr(self, name.removeprefix("get_"))
        return value

    def train(self, mode: bool = True) -> FusedVisual:
        self.original.train(mode)
        super().train(mode)
        return self

    def extra_repr(self) -> str:
        return f"{type(self.original).__name__}, {self.encoder.backend}, {self.dtype}, {self.device}"

    # --- what must not change behind the encoder's back ---

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's keys and values, so that save_pretrained writes what it would have written."""
        return self.original.state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            raise FusedVitError(f"{prefix}* cannot be loaded into a fused tower; call fused_vit.detach(model) first")
        missing_keys += [prefix + key for key in self.original.state_dict()]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FusedVisual:
        before = torch.empty(0, dtype=self.dtype, device=self.device)
        after = fn(before)
        if (after.dtype, after.device) != (before.dtype, before.device):
            raise FusedVitError(
                f"a fused tower stays {before.dtype} on {before.device}; got {after.dtype} on {after.device}: "
                "call fused_vit.detach(model), move the model, attach again"
            )
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model with a fused tower cannot be copied or pickled; call fused_vit.detach(model) first")

    def park(self) -> None:
        """Free the GPU memory of the original: its parameters and buffers wait in CPU memory."""
        for tensor in itertools.chain(self.original.parameters(), self.original.buffers()):
            if tensor.device.type != "cpu":
                self._homes.append((tensor, tensor.device))
                tensor.data = tensor.data.to("cpu")

    def unpark(self) -> None:
        for tensor, device in self._homes:
            tensor.data = tensor.data.to(device)
        self._homes.clear()


def _places(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, child) of every reference to a wanted module; shared modules have several."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None and wanted(child):
                yield parent, name, child


def _tower_class(module: nn.Module) -> type | None:
    """The supported class that a module is, or is derived from."""
    names = {name for tower in TOWERS for name in tower.hf_classes}
    return next((cls for cls in type(module).__mro__ if cls.__name__ in names), None)


def _find(model: nn.Module) -> nn.Module:
    """The only supported tower inside the model."""
    supported = ", ".join(name for tower in TOWERS for name in tower.hf_classes)
    if _tower_class(model):
        raise SpecError(
            f"{type(model).__name__} is a tower; attach needs the model that holds it (or FusedViT.from_module(tower))"
        )
    found = {id(child): child for _, _, child in _places(model, lambda child: _tower_class(child) is not None)}
    if len(found) != 1:
        seen = "no" if not found else str(len(found))
        raise SpecError(f"{type(model).__name__} has {seen} supported vision tower; expected one of: {supported}")
    return next(iter(found.values()))


def _check_tensors(tower: nn.Module) -> None:
    """Raises SpecError with all tensors that LoRA wrapped, quantization packed or offloading emptied."""
    config: dict[str, Any] = tower.config.to_dict()  # type: ignore[operator,union-attr]
    state = {name.replace("patch_embed.linear_proj", "patch_embed.proj"): t for name, t in tower.state_dict().items()}
    wrong = []
    for name, shape in find_tower(config).expected(parse_config(config)).items():
        tensor = state.get(name)
        if tensor is None:
            wrong.append(f"{name} is missing")
        elif tensor.numel() != math.prod(shape) or not tensor.is_floating_point() or tensor.is_meta:
            wrong.append(f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}")
    if wrong:
        shown = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise SpecError(
            f"{type(tower).__name__}: {shown}. expected plain floating-point tensors: merge adapters, load the tower "
            "neither quantized nor offloaded"
        )


def _output_class(tower: nn.Module) -> type | None:
    """The ModelOutput that the tower's own module returns; None on transformers 4, where it is a tuple."""
    cls = _tower_class(tower)
    assert cls is not None, "only a supported tower is replaced"
    return getattr(sys.modules[cls.__module__], "BaseModelOutputWithDeepstackFeatures", None)
