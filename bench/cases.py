"""Cases: what the encoder's benchmark runs and beside whom, as plain data, so that a report needs no torch."""

from __future__ import annotations

from fused_vit.errors import InputError

CASES: dict[str, list[list[int]]] = {  # name -> grids (t, h, w) of 16-pixel patches
    "128²": [[1, 8, 8]],
    "224²": [[1, 14, 14]],
    "256²": [[1, 16, 16]],
    "448²": [[1, 28, 28]],
    "4 x 256²": [[1, 16, 16]] * 4,
    "768x1024": [[1, 48, 64]],
    "1024²": [[1, 64, 64]],
    "1080p": [[1, 68, 120]],
    "2048²": [[1, 128, 128]],
    "8 x 448²": [[1, 28, 28]] * 8,
    "mixed 8": [
        [1, 16, 16], [1, 28, 28], [1, 48, 64], [1, 20, 36], [1, 64, 64], [1, 32, 32], [1, 40, 24], [1, 28, 28],
    ],
    "video 16 x 448²": [[16, 28, 28]],
}  # fmt: skip
PEERS = {  # key in the JSON -> what tables and plots call it
    "hf_sdpa": "Hugging Face sdpa",
    "hf_sdpa_linear": "sdpa, Conv3d as linear",
    "hf_compiled": "the same, blocks compiled",
    "assembly": "libraries in an exact-fit graph",
    "vllm": "vLLM's tower",
    "vllm_graph": "vLLM's in an exact-fit graph",
}
COST_FOLLOWS = 0.62  # a bucket at 55 % of its rows may take this much of its time when full, attention left out
FILL = 0.55


def rectangle(patches: int, merge: int) -> list[int]:
    """The squarest grid [1, h, w] of that many patches, sides in multiples of merge."""
    blocks, rest = divmod(patches, merge * merge)
    if rest or not blocks:
        raise InputError(f"{patches} patches are no multiple of {merge} x {merge}")
    height = next(h for h in range(int(blocks**0.5), 0, -1) if blocks % h == 0)
    return [1, height * merge, blocks // height * merge]


def partly(capacity: int, share: float, merge: int) -> list[int]:
    """The smallest grid of at least that share of a bucket's rows that is no thinner than 1:4, as an image is."""
    unit = merge * merge
    for patches in range(-(-int(capacity * share) // unit) * unit, capacity + 1, unit):
        grid = rectangle(patches, merge)
        if patches >= capacity * share and grid[2] <= 4 * grid[1]:
            return grid
    raise InputError(f"no grid of {share:.0%} of {capacity} patches")
