"""Archives on a GPU: the bits of one-by-one calls, through pinned slots that are used again and again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fused_vit
from fused_vit import archive
from fused_vit.archive import Job
from fused_vit.images import processor, read_image
from tests import archives
from tests.test_embed import rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archives.place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def one_by_one(place: Path) -> dict[str, torch.Tensor]:
    vit = fused_vit.load(place / "checkpoint", dtype=torch.bfloat16, max_tokens=1024).warmup()
    prepare = processor(vit.spec, place / "checkpoint")
    found = {}
    for path in sorted((place / "photos").rglob("*.png")):
        found[str(path)] = vit.encode_images([read_image(path)], prepare).split()[0].cpu()
    return found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_tokens", [64, 1024, 5000])
def test_every_row_has_the_bits_of_a_call_of_its_own(
    workers: int, batch_tokens: int, place: Path, one_by_one: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    job = Job(
        (str(place / "photos"),), str(place / "checkpoint"), tmp_path, kind="safetensors", workers=workers,
        dtype=torch.bfloat16, max_tokens=1024, batch_tokens=batch_tokens, shard_images=50,
    )  # fmt: skip
    state = archive.run(job, lambda state: None)
    found = rows(tmp_path)
    assert found.keys() == one_by_one.keys() and all(torch.equal(found[key], one_by_one[key]) for key in found)
    assert state.times is not None and 0 < state.times.encode <= 1.05 * state.times.wall and state.times.copy > 0


def test_pooled_vectors_are_the_means_of_those_bits(
    place: Path, one_by_one: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    vit = fused_vit.load(place / "checkpoint", dtype=torch.bfloat16, max_tokens=1024).warmup()
    paths = list(one_by_one)
    pooled = vit.encode(paths, processor=place / "checkpoint", pool="mean", workers=4)
    want = torch.stack([one_by_one[path].float().mean(0) for path in paths])
    assert torch.allclose(pooled, want, rtol=1e-5, atol=1e-6)


def test_a_process_for_each_gpu(place: Path, one_by_one: dict[str, torch.Tensor], tmp_path: Path) -> None:
    count = torch.cuda.device_count()
    job = Job(
        (str(place / "photos"),), str(place / "checkpoint"), tmp_path, kind="safetensors", workers=1,
        dtype=torch.bfloat16, max_tokens=1024,
    )  # fmt: skip
    devices = archive.devices_of("all") if count > 1 else ["cuda:0", "cuda:0"]
    states = archive.run_on(job, devices, lambda state: None)
    assert sum(state.done for state in states) == 120 and all(state.done for state in states)
    found = rows(tmp_path)
    assert found.keys() == one_by_one.keys() and all(torch.equal(found[key], one_by_one[key]) for key in found)
