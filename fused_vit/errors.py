"""Errors of the public surface: each message says what was got, what was expected and the remedy."""

from __future__ import annotations


class FusedVitError(ValueError):
    """Base of every error that a caller can cause."""


class SpecError(FusedVitError):
    """A config.json that describes no supported tower; names the field, its value and what is supported."""


class CheckpointError(FusedVitError):
    """A checkpoint that cannot be read or does not hold the tower; names the file and every key at fault."""


class InputError(FusedVitError):
    """A call's arguments do not fit the tower; names the image and the remedy. The encoder stays usable."""
