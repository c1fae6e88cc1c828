"""Reading a tower out of a checkpoint: where files come from, what is read of them, and every way it can be wrong."""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import struct
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError
from safetensors.torch import load_file, save_file

from fused_vit.errors import CheckpointError
from fused_vit.weights import checkpoint
from fused_vit.weights.checkpoint import Checkpoint, TowerTensors, read_beside

PREFIXES = ("model.visual.", "visual.", "")
EXPECTED = {"patch_embed.proj.weight": (4, 3, 2, 2), "blocks.0.norm1.bias": (4,), "blocks.1.norm1.bias": (4,)}
BYTES = 2 * (48 + 4 + 4)
TEXT, VISION = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
VISION2 = "model-00003-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
REPO, COMMIT = "Qwen/Qwen3-VL-8B-Instruct", "0123456789abcdef0123456789abcdef01234567"


def tower(prefix: str = "model.visual.") -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    return {prefix + k: torch.randn(s, generator=gen).bfloat16() for k, s in EXPECTED.items()}


def text() -> dict[str, torch.Tensor]:
    return {"model.language_model.embed_tokens.weight": torch.ones(8, 4), "lm_head.weight": torch.ones(8, 4)}


def write(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "qwen3_vl"}')
    save_file(tensors, folder / name)
    return folder


def write_index(folder: Path, files: dict[str, Any]) -> Path:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return folder


def write_sharded(folder: Path) -> Path:
    """Three shards: text, then the tower in two."""
    names = {TEXT: text(), VISION: {}, VISION2: {}}
    for i, (key, value) in enumerate(tower().items()):
        names[(VISION, VISION2)[i % 2]][key] = value
    for name, tensors in names.items():
        write(folder, tensors, name)
    return write_index(folder, {key: name for name, tensors in names.items() for key in tensors})


def read(source: str | Path, prefixes: tuple[str, ...] = PREFIXES) -> TowerTensors:
    return Checkpoint.open(source).tower(prefixes, EXPECTED)


