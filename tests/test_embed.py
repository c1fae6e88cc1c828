"""Archives into folders: whole, resumable, in shares, and nobody's bad image is anybody else's problem."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import fused_vit
from fused_vit import archive, shards
from fused_vit.archive import Job, State, devices_of, part_of
from fused_vit.cli import app
from fused_vit.embedding import Embedder
from fused_vit.errors import FusedVitError, InputError
from fused_vit.images import processor, read_image
from fused_vit.shards import Folder, Row, storage, stored
from fused_vit.videos import read_video
from tests import archives

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parent.parent
# As on any machine that others use too: threads of torch that wait for each other must not burn what they wait for.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archives.checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    archives.photographs(folder, range(30))
    return folder


@pytest.fixture(scope="module")
def one_by_one(checkpoint: Path, photos: Path) -> dict[str, torch.Tensor]:
    """Every photograph's merged rows, each alone through processor and encoder."""
    vit = fused_vit.load(checkpoint, device="cpu")
    prepare = processor(vit.spec, checkpoint)
    found = {}
    for path in sorted(photos.rglob("*.png")):
        found[str(path)] = vit.encode_images([read_image(path)], prepare).split()[0]
    return found


def embed(sources: Any, checkpoint: Path, output: Path, **options: Any) -> State:
    options = {"kind": "safetensors", "workers": 0, "device": "cpu", "batch_tokens": 256} | options
    sources = sources if isinstance(sources, list) else [sources]
    return archive.run(Job(tuple(map(str, sources)), str(checkpoint), output, **options), lambda state: None)


def rows(output: Path) -> dict[str, torch.Tensor]:
    """Of every safetensors shard; a key that comes twice is an error."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(output.glob("part-*.safetensors")):
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            keys = json.loads(file.metadata()["keys"])
        whole = tensors["embedding"]
        parts = whole if len(whole) == len(keys) else whole.split(tensors["rows"].tolist())
        assert not set(keys) & set(found)
        found |= dict(zip(keys, parts, strict=True))
    return found


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    """In fp32 a matmul's last bits depend on how many rows it has: the definition promises no more on a CPU."""
    return got.keys() == want.keys() and all(torch.allclose(got[k], want[k], rtol=1e-4, atol=1e-5) for k in want)


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["embed", *map(str, args), "--device", "cpu", "--workers", "0"])


# --- results ---


