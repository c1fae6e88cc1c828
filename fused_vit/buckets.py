"""Buckets: the sizes for which a CUDA graph exists.

Kernels read the true counts from the device and skip the empty part of a bucket. The ladder is dense all the same:
which tiles fill the last round of multiprocessors is chosen for a bucket.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import InputError


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """Capacity of one graph: patches (tokens) and attention segments, which bound the images too."""

    tokens: int
    segments: int

    def holds(self, tokens: int, segments: int) -> bool:
        return tokens <= self.tokens and segments <= self.segments


def ladder(max_tokens: int, windowed: bool = False) -> tuple[Bucket, ...]:
    """From 64 tokens up to max_tokens (always included), a segment for every 64 tokens.

    Every size doubles the last one up to 512, from there on every fourth.

    windowed: for every 32, since windows of at most 64 patches are smaller at the edges.
    """
    per_segment = 32 if windowed else 64
    if type(max_tokens) is not int or max_tokens <= 0:
        raise InputError(f"max_tokens is {max_tokens!r}; expected a positive number of patches")
    sizes = [64]
    while sizes[-1] < max_tokens:
        step = sizes[-1] if sizes[-1] < 512 else 1 << sizes[-1].bit_length() - 3
        sizes.append(min(sizes[-1] + step, max_tokens))
    return tuple(Bucket(size, max(16, size // per_segment)) for size in sizes)


def as_buckets(values: Iterable[Bucket | int | Sequence[int]]) -> tuple[Bucket, ...]:
    """Buckets from the user's list: Bucket, tokens, or (tokens, segments); sorted. Raises InputError."""
    try:
        given = list(values)
    except TypeError as error:
        raise InputError(f"buckets is {values!r}; expected a list, such as (256, 4096)") from error
    buckets = [_bucket(value) for value in given]
    if not buckets:
        raise InputError("buckets is empty; expected at least one, such as (256, 4096)")
    return tuple(sorted(set(buckets)))


def _bucket(value: Any) -> Bucket:
    if isinstance(value, Bucket):
        value = value.tokens, value.segments
    sizes = (value, max(16, value // 64)) if isinstance(value, int) else value
    whole = isinstance(sizes, Sequence) and len(sizes) == 2 and all(type(n) is int and n > 0 for n in sizes)
    if not whole:
        raise InputError(f"bucket is {value!r}; expected positive whole numbers: patches, or patches and segments")
    return Bucket(*sizes)


def choose(buckets: Sequence[Bucket], tokens: int, segments: int) -> Bucket | None:
    """The smallest bucket that holds the pack, or None."""
    return next((b for b in buckets if b.holds(tokens, segments)), None)
