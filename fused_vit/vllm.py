"""The plug-in for vLLM: enable() puts the fused tower wherever vLLM builds one that fits; disable() ends that.

Installing fused-vit is enough: vLLM calls `register` in every process (entry point vllm.general_plugins).
Nothing heavy is imported here: vLLM starts plug-ins early, where a model's module would cost seconds or touch CUDA.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from .errors import FusedVitError

logger = logging.getLogger("vllm.fused_vit")  # below vLLM's, whose handlers show it in every process
SWITCH = "FUSED_VIT_VLLM"
OFF = ("0", "false", "no", "off")
MODELS = "vllm.model_executor.models."
TOWERS = {  # module -> the tower's class
    f"{MODELS}qwen2_vl": "Qwen2VisionTransformer",
    f"{MODELS}qwen2_5_vl": "Qwen2_5_VisionTransformer",
    f"{MODELS}qwen3_vl": "Qwen3_VisionTransformer",  # Qwen3-VL, its MoE, Qwen3.5 and its MoE
    f"{MODELS}glm4_1v": "Glm4vVisionTransformer",  # GLM-4.1V, 4.5V, 4.6V
    f"{MODELS}moonvit": "MoonVitPretrainedModel",  # Kimi-VL
    f"{MODELS}kimi_k25_vit": "MoonViT3dPretrainedModel",  # Kimi-K2.5
}


def register() -> None:
    """vLLM's entry point: as enable(), unless FUSED_VIT_VLLM is 0, false, no or off."""
    if enabled():
        _watch()


def enabled() -> bool:
    """Whether towers are replaced from now on: the environment decides, which vLLM's processes inherit."""
    return os.environ.get(SWITCH, "1").strip().lower() not in OFF


def enable() -> None:
    """Replace towers built from now on, in this process and those that it starts.

    Raises:
        FusedVitError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise FusedVitError("vllm is not installed: pip install 'fused-vit[vllm]'")
    os.environ[SWITCH] = "1"
    _watch()


def disable() -> None:
    """Build vLLM's own towers from now on, in this process and those that it starts; towers that run stay."""
    os.environ[SWITCH] = "0"


def _watch() -> None:
    """See to every tower's class: now where vLLM imported it already, else when it does."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in TOWERS:
        if name in sys.modules:
            _replace(sys.modules[name])


class _Finder(MetaPathFinder):
    """Finds a tower's module as Python would, and replaces the tower once the module has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in TOWERS else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _replace(module)

        # On this one loader object: all else that inspect and torch ask of it stays as it is.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _replace(module: ModuleType) -> None:
    """Let the class of a module's tower build a fused one.

    The class itself is changed, not its name in a module: models import towers by name from each other, before or
    after this. It answers a call with an object of another class, which Python then does not initialise. Subclasses,
    which are other towers, are built as ever.
    """
    name = TOWERS[module.__name__]
    tower: Any = getattr(module, name, None)
    if tower is None:
        logger.warning("%s has no %s: this vLLM is unknown to fused_vit, and its own tower runs", module.__name__, name)
        return
    if hasattr(tower.__new__, "fused_vit"):
        return
    before = tower.__new__

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls is tower and enabled() and (args or kwargs):  # copying a tower calls this without arguments
            from .adapters.vllm import fuse

            fused = fuse(tower, args, kwargs)
            if fused is not None:
                return fused
        return before(cls) if before is object.__new__ else before(cls, *args, **kwargs)

    new.fused_vit = True  # type: ignore[attr-defined]
    tower.__new__ = staticmethod(new)
