"""attach / detach: a FusedViT in the place of a loaded Hugging Face model's vision tower, and the original back.

Inference only: no gradient reaches the tower. The original is kept, outside the module tree, so that an attached model
saves the same checkpoint as before; `model.parameters()` and `model.to()` do not see it.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from ..buckets import Bucket
from ..calls import Grid
from ..encoder import FusedViT
from ..errors import FusedVitError, SpecError
from ..output import VisionOutput
from ..towers import TOWERS

logger = logging.getLogger("fused_vit")
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

    The tower is found by its class, wherever it sits: `model.model.visual`, `model.thinker.visual`,
    `model.model.vision_tower`. On a GPU the original's parameters move to CPU memory until `detach`; on a CPU they
    stay.

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
    encoder = FusedViT.from_module(
        tower, device=device, dtype=dtype, buckets=buckets, max_tokens=max_tokens, hidden_state=_wants_hidden(model)
    )
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
        self._deepstack = hasattr(original, "deepstack_visual_indexes")
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
        computed ahead. Of hidden states there is at most the last, and no attentions; asking for more warns once.
        """
        pixels = hidden_states if hidden_states is not None else pixel_values
        if pixels is None or (grid_thw is None and self.encoder.spec.merge > 1):
            raise TypeError("a vision tower needs pixel_values (or hidden_states) and grid_thw")
        for flag in UNSEEN:
            if kwargs.get(flag) and not (flag == "output_hidden_states" and self.encoder.spec.hidden_state):
                self._warn(flag, f"{flag} is ignored by the vision tower: fused kernels do not keep them")
        if self.training and torch.is_grad_enabled() and any(p.requires_grad for p in self.original.parameters()):
            self._warn("training", "the fused vision tower is inference only: it gets no gradient; detach to train it")
        out = self.encoder(pixels.to(self.device), grid_thw)
        if return_dict is None:
            return_dict = getattr(self.original.config, "return_dict", True)
        return self._as_original(out, None if grid_thw is not None else len(pixels), return_dict)

    def _as_original(self, out: VisionOutput, images: int | None, return_dict: bool) -> Any:
        """The class, fields and shapes of the original's result; whole images have a batch dimension."""
        if self._output_class is None:  # transformers 4
            return (out.pooler_output, out.deepstack_features) if self._deepstack else out.pooler_output
        batch = (-1,) if images is None else (images, -1)
        fields: dict[str, Any] = {
            "last_hidden_state": out.last_hidden_state.unflatten(0, batch),
            "pooler_output": out.pooler_output,
        }
        if self._deepstack:
            fields["deepstack_features"] = out.deepstack_features
        if out.hidden_state is not None:
            fields["hidden_states"] = (*[None] * self.encoder.spec.depth, out.hidden_state.unflatten(0, batch))
        answer = self._output_class(**fields)
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


def _wants_hidden(model: nn.Module) -> bool:
    """Whether a parent reads hidden_states[-1] (LLaVA-OneVision). Raises SpecError where it reads earlier layers."""
    layer = getattr(getattr(model, "config", None), "vision_feature_layer", None)
    if layer not in (None, -1):
        raise SpecError(f"config.vision_feature_layer is {layer!r}; supported: -1, the last layer")
    return layer == -1


def _output_class(tower: nn.Module) -> Any:
    """The ModelOutput that the tower's own module returns; None on transformers 4 where it is a tensor or a tuple."""
    cls = _tower_class(tower)
    assert cls is not None, "only a supported tower is replaced"
    names = (
        "BaseModelOutputWithDeepstackFeatures",
        "InternVLVisionModelOutputWithPooling",
        "BaseModelOutputWithPooling",
    )
    return next((found for name in names if (found := getattr(sys.modules[cls.__module__], name, None))), None)
