"""The Prometheus collector says what the encoder's stats say."""

from __future__ import annotations

import pytest

import fused_vit
from fused_vit.buckets import Bucket
from tests.towers_hf import random_pixels, tiny_tower

prometheus_client = pytest.importorskip("prometheus_client")
GRID = [[1, 4, 6], [2, 4, 4]]


def test_a_scrape_shows_calls_and_what_buckets_held() -> None:
    from fused_vit.metrics import EncoderCollector

    vit = fused_vit.FusedViT.from_module(tiny_tower(), device="cpu", buckets=[(256, 16), (1024, 16)])
    registry = prometheus_client.CollectorRegistry()
    registry.register(EncoderCollector(vit, "tiny"))
    for _ in range(3):
        vit(random_pixels(GRID), GRID)
    with pytest.raises(ValueError, match="multiples"):
        vit(random_pixels([[1, 4, 6]]), [[1, 3, 8]])
    vit._replays.update({Bucket(1024, 16): 2})  # a CPU has no graphs
    vit._asked.update({Bucket(1024, 16): 1500})

    def value(name: str, **labels: str) -> float | None:
        found: float | None = registry.get_sample_value(f"fused_vit_{name}", {"encoder": "tiny", **labels})
        return found

    assert (value("calls_total"), value("images_total"), value("rows_total")) == (3, 6, 3 * 56)
    assert (value("graphs"), value("workspace_bytes"), value("oversize_calls_total")) == (0, 0, 0)
    assert value("weight_bytes") == vit.weight_bytes > 0
    large = {"bucket": "1024x16"}
    assert (value("replays_total", **large), value("replayed_rows_total", **large)) == (2, 1500)
    assert value("replayed_capacity_total", **large) == 2048 and value("replays_total", bucket="256x16") == 0
