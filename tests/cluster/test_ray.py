"""fused_vit.ray.Encoder as Ray Data runs it: CPU actors of a Ray on this machine, and the example."""

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
from tests import archives
from tests.cluster import actors


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with actors.local(cpus=4):
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archives.checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return archives.photographs(tmp_path_factory.mktemp("photos"), range(24))


@pytest.fixture(scope="module")
def wanted(checkpoint: Path, photos: list[Path]) -> dict[str, torch.Tensor]:
    vit = fused_vit.load(checkpoint, device="cpu")
    return dict(zip([path.name for path in photos], vit.encode(photos, processor=checkpoint), strict=True))


def close(got: object, want: torch.Tensor) -> bool:
    return torch.allclose(torch.tensor(np.asarray(got)), want, rtol=1e-4, atol=1e-5)


def test_two_actors_share_the_work(
    cluster: None, checkpoint: Path, photos: list[Path], wanted: dict[str, torch.Tensor]
) -> None:
    arguments = {"checkpoint": str(checkpoint), "device": "cpu", "workers": 1, "pool": None}
    rows = actors.spread(str(photos[0].parent), fn_constructor_kwargs=arguments)
    assert sorted(actors.name(row["path"]) for row in rows) == sorted(wanted)
    assert all(close(row["embedding"], wanted[actors.name(row["path"])]) for row in rows)
    assert len({row["process"] for row in rows}) == 2 and {row["device"] for row in rows} == {"cpu"}


def test_the_example_reads_a_bucket_and_writes_parquet(
    cluster: None, checkpoint: Path, photos: list[Path], wanted: dict[str, torch.Tensor], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bucket, vectors = tmp_path / "bucket", tmp_path / "vectors"
    bucket.mkdir()
    for path in photos:
        (bucket / path.name).hardlink_to(path)
    (bucket / "bad.jpg").write_bytes(b"no image")
    (bucket / "notes.txt").write_text("no image either, and not read")
    ray_bucket.main(
        [f"file://{bucket}", str(vectors), "--checkpoint", str(checkpoint), "--encoders=2", "--gpus=0", "--cpus=1"]
    )
    rows = {actors.name(row["path"]): row for row in pq.read_table(vectors).to_pylist()}
    assert rows.keys() == wanted.keys() | {"bad.jpg"}
    assert all(
        close(rows[name]["embedding"], want.mean(0)) and not rows[name]["error"] for name, want in wanted.items()
    )
    assert "not an image" in rows["bad.jpg"]["error"] and np.isnan(rows["bad.jpg"]["embedding"]).all()
    said = capsys.readouterr().out
    assert f"25 images in {vectors}, 1 failed" in said and "bad.jpg: " in said
