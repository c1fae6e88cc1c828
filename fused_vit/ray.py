"""Ray Data: an encoder as a class for map_batches, one to each GPU. Needs ray: pip install 'fused-vit[ray]'."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from .embedding import Embedder, Failed
from .encoder import load
from .preparing import Preparer, Workers, default_workers


class Encoder:
    """An actor class of `dataset.map_batches`, with as many threads as it is given CPUs.

    `map_batches(Encoder, fn_constructor_kwargs={"checkpoint": ..., "workers": 4}, num_cpus=4, num_gpus=1, ...)`

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
        """column: of the images; it is left out of the result. workers: threads that prepare, of as many as num_cpus;
        default the cores of the node less one.

        device, dtype, max_tokens, revision: as for fused_vit.load. Ray shows an actor the GPUs that are its own only.
        """
        self.column, self.pool = column, pool
        self.vit = load(checkpoint, device=device, dtype=dtype, max_tokens=max_tokens, revision=revision)
        prepare = Preparer(self.vit.spec, self.vit.processor, dtype=self.vit.dtype)
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
        width = self.vit.embedding_width  # also of a batch in which every image failed
        absent = np.full(width, np.nan, np.float32) if self.pool else np.empty((0, width), np.float32)
        column = _column([absent if e is None else e for e in embeddings], one_shape=self.pool is not None)
        kept = {name: values for name, values in batch.items() if name != self.column}
        return {**kept, "embedding": column, "rows": rows, "error": np.array(errors, object)}


def _column(embeddings: list[Any], one_shape: bool) -> Any:
    """Of the same kind in every batch, or their blocks would be columns of two types: an array, or one of arrays."""
    if one_shape:
        return np.stack(embeddings)
    ragged = np.empty(len(embeddings), object)
    for i, embedding in enumerate(embeddings):
        ragged[i] = embedding
    return ragged