def refuse(source: str | Path, *parts: str, revision: str | None = None) -> str:
    """Opens and reads, expects a CheckpointError, checks that its message has every part."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(source, revision=revision).tower(PREFIXES, EXPECTED)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    return message


def check(got: TowerTensors, prefix: str = "model.visual.") -> None:
    assert list(got) == list(EXPECTED) and len(got) == 3
    for key, value in got.items():
        assert value.device.type == "cpu" and torch.equal(value, tower()["model.visual." + key])
    assert (got.prefix, got.bytes) == (prefix, BYTES)


# --- what is read ---------------------------------------------------------------


@pytest.mark.parametrize("prefix", PREFIXES)
def test_one_file_under_each_prefix(tmp_path: Path, prefix: str) -> None:
    check(read(write(tmp_path, tower(prefix) | text())), prefix)


def test_the_first_prefix_wins(tmp_path: Path) -> None:
    write(tmp_path, tower("visual.") | tower("model.visual.") | text())
    assert read(tmp_path).prefix == "model.visual."
    assert read(tmp_path, ("visual.", "model.visual.")).prefix == "visual."


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_file_with_config_beside_it(tmp_path: Path, as_type: type) -> None:
    write_sharded(tmp_path)  # its index is not looked at
    write(tmp_path, tower(), "tower.safetensors")
    opened = Checkpoint.open(as_type(tmp_path / "tower.safetensors"))
    assert opened.config == {"model_type": "qwen3_vl"} and opened.source == str(tmp_path / "tower.safetensors")
    assert set(opened.files.values()) == {"tower.safetensors"}
    check(opened.tower(PREFIXES, EXPECTED))


def test_shards_without_a_tower_tensor_may_be_absent_or_broken(tmp_path: Path) -> None:
    check(read(write_sharded(tmp_path)))
    (tmp_path / TEXT).write_bytes(b"broken")
    check(read(tmp_path))
    (tmp_path / TEXT).unlink()
    check(read(tmp_path))


def test_open_reads_only_the_config(tmp_path: Path) -> None:
    write(tmp_path, tower())
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    assert Checkpoint.open(tmp_path).config["model_type"] == "qwen3_vl"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_dtypes_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    got = read(write(tmp_path, {k: v.to(dtype) for k, v in tower().items()}))
    assert {v.dtype for v in got.values()} == {dtype} == {info.dtype for info in got.infos.values()}
    assert got.bytes == BYTES // 2 * dtype.itemsize == sum(v.nbytes for v in got.values())


def test_infos_say_where_a_tensor_lies(tmp_path: Path) -> None:
    info = read(write_sharded(tmp_path)).infos["blocks.0.norm1.bias"]
    assert (info.file, info.dtype, info.shape, info.bytes) == (tmp_path / VISION2, torch.bfloat16, (4,), 8)


def test_a_mapping_of_the_tower_alone(tmp_path: Path) -> None:
    got = read(write(tmp_path, tower() | text()))
    assert "blocks.0.norm1.bias" in got and "lm_head.weight" not in got
    for key in ("lm_head.weight", "model.visual.blocks.0.norm1.bias"):
        with pytest.raises(KeyError):
            got[key]


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    read(write(tmp_path, tower()))["blocks.0.norm1.bias"].fill_(7)
    check(read(tmp_path))


# --- bytes read from the disk ---------------------------------------------------

MIB = 2**20


def write_big(folder: Path, hole: int) -> tuple[Path, int]:
    """A checkpoint laid out as text tensor (sparse, `hole` bytes), tower, text tensor. Returns file and data start."""
    header, at, data = {}, 0, {}
    tensors = tower()
    for key, dtype, shape, size in [
        ("model.language_model.a", "F32", [hole // 4], hole),
        *((k, "BF16", list(v.shape), v.nbytes) for k, v in tensors.items()),
        ("model.language_model.b", "F32", [hole // 4], hole),
    ]:
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        data[key] = at
        at += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path, start = folder / "model.safetensors", 8 + len(encoded)
    (folder / "config.json").write_text("{}")
    with path.open("wb") as file:
        file.truncate(start + at)
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for key, value in tensors.items():
            file.seek(start + data[key])
            file.write(value.view(torch.int16).numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path, start


def resident(path: Path) -> int:
    """Bytes of a file in the page cache; asked through a mapping that is never touched."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "mincore"):
        pytest.skip("the C library has no mincore")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapped)), pages)
        del start
    if failed:
        pytest.skip(f"mincore: {os.strerror(ctypes.get_errno())}")
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page cache residency is asked of Linux")
def test_the_language_model_is_never_read(tmp_path: Path) -> None:
    hole, allowance = 256 * MIB, 64 * MIB  # two holes; the kernel reads ahead up to 8 MiB at each of a few places
    path, start = write_big(tmp_path, hole)
    if resident(path) > MIB:
        pytest.skip("this file system does not drop its page cache on request")
    got = read(path)
    check(got)
    assert got.bytes == BYTES
    read_by_us = resident(path)
    with path.open("rb") as file:  # the measure itself: reading half of a hole shows
        file.seek(start)
        for _ in range(hole // 2 // MIB):
            file.read(MIB)
    if resident(path) < hole // 2:
        pytest.skip("this file system's page cache is not visible to mincore")
    assert 0 < read_by_us < allowance


# --- a tower that does not fit --------------------------------------------------


def test_all_misfits_in_one_error_before_any_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = tower() | text()
    del tensors["model.visual.blocks.1.norm1.bias"]
    tensors["model.visual.blocks.0.norm1.bias"] = torch.zeros(5)
    tensors["model.visual.patch_embed.proj.weight"] = torch.zeros(4, 3, 2, 2, dtype=torch.float8_e4m3fn)
    tensors["model.visual.blocks.2.norm1.bias"] = torch.zeros(4)
    monkeypatch.setattr(Checkpoint, "_read", lambda *_: pytest.fail("read a tensor"))
    message = refuse(
        write(tmp_path, tensors),
        "1 missing: blocks.1.norm1.bias",
        "1 unexpected: blocks.2.norm1.bias",
        "1 of another shape: blocks.0.norm1.bias is [5], expected [4]",
        "1 of another dtype: patch_embed.proj.weight is F8_E4M3",
        "not a quantized one: the tower is read as BF16, F16, F32, F64",
        "model.visual.",
        str(tmp_path),
    )
    assert "lm_head" not in message and "language_model" not in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e5m2, torch.bool])
def test_quantized_towers_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = tower() | {"model.visual.blocks.0.norm1.bias": torch.zeros(4, dtype=dtype)}
    assert "1 of another dtype: blocks.0.norm1.bias is " in refuse(write(tmp_path, tensors), "quantized")


def test_a_quantized_language_model_is_no_concern(tmp_path: Path) -> None:
    check(read(write(tmp_path, tower() | {"model.language_model.q": torch.zeros(4, dtype=torch.int8)})))


