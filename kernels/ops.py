"""The ops by name: what a plan's step refers to. Each has a definition in torch and a launcher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .attention import attention, attention_ref
from .linear import linear, linear_ref
from .norm import norm, norm_ref
from .patch_embed import patch_embed, patch_embed_ref
from .pool import pool, pool_ref
from .qkv import qkv, qkv_ref
from .residual import residual, residual_ref
from .unfold import unfold, unfold_ref


@dataclass(frozen=True, slots=True)
class Op:
    """ref(*reads, *weights, **options) -> written; launch(*written, *reads, *weights, count=, **options) -> None."""

    ref: Callable[..., Any]
    launch: Callable[..., None]


OPS: dict[str, Op] = {
    "unfold": Op(unfold_ref, unfold),
    "patch_embed": Op(patch_embed_ref, patch_embed),
    "qkv": Op(qkv_ref, qkv),
    "attention": Op(attention_ref, attention),
    "residual": Op(residual_ref, residual),
    "linear": Op(linear_ref, linear),
    "norm": Op(norm_ref, norm),
    "pool": Op(pool_ref, pool),
}
