"""Ray Data on two GPUs: an actor with each, and the bits of calls of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("ray", reason="ray is not installed: pip install 'fused-vit[ray]'")
pytest.importorskip("ray.data")
pytest.importorskip("pyarrow")
import pyarrow.parquet as pq

import fused_vit
from examples import ray_bucket
from fused_vit.images import processor, read_image
from tests import archives
from tests.cluster import actors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
ENCODER = {"dtype": torch.bfloat16, "max_tokens": 1024}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with actors.local(cpus=8, gpus=2):
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archives.place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def one_by_one(place: Path) -> dict[str, torch.Tensor]:
    """fp32, as Ray's rows are: exactly what the encoder gave in bf16."""
    vit = fused_vit.load(place / "checkpoint", **ENCODER).warmup()
    prepare = processor(vit.spec, place / "checkpoint")
    return {
        path.name: vit.encode_images([read_image(path)], prepare).split()[0].float().cpu()
        for path in (place / "photos").rglob("*.png")
    }


def test_each_actor_has_a_gpu_of_its_own_and_its_rows_are_the_bits_of_single_calls(
    cluster: None, place: Path, one_by_one: dict[str, torch.Tensor]
) -> None:
    arguments = {"checkpoint": str(place / "checkpoint"), "workers": 2, "pool": None, **ENCODER}
    rows = actors.spread(str(place / "photos"), num_gpus=1, num_cpus=2, fn_constructor_kwargs=arguments)
    assert {actors.name(row["path"]) for row in rows} == one_by_one.keys() and len(rows) == len(one_by_one)
    assert all(np.array_equal(row["embedding"], one_by_one[actors.name(row["path"])].numpy()) for row in rows)
    devices = {str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())}
    used = {row["device"] for row in rows}
    assert len(used) == 2 and used <= devices and len({row["process"] for row in rows}) == 2


def test_the_example_writes_the_means_of_those_bits(
    cluster: None, place: Path, one_by_one: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    found = ray_bucket.embedded(
        str(place / "photos"), str(place / "checkpoint"), encoders=2, cpus=2, batch=16, **ENCODER
    )  # fmt: skip
    found.write_parquet(str(tmp_path / "vectors"))
    rows = {actors.name(row["path"]): row for row in pq.read_table(tmp_path / "vectors").to_pylist()}
    assert rows.keys() == one_by_one.keys() and not any(row["error"] for row in rows.values())
    vectors = torch.tensor([rows[name]["embedding"] for name in one_by_one])
    assert torch.allclose(vectors, torch.stack([t.mean(0) for t in one_by_one.values()]), rtol=1e-5, atol=1e-6)
