"""Ray Data: an encoder as a class for map_batches, one to each GPU. Needs ray: pip install 'fused-vit[ray]'."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from .embedding import Embedder, Failed
from .encoder import load
from .images import processor
from .preparing import Preparer, Workers, default_workers


class Encoder:
    """`dataset.map_batches(Encoder, fn_constructor_kwargs={"checkpoint": ...}, batch_size=256, num_gpus=1)`.

    A batch's column of images (files' bytes, or arrays [height, width, 3]) becomes, beside its other columns:
    embedding, float32 [out] or with pool=None float32 [rows, out]; rows; and error, "" where there was none. An image
    that fails has NaN in its vector, or no rows, and costs the others nothing.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        column: str = "bytes",
        pool: Literal["mean"] | None = "mean",
        device: str | None = None,
        dtype: torch.dtype | None = None,
        max_tokens: int = 16384,
        batch_tokens: int | None = None,
        workers: int | None = None,
        revision: str | None = None,
    ) -> None:
        """column: of the images; it is left out of the result. workers: threads that prepare, as many as num_cpus.

        device, dtype, max_tokens, revision: as for fused_vit.load. Ray shows an actor the GPUs that are its own only.
        """
        self.column, self.pool = column, pool
        self.vit = load(checkpoint, device=device, dtype=dtype, max_tokens=max_tokens, revision=revision)
        found = processor(self.vit.spec, checkpoint, revision=revision)
        prepare = Preparer(self.vit.spec, found, dtype=self.vit.dtype)
        self.embedder = Embedder(self.vit, prepare.normalisation, pool=pool, batch_tokens=batch_tokens)
        self.embedder.for_bytes.warmup()
        self.workers = Workers(prepare, workers or default_workers(), threads=True)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Columns as numpy arrays, as Ray hands them over by default."""
        images = batch[self.column]
        embeddings: list[Any] = [None] * len(images)
        errors, rows = [""] * len(images), np.zeros(len(images), np.int32)
        for one in self.embedder.run(self.workers.run(images)):
            if isinstance(one, Failed):
                errors[one.number] = one.reason
            else:
                embeddings[one.number], rows[one.number] = one.embedding.float().numpy(), one.rows
        width = next((e.shape[-1] for e in embeddings if e is not None), 0)
        absent = np.full(width, np.nan, np.float32) if self.pool else np.empty((0, width), np.float32)
        embeddings = [absent if e is None else e for e in embeddings]
        kept = {name: values for name, values in batch.items() if name != self.column}
        return {**kept, "embedding": _column(embeddings), "rows": rows, "error": np.array(errors, object)}


def _column(embeddings: list[Any]) -> Any:
    """One array where they have one shape, else an array of arrays."""
    if len({e.shape for e in embeddings}) <= 1:
        return np.stack(embeddings)
    ragged = np.empty(len(embeddings), object)
    ragged[:] = embeddings
    return ragged
