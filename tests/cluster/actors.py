"""A Ray on this machine alone, and an encoder that says where it ran, for the tests of Ray Data."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from fused_vit.ray import Encoder

STARTS = 3  # Ray gives a node 30 seconds to start, whatever else its cores have to do


@contextmanager
def local(cpus: int, gpus: int = 0) -> Iterator[None]:
    """No network, no dashboard, little shared memory, and a short path, since its sockets are named by it."""
    import ray
    import ray.data

    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as place:
        for left in reversed(range(STARTS)):
            try:
                ray.init(
                    "local", num_cpus=cpus, num_gpus=gpus, include_dashboard=False, log_to_driver=False,
                    object_store_memory=1 << 29, _node_ip_address="127.0.0.1", _temp_dir=place,
                )  # fmt: skip
                break
            except Exception:  # of many kinds
                ray.shutdown()
                if not left:
                    raise
        try:
            ray.data.DataContext.get_current().wait_for_min_actors_s = 300  # so that no actor does all while one starts
            yield
        finally:
            ray.shutdown()


def placed() -> type[Encoder]:
    """Made in a function, so that it travels to the actors whole: they need not find this file."""

    class Placed(Encoder):
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            import torch

            cuda = self.vit.device.type == "cuda"
            where = str(torch.cuda.get_device_properties(self.vit.device).uuid) if cuda else "cpu"
            count = len(batch[self.column])
            found = super().__call__(batch)
            return found | {"process": np.full(count, os.getpid()), "device": np.full(count, where)}

    return Placed


def spread(source: str, **options: Any) -> list[dict[str, Any]]:
    """Rows of the images below `source` through two actors, with work for both before the first begins."""
    import ray.data

    images = ray.data.read_binary_files(source, include_paths=True, override_num_blocks=12).materialize()
    pool = ray.data.ActorPoolStrategy(size=2, max_tasks_in_flight_per_actor=2)
    rows: list[dict[str, Any]] = images.map_batches(placed(), batch_size=4, compute=pool, **options).take_all()
    return rows


def name(path: str) -> str:
    return path.rpartition("/")[2]