def test_everything_is_as_one_by_one(
    checkpoint: Path, photos: Path, one_by_one: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    state = embed(photos, checkpoint, tmp_path, shard_images=7)
    assert (state.done, state.before, state.failures) == (30, 0, 0)
    assert same(rows(tmp_path), one_by_one)
    assert len(list(tmp_path.glob("part-*"))) == 5  # 4 x 7 + 2
    assert state.times is not None and 4 <= state.times.batches < 30


def test_batches_of_one_give_the_bits_of_one_by_one(
    checkpoint: Path, photos: Path, one_by_one: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    embed(photos, checkpoint, tmp_path, batch_tokens=1)
    found = rows(tmp_path)
    assert all(torch.equal(found[key], one_by_one[key]) for key in one_by_one)


def test_parquet_has_the_documented_columns(
    checkpoint: Path, photos: Path, one_by_one: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    result = run(photos, "--checkpoint", checkpoint, "-o", tmp_path / "rows", "--shard-images", 12)
    assert result.exit_code == 0, result.output
    assert "30 images to" in result.stdout and "definition on cpu: " in result.stdout
    table = pq.read_table(tmp_path / "rows")  # the folder as it is: the other files there are skipped
    assert [str(field.type) for field in table.schema] == [
        "string", "int64", "int32", "int32", "int32", "int32",
        "large_list<element: fixed_size_list<element: float>[32]>",
    ]  # fmt: skip
    assert table.column_names == ["key", "index", "grid_t", "grid_h", "grid_w", "rows", "embedding"]
    found = {row["key"]: row for row in table.to_pylist()}
    assert same({key: torch.tensor(row["embedding"]) for key, row in found.items()}, one_by_one)
    assert all(row["grid_t"] * row["grid_h"] * row["grid_w"] == 4 * row["rows"] for row in found.values())


@pytest.mark.parametrize("kind", ["parquet", "safetensors"])
def test_a_pooled_vector_is_the_mean_of_the_rows(
    kind: str, checkpoint: Path, photos: Path, one_by_one: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    means = {key: value.mean(0) for key, value in one_by_one.items()}
    if kind == "parquet":
        pq = pytest.importorskip("pyarrow.parquet")
        embed(photos, checkpoint, tmp_path, pool="mean", kind=kind)
        table = pq.read_table(tmp_path)
        assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[32]"
        assert same({r["key"]: torch.tensor(r["embedding"]) for r in table.to_pylist()}, means)
    else:
        embed(photos, checkpoint, tmp_path, pool="mean")
        assert same(rows(tmp_path), means)


def test_every_kind_of_source_gives_the_same_rows(
    checkpoint: Path, photos: Path, one_by_one: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    wds, pa = pytest.importorskip("webdataset"), pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    files = sorted(photos.rglob("*.png"))[:4]
    with wds.TarWriter(str(tmp_path / "a.tar")) as sink:
        for path in files:
            sink.write({"__key__": path.stem, "png": path.read_bytes()})
    structs = [{"bytes": path.read_bytes(), "path": path.name} for path in files]
    pq.write_table(pa.table({"image": structs}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("\n".join(map(str, files)))
    embed([tmp_path / "a.tar", tmp_path / "a.parquet", tmp_path / "a.txt"], checkpoint, tmp_path / "out")
    found = rows(tmp_path / "out")
    assert len(found) == 12
    for i, path in enumerate(files):
        want = one_by_one[str(path)]
        for key in (str(path), f"{tmp_path}/a.tar/{path.name}", f"{tmp_path}/a.parquet#{i}"):
            assert same({key: found[key]}, {key: want}), key


class FrameSampler:
    """In place of a Hugging Face video processor, which needs torchvision: every third frame, a patch of one grey."""

    valid_kwargs = type("Kwargs", (), {"__annotations__": {"fps": float, "num_frames": int}})
    patch_size, fps, num_frames, do_sample_frames = 16, None, None, True

    def sample_frames(self, metadata: Any, fps: float | None, num_frames: int | None) -> list[int]:
        return list(range(0, metadata.total_num_frames, 3))

    def __call__(self, videos: Any, video_metadata: Any, do_sample_frames: bool, return_tensors: str) -> Any:
        assert not do_sample_frames and video_metadata[0].frames_indices == [0, 3, 6, 9]
        frames = torch.as_tensor(videos[0]).float() / 255  # [4, 64, 64, 3]
        patches = frames[:, 0, 0].mean(1).view(2, 2)[:, None, :, None].expand(2, 16, 2, 768).reshape(32, 1536)
        return {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([[2, 4, 4]])}


def test_videos_are_sampled_decoded_and_embedded_beside_photographs(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("av")
    (tmp_path / "in").mkdir()
    greys = archives.video(tmp_path / "in" / "clip.mp4")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{tmp_path}/in/clip.mp4\n#EXT-X-ENDLIST\n"
    (tmp_path / "in" / "list.avi").write_text(playlist)  # would have FFmpeg open whatever it names
    (tmp_path / "in" / "cut.mp4").write_bytes((tmp_path / "in" / "clip.mp4").read_bytes()[:200])
    archives.photographs(tmp_path / "in", [0])
    monkeypatch.setattr(archive, "video_processor", lambda *_, **__: FrameSampler())
    state = embed(tmp_path / "in", checkpoint, tmp_path / "out")
    assert [unread.key.rpartition("/")[2] for unread in state.failed] == ["cut.mp4", "list.avi"]
    found = rows(tmp_path / "out")
    vit = fused_vit.load(checkpoint, device="cpu")
    shown = torch.tensor(greys[::3].astype("float32") / 255).view(2, 2)  # what the frames were drawn with
    patches = shown[:, None, :, None].expand(2, 16, 2, 768).reshape(32, 1536)
    want = vit(patches, [[2, 4, 4]]).pooler_output
    assert found[f"{tmp_path}/in/clip.mp4"].shape == (8, 32) and want is not None
    assert torch.allclose(found[f"{tmp_path}/in/clip.mp4"], want, rtol=0.05, atol=0.05)  # the way through a codec


def test_as_many_frames_as_only_a_header_has_are_refused_before_they_are_counted_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("av")
    archives.video(tmp_path / "clip.mp4")
    clip, sampler = (tmp_path / "clip.mp4").read_bytes(), FrameSampler()
    crafted = bytearray(clip)
    count = clip.index(b"stts") + 12  # behind the box's name, its version and how many runs of frames it has
    assert struct.unpack_from(">I", clip, count) == (12,)
    struct.pack_into(">I", crafted, count, 40_000_000)
    monkeypatch.setattr(sampler, "sample_frames", lambda *_, **__: pytest.fail("sampled"), raising=False)
    with pytest.raises(InputError, match=r"^a\.mp4: 40000000 frames, as its header has it; expected at most 4194304"):
        read_video(bytes(crafted), "a.mp4", sampler)
    monkeypatch.setattr(sampler, "do_sample_frames", False, raising=False)
    frames, metadata = read_video(clip, "a.mp4", sampler)
    assert frames.shape == (12, 64, 64, 3) and metadata.frames_indices == list(range(12))


def test_hugging_faces_own_video_processor(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    try:
        import torchvision.transforms.v2.functional  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"Hugging Face's video processors need the torchvision of this torch: {error}")
    archives.video(tmp_path / "clip.mp4")
    embed(tmp_path / "clip.mp4", checkpoint, tmp_path / "out", frames=4)
    assert rows(tmp_path / "out")[f"{tmp_path}/clip.mp4"].shape[1] == 32


# --- failures ---


def test_what_fails_is_in_the_report_and_costs_only_itself(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    from PIL import Image

    bad = tmp_path / "bad"
    archives.photographs(bad, [0, 1])
    (bad / "text.png").write_text("no image")
    Image.new("RGB", (4000, 2)).save(bad / "thin.png")
    (bad / "broken.tar").write_bytes(b"x" * 600)
    result = run(bad, "--checkpoint", checkpoint, "-o", tmp_path / "out", "--format", "safetensors")
    assert result.exit_code == 1 and result.stderr.splitlines()[-1].startswith("error: 3 images failed, the first ")
    report = json.loads((tmp_path / "out" / "_report-00000.json").read_text())
    reasons = {Path(row["key"]).name: row["reason"] for row in report["failed"]}
    assert set(reasons) == {"text.png", "thin.png", "broken.tar"} and report["done"] == 2
    assert "not an image" in reasons["text.png"] and "aspect ratio" in reasons["thin.png"]
    assert all(f"failed: {bad}/{name}: " in result.stdout for name in reasons)
    for name in ("text.png", "thin.png"):
        (bad / name).write_bytes(archives.data(5))
    (bad / "broken.tar").unlink()
    result = run(bad, "--checkpoint", checkpoint, "-o", tmp_path / "out", "--format", "safetensors")
    assert result.exit_code == 0 and "2 images to" in result.stdout and "2 were there" in result.stdout
    assert len(rows(tmp_path / "out")) == 4
    (bad / "text.png").unlink()
    embed(bad, checkpoint, tmp_path / "out")  # nothing to do and nothing failed: that is what the report says
    assert json.loads((tmp_path / "out" / "_report-00000.json").read_text())["failed"] == []


def test_an_image_that_cannot_be_encoded_costs_its_batch_nothing(
    checkpoint: Path, photos: Path, one_by_one: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Embedder._encode
    victim = sorted(one_by_one)[4]

    def out_of_memory(self: Embedder, pixels: Any, grid: Any, batch: Any) -> torch.Tensor:
        if any(one.part.source.key == victim for one in batch.members):
            raise torch.OutOfMemoryError("no room for it")
        return real(self, pixels, grid, batch)

    monkeypatch.setattr(Embedder, "_encode", out_of_memory)
    state = embed(photos, checkpoint, tmp_path, batch_tokens=2000)
    assert [(unread.key, unread.reason) for unread in state.failed] == [(victim, "no room for it")]
    assert same(rows(tmp_path), {key: value for key, value in one_by_one.items() if key != victim})


@pytest.mark.parametrize("kind", ["parquet", "safetensors"])
def test_no_name_costs_another_image_its_result(
    kind: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    monkeypatch.chdir(tmp_path)
    names = ["in/good.png", "in/bad\udcff.png", "in/x.png", "x.png.grid_thw", "colours", "__metadata__"]
    os.mkdir("in")
    for seed, name in enumerate(names):
        Path(name).write_bytes(archives.data(seed))
    command = ("in", *names[3:], "--checkpoint", checkpoint, "-o", "out", "--format", kind)
    result = run(*command)
    says = r"in/bad\xff.png: its name is not UTF-8, and results are kept by name; rename it"
    assert result.exit_code == 1 and f"failed: {says}\n" in result.stdout, result.output
    assert result.stderr.splitlines()[-1].startswith(f"error: 1 images failed, the first {says}")
    (failed,) = json.loads(Path("out/_report-00000.json").read_text())["failed"]
    assert f"{failed['key']}: {failed['reason']}" == says
    if kind == "parquet":
        found = {r["key"]: torch.tensor(r["embedding"]) for r in pq.read_table("out").to_pylist()}
    else:
        found = rows(Path("out"))
    del names[1]
    vit = fused_vit.load(checkpoint, device="cpu")
    assert same(found, dict(zip(names, vit.encode(names, processor=checkpoint), strict=True)))
    os.rename(b"in/bad\xff.png", "in/renamed.png")
    result = run(*command)
    assert result.exit_code == 0 and "1 images to" in result.stdout and "5 were there" in result.stdout


def test_nothing_there_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run(tmp_path / "empty", "--checkpoint", checkpoint, "-o", tmp_path / "out", "--format", "safetensors")
    assert result.exit_code == 1 and "no images in there" in result.stderr
    assert not (tmp_path / "out").exists()


# --- resuming ---


def test_killed_anywhere_a_second_run_completes_and_a_third_does_nothing(
    checkpoint: Path, photos: Path, one_by_one: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    from tests.killed import POINTS

    command = [sys.executable, "-m", "tests.killed", str(photos), str(checkpoint), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == list(POINTS)
    for name, row in found.items():
        assert row["codes"] == [-signal.SIGKILL, 0, 0], (name, row, done.stderr)
        assert row["third run did nothing"], name
        assert same(rows(tmp_path / name), one_by_one), name
        assert not list((tmp_path / name).glob("*.tmp")), name
    shards_left = {name: len(row["left"]) for name, row in found.items()}
    assert shards_left["before the first image"] == shards_left["before the manifest"] == 0
    assert shards_left["in the middle of a shard"] == shards_left["before a rename"] == 1  # lost the current one only
    assert shards_left["after a rename"] >= 1 and shards_left["before the report"] == 5


def test_what_was_done_before_an_error_is_kept(
    checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Embedder._encode, []

    def broken(self: Embedder, *arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 3:
            raise RuntimeError("the device went away")
        return real(self, *arguments)

    monkeypatch.setattr(Embedder, "_encode", broken)
    with pytest.raises(RuntimeError, match="went away"):
        embed(photos, checkpoint, tmp_path)
    kept = len(rows(tmp_path))
    assert kept
    monkeypatch.setattr(Embedder, "_encode", real)
    assert embed(photos, checkpoint, tmp_path).before == kept and len(rows(tmp_path)) == 30


def test_new_files_are_added_and_a_changed_one_costs_only_itself(checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    archives.photographs(source, [3, 4])
    embed(source, checkpoint, tmp_path / "out")
    archives.photographs(source, [0])
    state = embed(source, checkpoint, tmp_path / "out")
    assert (state.done, state.before) == (1, 2) and len(rows(tmp_path / "out")) == 3
    (source / "003.png").write_bytes(archives.data(9))
    archives.photographs(source, [5])
    state = embed(source, checkpoint, tmp_path / "out")
    assert (state.done, state.before, state.failures, state.total) == (1, 2, 1, 4) and len(rows(tmp_path / "out")) == 4
    (changed,) = state.failed
    assert changed.key == f"{source}/003.png"
    assert re.match(r"embedded when its file had \d+ bytes, .* delete .*part-00000-000000\.safe", changed.reason)
    assert embed(source, checkpoint, tmp_path / "out").failures == 1


def test_files_that_were_written_since_are_told_of_and_not_done_again(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    archives.photographs(tmp_path / "in", [3, 4])
    embed(tmp_path / "in", checkpoint, tmp_path / "out")
    embed(tmp_path / "in", checkpoint, tmp_path / "out")
    assert not caplog.messages
    later = time.time() + 60
    os.utime(tmp_path / "in" / "004.png", (later, later))
    state = embed(tmp_path / "in", checkpoint, tmp_path / "out")
    assert (state.done, state.before) == (0, 2)
    assert len(caplog.messages) == 1 and "1 of the files" in caplog.text and "004.png" in caplog.text


def test_a_folder_of_another_encoder_or_of_other_options_is_refused(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    embed(photos, checkpoint, out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("part-*")}
    other = archives.checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(
        InputError, match=rf"another encoder, made from {checkpoint}; this one is from {other} .* with -o"
    ):
        embed(photos, other, out)
    with pytest.raises(InputError, match="with pool None and not 'mean', store"):
        embed(photos, checkpoint, out, pool="mean", store="float16")
    described = json.loads((other / "preprocessor_config.json").read_text())
    same_weights = archives.checkpoint(tmp_path / "same", seed=0)
    assert embed(photos, same_weights, out).before == 30  # the same encoder elsewhere
    (same_weights / "preprocessor_config.json").write_text(json.dumps(described | {"image_mean": [0.1] * 3}))
    with pytest.raises(InputError, match="another encoder"):
        embed(photos, same_weights, out)
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("part-*")}


def test_a_shard_that_cannot_be_read_is_named(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    embed(photos, checkpoint, tmp_path)
    (tmp_path / "part-00000-000000.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"part-00000-000000\.safetensors: not a shard .* delete it"):
        embed(photos, checkpoint, tmp_path)


def test_results_below_a_source_are_no_source(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    archives.photographs(tmp_path, [0, 1])
    for done in (2, 0):
        state = embed(tmp_path, checkpoint, tmp_path / "out", kind="parquet")
        assert (state.done, state.failures, state.total) == (done, 0, 2)
    for source in (tmp_path, f"{tmp_path}/**"):
        state = embed(source, checkpoint, tmp_path / "other", kind="parquet")
        assert (state.failures, state.total) == (0, 2) and state.ignored, "the first run's shards are no source"


def test_runs_that_cut_the_work_otherwise_are_refused_while_one_writes(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    """Or both would do some images, and the folder hold them twice."""
    embed(photos, checkpoint, tmp_path, part=0, parts=2)
    about = json.loads((tmp_path / "_manifest.json").read_text())
    with Folder(tmp_path, about, part=0, parts=2, kind="safetensors"):
        with pytest.raises(InputError, match="another run, of 2 shares, is writing to it, and this one is of 1: wait"):
            embed(photos, checkpoint, tmp_path)
        assert embed(photos, checkpoint, tmp_path, part=1, parts=2).done == 15
    assert embed(photos, checkpoint, tmp_path).before == 30


def test_what_cannot_be_asked_for_is_one_error(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"file: is no folder; choose another with -o"):
        embed(photos, checkpoint, tmp_path / "file")
    with pytest.raises(InputError, match="workers is -1; expected 0"):
        embed(photos, checkpoint, tmp_path / "out", workers=-1)


def test_two_runs_of_one_share_are_refused(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    embed(photos, checkpoint, tmp_path)
    about = json.loads((tmp_path / "_manifest.json").read_text())
    with Folder(tmp_path, about, part=0, kind="safetensors"), pytest.raises(InputError, match="another run is writing"):
        embed(photos, checkpoint, tmp_path)
    embed(photos, checkpoint, tmp_path)


# --- shares, devices, processes ---


def test_shards_partition_the_work_exactly(
    checkpoint: Path, photos: Path, one_by_one: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    states = [embed(photos, checkpoint, tmp_path, part=part, parts=4) for part in range(4)]
    assert sum(state.done for state in states) == 30 and all(7 <= state.done <= 8 for state in states)
    assert same(rows(tmp_path), one_by_one)
    assert {path.name.split("-")[1] for path in tmp_path.glob("part-*")} == {f"0000{i}" for i in range(4)}
    (tmp_path / "_report-old.json").write_text("{}")  # somebody's copy
    assert embed(photos, checkpoint, tmp_path).before == 30  # whoever did it
    last = [embed(photos, checkpoint, tmp_path / "many", part=1 << 17, parts=(1 << 17) + 1) for _ in range(2)]
    assert [(state.done, state.before) for state in last] == [(1, 0), (0, 1)], "of more parts than five digits count"


def test_torchrun_needs_no_option(
    checkpoint: Path, photos: Path, one_by_one: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in range(3):
        for name, value in (("RANK", rank), ("WORLD_SIZE", 3), ("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", 3)):
            monkeypatch.setenv(name, str(value))
        result = run(photos, "--checkpoint", checkpoint, "-o", tmp_path, "--format", "safetensors")
        assert result.exit_code == 0 and "10 images to" in result.stdout, result.output
    assert same(rows(tmp_path), one_by_one)
    assert part_of("1/5") == (1, 5)  # an option is stronger
    for text in ("5/5", "1", "a/b", "-1/3"):
        with pytest.raises(InputError, match="expected i/n"):
            part_of(text)


def test_devices_are_said_in_one_sentence() -> None:
    assert devices_of("cpu,cpu") == ["cpu", "cpu"]
    with pytest.raises(InputError, match=r"expected all, or numbers such as 0,1"):
        devices_of("first")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="sees no GPU here"):
            devices_of("all")
        with pytest.raises(InputError, match="names cuda:3; torch sees 0"):
            devices_of("3")


def descendants(pid: int) -> set[int]:
    """Processes below a process, by /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(stat.parent.name)] = int(fields[1])
    found, more = set(), {pid}
    while more:
        found |= more
        more = {child for child, parent in parents.items() if parent in more} - found
    return found - {pid}


def gone(pids: set[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def command(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """`fused-vit embed` as a process, ended at the latest with the block."""
    line = [sys.executable, "-m", "fused_vit.cli", "embed", *map(str, arguments)]
    with subprocess.Popen(
        line, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def until(process: subprocess.Popen[str], happened: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same photographs under many names: enough to be in the middle of when something happens."""
    folder = tmp_path_factory.mktemp("many")
    for seed in range(8):
        archives.photographs(folder, [seed])
    for i in range(1200):
        os.link(folder / f"{3 * (i % 2):03d}.png", folder / f"copy{i:05d}.png")
    return folder


def test_a_killed_run_leaves_no_process_and_no_work_undone(checkpoint: Path, many: Path, tmp_path: Path) -> None:
    arguments = (many, "--checkpoint", checkpoint, "-o", tmp_path, "--format", "safetensors", "--pool", "mean")
    with command(*arguments, "--workers", 1, "--shard-images", 100, "--batch-tokens", 512) as process:
        until(process, lambda: len(list(tmp_path.glob("part-*"))) >= 2)
        below = descendants(process.pid)
        assert below
        process.kill()
        left = not gone(below, 10)
        for pid in filter(alive, below):
            os.kill(pid, signal.SIGKILL)
        assert not left, "workers outlived the run"
    before = len(rows(tmp_path))
    assert 200 <= before < 1208
    state = embed(many, checkpoint, tmp_path, pool="mean", batch_tokens=4096)
    assert state.before == before and len(rows(tmp_path)) == 1208


def test_a_worker_that_is_killed_costs_nothing(checkpoint: Path, many: Path, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(state: State) -> None:
        if state.done >= 150 and not killed:
            below = descendants(os.getpid())
            killed.extend(worker for pid in below for worker in descendants(pid))  # of the process that forks them
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    job = Job(
        (str(many),), str(checkpoint), tmp_path, kind="safetensors", pool="mean", workers=1, device="cpu",
        batch_tokens=512, shard_images=100,
    )  # fmt: skip
    state = archive.run(job, kill)
    assert killed and (state.done, state.failures) == (1208, 0) and len(rows(tmp_path)) == 1208


def test_a_process_for_each_device(
    checkpoint: Path, photos: Path, one_by_one: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Of whom one fails for a bad image, and nobody is left behind."""
    bad = photos.parent / "bad.png"
    bad.write_text("no image")
    arguments = (photos, bad, "--checkpoint", checkpoint, "-o", tmp_path, "--format", "safetensors", "--workers", 0)
    with command(*arguments, "--devices", "cpu,cpu") as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "error: 1 images failed" in err.splitlines()[-1], err
    assert "30 images to" in out and out.count("definition on cpu: ") == 2 and "failed: " in out
    assert same(rows(tmp_path), one_by_one)
    assert {path.name[:10] for path in tmp_path.glob("part-*")} == {"part-00000", "part-00001"}


# --- dtypes ---


def test_what_a_shard_keeps_is_chosen_by_format() -> None:
    assert (
        storage(None, "parquet", True, torch.bfloat16) == storage(None, "parquet", False, torch.bfloat16) == "float32"
    )
    assert storage(None, "safetensors", False, torch.bfloat16) == "bfloat16"
    assert (
        storage(None, "parquet", False, torch.float16)
        == storage("float16", "parquet", True, torch.float32)
        == "float16"
    )
    with pytest.raises(InputError, match="Parquet has no bfloat16; take --store float32"):
        storage("bfloat16", "parquet", False, torch.bfloat16)
    assert stored(torch.tensor([1.0, 7e4]), "float32").tolist() == [1.0, 7e4]
    with pytest.raises(InputError, match="beyond float16's 65504"):
        stored(torch.tensor([1.0, 7e4]), "float16")
    assert stored(torch.zeros(2, 4, 8), "float32").shape == (2, 32)


@pytest.mark.parametrize(("store", "arrow"), [("float32", "float"), ("float16", "halffloat")])
@pytest.mark.parametrize("pooled", [True, False])
def test_parquet_keeps_every_number(store: str, arrow: str, pooled: bool, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    values = [torch.randn((8,) if pooled else (n, 8)).to(getattr(torch, store)) for n in (3, 1, 5)]
    written = [Row(f"k{i}", i, 10 + i, i, (1, 2, 2 * len(v)), len(v), v) for i, v in enumerate(values)]
    about = {"encoder": "e", "checkpoint": "c", "store": store}
    with Folder(tmp_path, about, part=3, kind="parquet") as folder:
        path = folder.write(written)
        assert {digest: size for digest, (size, _) in folder.done().items()} == {0: 10, 1: 11, 2: 12}
    assert path.name == "part-00003-000000.parquet"
    table = pq.read_table(path)
    assert arrow in str(table.schema.field("embedding").type)
    for value, row in zip(values, table.to_pylist(), strict=True):
        assert torch.equal(torch.tensor(row["embedding"], dtype=value.dtype), value)


def test_a_manifest_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / shards.MANIFEST).write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        Folder(tmp_path, {"encoder": "e", "checkpoint": "c"}, part=0, kind="parquet")


def test_a_run_without_workers_to_start_says_so(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(FusedVitError, match="batch_tokens is 0; expected a positive"):
        embed(photos, checkpoint, tmp_path / "a", batch_tokens=0)
    with pytest.raises(InputError, match="format is 'csv'; expected one of parquet"):
        embed(photos, checkpoint, tmp_path / "b", kind="csv")
