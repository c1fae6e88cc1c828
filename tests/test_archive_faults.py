"""What goes wrong in an archive costs only itself: broken files, dead workers, videos that nothing reads, signals."""

from __future__ import annotations

import json
import os
import signal
import tarfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fused_vit
from fused_vit import archive, sources
from fused_vit.cli import app
from fused_vit.errors import FusedVitError
from fused_vit.images import processor
from fused_vit.preparing import DEATHS, Preparer, Workers
from tests import archives
from tests.test_embed import command, embed, rows, until

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archives.checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return archives.photographs(tmp_path_factory.mktemp("photos"), range(12))


# --- broken files ---


def test_rows_behind_a_broken_page_fail_and_are_no_others(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, images = tmp_path / "broken.parquet", [os.urandom(3000) for _ in range(200)]
    pq.write_table(pa.table({"image": images}), path, write_batch_size=8, data_page_size=4096, use_dictionary=False)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2 : len(whole) // 2 + 50_000] = bytes(50_000)
    path.write_bytes(whole)
    found = {}
    for record in sources.find([path]).records:
        try:
            found[record.index] = sources.read(record)
        except Exception as error:
            assert str(error), record
    assert 0 < len(found) < 200 and all(found[i] == images[i] for i in found)


def test_a_cut_tar_gives_what_lies_before_the_cut(photos: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "cut.tar"
    with tarfile.open(path, "w") as tar:
        for photo in photos:
            tar.add(photo, photo.name)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size * 6 // 10)
    listing = sources.find([path])
    assert 3 <= len(listing.records) < len(photos) and [one.key for one in listing.unread] == [str(path)]
    assert sources.read(listing.records[0]) == photos[0].read_bytes()


def test_a_folder_that_cannot_be_listed_is_a_failure(
    photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shut, real = photos[2].parent, os.scandir

    def scandir(path: Any) -> Any:
        if Path(path) == shut:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    listing = sources.find([photos[0].parent])
    assert len(listing.records) == 8 and [(one.key, one.reason) for one in listing.unread] == [
        (str(shut), "Permission denied")
    ]


def test_a_glob_leaves_out_what_was_written(checkpoint: Path, photos: list[Path], tmp_path: Path) -> None:
    for photo in photos[:4]:
        (tmp_path / photo.name).write_bytes(photo.read_bytes())
    for done, before in ((4, 0), (0, 4)):
        state = embed(f"{tmp_path}/**", checkpoint, tmp_path / "out")
        assert (state.done, state.before, state.failures) == (done, before, 0), state.failed


def test_another_column_is_another_archive(checkpoint: Path, photos: list[Path], tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    both = {"left": [photos[0].read_bytes()], "right": [photos[1].read_bytes()]}
    pq.write_table(pa.table(both), tmp_path / "two.parquet")
    embed(tmp_path / "two.parquet", checkpoint, tmp_path / "out", column="left")
    with pytest.raises(ValueError, match="column 'left' and not 'right'"):
        embed(tmp_path / "two.parquet", checkpoint, tmp_path / "out", column="right")


def test_videos_that_nothing_here_reads_are_failures_beside_images(
    checkpoint: Path, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def need_av() -> None:
        raise ImportError("videos need PyAV")

    monkeypatch.setattr(archive, "need_av", need_av)
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"a clip")
    state = embed([photos[0], clip], checkpoint, tmp_path / "out")
    assert (state.done, [(one.key, one.reason) for one in state.failed]) == (1, [(str(clip), "videos need PyAV")])
    with pytest.raises(ImportError, match="videos need PyAV"):
        embed(clip, checkpoint, tmp_path / "none")


# --- workers ---


class Deadly(Preparer):
    """Some images end the process that decodes them, as a crash in a decoder does."""

    names: tuple[str, ...] | None = ()  # None: every image

    def _decode(self, source: Any) -> Any:
        if self.names is None or (isinstance(source, Path) and source.name in self.names):
            os._exit(9)
        return super()._decode(source)


def deadly(checkpoint: Path, names: tuple[str, ...] | None) -> Deadly:
    spec = fused_vit.load(checkpoint, device="cpu").spec
    prepare = Deadly(spec, processor(spec, checkpoint))
    prepare.names = names
    return prepare


def test_an_image_that_kills_its_worker_costs_only_itself(checkpoint: Path, photos: list[Path]) -> None:
    with Workers(deadly(checkpoint, ("004.png", "008.png")), 2) as workers:
        parts = [part for prepared in workers.run(photos) for part in prepared.parts]
    assert sorted(part.number for part in parts) == list(range(12))
    failed = {part.number: part.reason for part in parts if part.reason}
    assert failed == dict.fromkeys((4, 8), "the process that prepared it died of it")


def test_images_that_kill_one_worker_after_the_other_cost_only_themselves(checkpoint: Path, photos: list[Path]) -> None:
    bad = range(2, 4 + DEATHS)
    with Workers(deadly(checkpoint, tuple(photos[i].name for i in bad)), 2) as workers:
        parts = [part for prepared in workers.run(photos) for part in prepared.parts]
    assert sorted(part.number for part in parts) == list(range(12))
    assert sorted(part.number for part in parts if part.reason) == list(bad)


def test_workers_that_all_die_end_the_run(checkpoint: Path, photos: list[Path]) -> None:
    told = f"{DEATHS + 1} worker processes died one after the other"
    with Workers(deadly(checkpoint, None), 2) as workers, pytest.raises(FusedVitError, match=told):
        list(workers.run(photos))


# --- schedulers ---


def test_torchrun_is_not_told_of_a_bad_image(
    checkpoint: Path, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would end every other rank."""
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    for name, value in {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    line = ["embed", bad, photos[0], "--checkpoint", checkpoint, "-o", tmp_path / "out", "--format", "safetensors"]
    done = CliRunner().invoke(app, [*map(str, line), "--device", "cpu", "--workers", "0"])
    assert done.exit_code == 0 and "1 failed" in done.output and "failed: " in done.output, done.output
    report = json.loads((tmp_path / "out/_report-00000.json").read_text())
    assert report["done"] == 1 and [one["key"] for one in report["failed"]] == [str(bad)]


def test_sigterm_writes_what_is_done(checkpoint: Path, photos: list[Path], tmp_path: Path) -> None:
    for i in range(3000):
        os.link(photos[i % 2], tmp_path / f"{i:05d}.png")
    line = (tmp_path, "--checkpoint", checkpoint, "-o", tmp_path / "out", "--format", "safetensors", "--pool", "mean")
    with command(*line, "--device", "cpu", "--workers", 1, "--batch-tokens", 256, "--shard-images", 500) as process:
        until(process, lambda: list((tmp_path / "out").glob("part-*")))
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    done = len(rows(tmp_path / "out"))
    assert process.returncode and 500 < done < 3000 and done % 500, done
