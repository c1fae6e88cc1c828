"""Metrics: an encoder's counters for Prometheus. Needs prometheus-client: pip install 'fused-vit[metrics]'."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .encoder import FusedViT

_TOTALS = {
    "calls": "Calls that returned a result.",
    "images": "Images and clips of those calls.",
    "rows": "Patches of those calls.",
    "oversize_calls": "Packs that no bucket held: they ran without a graph.",
}
_GAUGES = {
    "graphs": "Buckets captured so far.",
    "capture_seconds": "Time that compiling and capturing them took.",
    "weight_bytes": "Packed weights.",
    "workspace_bytes": "Device memory that calls share.",
}


class EncoderCollector(Collector):
    """FusedViT.stats() at every scrape, labelled with a name: REGISTRY.register(EncoderCollector(vit, "qwen3-vl"))."""

    def __init__(self, encoder: FusedViT, name: str) -> None:
        self.encoder, self.name = encoder, name

    def collect(self) -> Iterator[Metric]:
        stats = self.encoder.stats()
        for key, text in _TOTALS.items():
            total = CounterMetricFamily(f"fused_vit_{key}", text, labels=["encoder"])
            total.add_metric([self.name], stats[key])
            yield total
        for key, text in _GAUGES.items():
            gauge = GaugeMetricFamily(f"fused_vit_{key}", text, labels=["encoder"])
            gauge.add_metric([self.name], stats[key])
            yield gauge
        labels = ["encoder", "bucket"]
        replays = CounterMetricFamily("fused_vit_replays", "Graph launches of a bucket.", labels=labels)
        asked = CounterMetricFamily("fused_vit_replayed_rows", "Rows in those launches.", labels=labels)
        capacity = CounterMetricFamily("fused_vit_replayed_capacity", "Rows that they had room for.", labels=labels)
        for bucket, used in stats["buckets"].items():
            for family, key in ((replays, "replays"), (asked, "rows"), (capacity, "capacity")):
                family.add_metric([self.name, bucket], used[key])
        yield from (replays, asked, capacity)