def test_long_lists_are_cut(tmp_path: Path) -> None:
    extra = {f"model.visual.blocks.{i}.norm1.bias": torch.zeros(4) for i in range(2, 27)}
    message = refuse(write(tmp_path, tower() | extra), "25 unexpected: ", " and 5 more")
    assert message.count("norm1.bias") == 20


def test_without_prefix_only_the_towers_own_modules_are_unexpected(tmp_path: Path) -> None:
    check(read(write(tmp_path, tower("") | text())), "")
    message = refuse(write(tmp_path, tower("") | text() | {"blocks.9.x": torch.zeros(1)}), "1 unexpected: blocks.9.x")
    assert "lm_head" not in message


def test_no_tower_at_all(tmp_path: Path) -> None:
    refuse(write(tmp_path, text()), "'model.visual.', 'visual.', ''", "lm_head.weight", "whole model")


def test_an_index_that_disagrees_with_its_shard(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    save_file({"model.visual.blocks.0.norm1.bias": torch.zeros(4)}, tmp_path / VISION)
    refuse(tmp_path, "2 missing: patch_embed.proj.weight, blocks.1.norm1.bias")


# --- files that are absent, broken or hostile -----------------------------------


def test_absent_shards_are_all_named(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / VISION).unlink()
    (tmp_path / VISION2).unlink()
    message = refuse(tmp_path, f"shards absent: {VISION}, {VISION2}", "Download")
    assert f"absent: {TEXT}" not in message


def test_nothing_there(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "no such folder or file", "owner/name")
    refuse(Path("owner/name"), "no such folder or file")  # a Path is never a hub id
    refuse("../owner/name", "no such folder or file")
    refuse("./name", "no such folder or file")


def test_revision_of_a_local_source(tmp_path: Path) -> None:
    refuse(write(tmp_path, tower()), "is local", "'main'", revision="main")


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    refuse(tmp_path, f"neither {INDEX} nor model.safetensors", "config.json", "Download")


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    pickle = tmp_path / "pytorch_model.bin"
    torch.save({}, pickle)
    refuse(tmp_path, "pytorch_model.bin", "never loaded", "save_pretrained")
    refuse(pickle, "expected a folder or a .safetensors file", "never loaded")
    write_index(tmp_path, {"model.visual.blocks.0.norm1.bias": pickle.name})
    refuse(tmp_path, "got pytorch_model.bin", "never loaded")


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "no config.json"),
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[1]", "JSON list"),
        (b"[" * 10**6, "not JSON"),
    ],
    ids=["absent", "empty", "cut", "bytes", "list", "deep"],
)
@pytest.mark.parametrize("of_file", [False, True])
def test_bad_config(tmp_path: Path, content: bytes | None, says: str, of_file: bool) -> None:
    write(tmp_path, tower())
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    refuse(tmp_path / "model.safetensors" if of_file else tmp_path, says, "config.json")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: b"",
        lambda raw: raw[:5],
        lambda raw: raw[:40],
        lambda raw: raw[:-1],
        lambda raw: raw + b"\0",
        lambda raw: b"\xff" * 8 + raw[8:],
        lambda raw: raw[:8] + b"\xff" * (len(raw) - 8),
        lambda raw: raw.replace(b'"BF16"', b'"F32"  '),
        lambda raw: raw.replace(b"[0,", b"[1,"),
        lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    ],
    ids=["empty", "short", "cut-header", "cut-data", "longer", "huge-header", "junk-header", "dtype", "offsets", "lfs"],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_corrupt_file(tmp_path: Path, spoil: Any, sharded: bool) -> None:
    path = write_sharded(tmp_path) / VISION if sharded else write(tmp_path, tower()) / "model.safetensors"
    raw = path.read_bytes()
    spoiled = spoil(raw)
    assert spoiled != raw
    path.write_bytes(spoiled)
    refuse(tmp_path, str(path), "no readable safetensors", "Download it again")


@pytest.mark.parametrize(
    "name",
    [
        "../evil.safetensors",
        "/evil.safetensors",
        "sub/x.safetensors",
        "..",
        ".",
        "",
        "x.bin",
        "a\\b.safetensors",
        "..safetensors",
        ".safetensors",
        "x.safetensors\n",
        "x\0.safetensors",
        "C:x.safetensors",
        3,
        None,
        ["a"],
        {},
    ],
    ids=repr,
)
def test_shard_names_that_are_no_plain_files(tmp_path: Path, name: Any) -> None:
    write(tmp_path / "evil", tower())
    write(tmp_path, tower(), "evil.safetensors")
    folder = write_index(write(tmp_path / "model", text()), {"lm_head.weight": name})
    refuse(folder, INDEX, "beside it, got")


