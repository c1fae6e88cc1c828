"""Devices: where an encoder may be: a CUDA GPU on which the kernels run, or a CPU, which runs the definition."""

from __future__ import annotations

import torch

from .errors import InputError

LEAST = (8, 0)  # compute capability: bfloat16's tensor cores, and the first table of kernels/config.py
SUPPORTED = "supported: cuda (kernels and graphs), cpu (the definition)"


def device_of(device: torch.device | str | None) -> torch.device:
    """The device meant, with its index; by default the current GPU, the CPU where there is none. Raises InputError."""
    try:
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    except (RuntimeError, TypeError) as error:  # a word that is no device, or no word
        raise InputError(f"device is {device!r}; {SUPPORTED}") from error
    if place.type not in ("cuda", "cpu"):
        raise InputError(f"device is {place}; {SUPPORTED}")
    if place.type == "cpu":
        return place
    if not torch.cuda.is_available():
        raise InputError(f"device is {place}, and torch sees no CUDA device here; take cpu (the definition)")
    if (place.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device is {place}; torch sees {torch.cuda.device_count()} CUDA devices here, from cuda:0 on")
    if place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    check_gpu(place)
    return place


def check_gpu(place: torch.device) -> None:
    """Raises InputError where the kernels cannot run on a device that torch calls cuda."""
    if torch.version.hip is not None:
        raise InputError(f"torch is built for ROCm ({torch.version.hip}); supported: CUDA, or cpu (the definition)")
    found = torch.cuda.get_device_capability(place)
    if found < LEAST:
        got, least = (".".join(map(str, version)) for version in (found, LEAST))
        raise InputError(f"{place} has compute capability {got}; supported: {least} and newer, or cpu (the definition)")
