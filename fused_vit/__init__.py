"""fused_vit: vision towers of multimodal models as fused Triton kernels in CUDA graphs, a drop-in `model.visual`.

Importing this module needs no GPU, creates no CUDA context and imports neither triton nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, FusedVitError, InputError, SpecError

if TYPE_CHECKING:
    from .adapters.hf import attach, detach
    from .buckets import Bucket
    from .encoder import FusedViT, load
    from .output import VisionOutput

__version__ = "0.1.0"
__all__ = [
    "Bucket", "CheckpointError", "FusedViT", "FusedVitError", "InputError", "SpecError", "VisionOutput",
    "attach", "detach", "load",
]  # fmt: skip

_LAZY = {
    "Bucket": ".buckets",
    "FusedViT": ".encoder",
    "VisionOutput": ".output",
    "attach": ".adapters.hf",
    "detach": ".adapters.hf",
    "load": ".encoder",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