@pytest.mark.parametrize("content", [b"{}", b"[]", b"{", b'{"weight_map": []}', b'{"weight_map": {}}'])
def test_bad_index(tmp_path: Path, content: bytes) -> None:
    (write_sharded(tmp_path) / INDEX).write_bytes(content)
    refuse(tmp_path, INDEX)


@pytest.mark.parametrize("place", ["model", "repo/snapshots/commit"])  # the second only resembles the hub's cache
def test_links_out_of_the_folder_are_refused(tmp_path: Path, place: str) -> None:
    outside = write(tmp_path / "outside", tower(), "secret.safetensors") / "secret.safetensors"
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    folder = write_sharded(tmp_path / place)
    (folder / VISION).rename(folder / "renamed.safetensors")
    (folder / VISION).symlink_to("renamed.safetensors")
    check(read(folder))
    (folder / VISION).unlink()
    (folder / VISION).symlink_to(outside)
    refuse(folder, str(folder / VISION), str(outside), "outside its folder")
    (folder / VISION).unlink()
    (folder / VISION).symlink_to("nowhere")
    refuse(folder, f"shards absent: {VISION}")


@pytest.mark.parametrize("name", ["config.json", VISION])
def test_links_into_another_folder_of_the_hubs_cache_are_refused(cache: Path, name: str) -> None:
    """Of a downloaded folder that is named as a repository in the cache is."""
    check(read(cache))
    private = cache.parents[2] / "private"
    private.mkdir()
    (cache / name).resolve().rename(private / name)
    (cache / name).unlink()
    (cache / name).symlink_to(f"../../../private/{name}")
    refuse(cache, str(cache / name), str(private / name), "outside its folder")


def test_a_linked_folder_is_fine(tmp_path: Path) -> None:
    write_sharded(tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    check(read(tmp_path / "link"))


# --- the hub --------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[tuple[str, str | None]]]:
    """A repository that is a local snapshot folder, and the list of (file, revision) that were asked for."""
    folder, asked = tmp_path / COMMIT, []

    def download(repo: str, name: str, *, revision: str | None = None) -> str:
        assert repo == REPO
        asked.append((name, revision))
        if not (folder / name).exists():
            raise EntryNotFoundError(name)
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return folder, asked


def test_hub_fetches_only_the_towers_shards_of_one_commit(hub: tuple[Path, list[Any]]) -> None:
    write_sharded(hub[0])
    opened = Checkpoint.open(REPO, revision="v1")
    assert hub[1] == [("config.json", "v1")]
    check(opened.tower(PREFIXES, EXPECTED))
    check(opened.tower(PREFIXES, EXPECTED))
    assert hub[1][1:] == [(INDEX, COMMIT), (VISION, COMMIT), (VISION2, COMMIT)]
    assert opened.source == REPO


def test_hub_without_an_index(hub: tuple[Path, list[Any]]) -> None:
    write(hub[0], tower() | text())
    check(read(REPO))
    assert [name for name, _ in hub[1]] == ["config.json", INDEX, "model.safetensors"]


def test_hub_files_beside_the_weights_are_of_one_commit(hub: tuple[Path, list[Any]]) -> None:
    (write(hub[0], tower()) / "b.json").write_text('{"b": 1}')
    assert read_beside(REPO, ("config.json", "a.json", "b.json"), revision="v1") == {
        "config.json": (hub[0] / "config.json", {"model_type": "qwen3_vl"}),
        "b.json": (hub[0] / "b.json", {"b": 1}),
    }
    assert hub[1] == [("config.json", "v1"), ("a.json", COMMIT), ("b.json", COMMIT)]


def test_hub_lacks_files(hub: tuple[Path, list[Any]]) -> None:
    refuse(REPO, REPO, "no config.json", "HF_HUB_OFFLINE")
    write(hub[0], tower(), "other.safetensors")
    refuse(REPO, f"neither {INDEX} nor model.safetensors", "HF_HUB_OFFLINE")
    (write_sharded(hub[0]) / VISION2).unlink()
    refuse(REPO, f"shards absent: {VISION2}", "HF_HUB_OFFLINE")


def test_hub_index_is_not_trusted(hub: tuple[Path, list[Any]]) -> None:
    write_index(write(hub[0], text()), {"model.visual.blocks.0.norm1.bias": "../../x.safetensors"})
    refuse(REPO, "got ../../x.safetensors")
    assert [name for name, _ in hub[1]] == ["config.json", INDEX]


@pytest.mark.parametrize("error", [GatedRepoError, OSError, RuntimeError])
def test_hub_errors_are_checkpoint_errors(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error.__new__(error, "no access")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    refuse(REPO, REPO, "config.json", error.__name__, "hf auth login", "give a folder")


def test_hub_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refuse(REPO, "needs huggingface_hub", "install")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's own cache layout, offline: refs/main, blobs, and a snapshot of links into them; that snapshot."""
    root = tmp_path / "hub" / f"models--{REPO.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for folder in (root / "refs", root / "blobs", snapshot):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for path in write_sharded(tmp_path / "files").iterdir():
        if path.name != TEXT:
            path.rename(root / "blobs" / f"etag-{path.name}")
            (snapshot / path.name).symlink_to(f"../../blobs/etag-{path.name}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def test_offline_cache(cache: Path) -> None:
    check(read(REPO))
    check(Checkpoint.open(REPO, revision=COMMIT).tower(PREFIXES, EXPECTED))
    refuse("owner/other", "no config.json", "HF_HUB_OFFLINE")
    refuse(REPO, "no config.json", "HF_HUB_OFFLINE", revision="other")
    (cache / VISION).unlink()
    refuse(REPO, f"shards absent: {VISION}", "HF_HUB_OFFLINE")


def test_a_cache_snapshot_given_as_a_folder_or_file(cache: Path) -> None:
    check(read(cache))
    refuse(cache / VISION, "1 missing: blocks.0.norm1.bias")
    outside = write(cache.parents[3] / "outside", tower(), VISION) / VISION
    (cache / VISION).unlink()
    (cache / VISION).symlink_to(outside)
    refuse(cache, "outside its folder")


# --- how a tensor is read -------------------------------------------------------


def test_a_tensor_of_any_shape_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    shapes = {"a": (), "b": (0,), "c": (3, 0, 2), "d": (1,), "e": (5, 7)}
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    want = {
        f"{key}{i}": torch.randn(shape).to(dtype) for key, shape in shapes.items() for i, dtype in enumerate(dtypes)
    }
    others = {"x": torch.ones(3, dtype=torch.int8), "y": torch.ones(3, dtype=torch.bool), "z": torch.ones(2).cfloat()}
    write(tmp_path, want | others)
    got = Checkpoint.open(tmp_path).tower(
        ("",), {key: tuple(value.shape) for key, value in want.items()}, ("x", "y", "z")
    )
    assert set(got) == set(want)
    for key, value in load_file(tmp_path / "model.safetensors").items():
        if key in want:
            assert got[key].dtype == value.dtype and torch.equal(got[key], value)


def test_a_tensor_is_read_in_as_many_pieces_as_the_system_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system reads at most 2 GiB at once, and less whenever it likes."""
    sizes: list[int] = []
    preadv = os.preadv

    def short(file: int, views: list[memoryview], at: int) -> int:
        sizes.append(len(views[0]))
        return preadv(file, [views[0][:5]], at)

    monkeypatch.setattr(checkpoint, "PIECE", 7)
    monkeypatch.setattr(os, "preadv", short)
    check(read(write(tmp_path, tower())))
    assert max(sizes) == 7 and len(sizes) >= BYTES / 5


def test_a_file_that_shrinks_is_an_error_of_its_tensor(tmp_path: Path) -> None:
    got = read(write(tmp_path, tower()))
    path = tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* cannot be read .*1 bytes early.* shrunk"):
        for key in got:
            got[key]


def test_a_file_that_is_replaced_is_read_as_it_was_checked(tmp_path: Path) -> None:
    got = read(write(tmp_path, tower()))
    (tmp_path / "model.safetensors").rename(tmp_path / "old")
    (tmp_path / "model.safetensors").write_bytes(b"another")
    check(got)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted by Linux's /proc")
def test_files_are_closed_with_the_last_who_reads_them(tmp_path: Path) -> None:
    def held() -> list[str]:
        paths = (os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
        return [path for path in paths if path.startswith(str(tmp_path.resolve()))]

    got = read(write_sharded(tmp_path))
    assert len(held()) == 2
    del got
    gc.collect()
    assert held() == []
    (tmp_path / VISION).write_bytes(b"broken")
    refuse(tmp_path, VISION)
    gc.collect()
    assert held() == []
