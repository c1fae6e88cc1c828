"""What an archive holds is listed whole, once and in one order, and every record can be read alone."""

from __future__ import annotations

import io
import os
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fused_vit import images, sources
from fused_vit.errors import InputError
from fused_vit.images import decode_image, read_image
from fused_vit.sources import Record, find, read, share
from tests.archives import data, photographs, picture, video

Image = pytest.importorskip("PIL.Image")


def pixels(record: Record) -> np.ndarray:
    found = read(record)
    return np.asarray(decode_image(found, record.key) if isinstance(found, bytes) else read_image(found))


def same(records: list[Record], seeds: list[int]) -> bool:
    return len(records) == len(seeds) and all(
        np.array_equal(pixels(record), np.asarray(picture(seed))) for record, seed in zip(records, seeds, strict=True)
    )


def test_a_folder_is_listed_to_its_bottom_in_order_without_what_is_hidden(tmp_path: Path) -> None:
    photographs(tmp_path, range(6))
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "a.png").write_bytes(data(9))
    (tmp_path / ".b.png").write_bytes(data(9))
    (tmp_path / "readme.md").write_text("no image")
    (tmp_path / "UPPER.JPG").write_bytes(data(7))
    listing = find([tmp_path])
    assert [r.key.removeprefix(f"{tmp_path}/") for r in listing.records] == [
        "000.png", "001.png", "003.png", "004.png", "UPPER.JPG", "below/002.png", "below/005.png",
    ]  # fmt: skip
    assert same(listing.records, [0, 1, 3, 4, 7, 2, 5]) and len(listing.ignored) == 1 and not listing.unread


def test_globs_lists_and_files_are_one_listing_in_which_each_comes_once(tmp_path: Path) -> None:
    photographs(tmp_path, range(4))
    names = tmp_path / "names.txt"
    names.write_text(f"{tmp_path}/003.png\n\n  {tmp_path}/absent.png \n{tmp_path}/./000.png\n")
    listing = find([f"{tmp_path}/**/00*.png", names, tmp_path / "001.png"])
    assert same(listing.records, [0, 1, 3, 2])
    assert [(u.key, u.reason) for u in listing.unread] == [(f"{tmp_path}/absent.png", "No such file or directory")]
    with pytest.raises(InputError, match=r"no such file or folder"):
        find([tmp_path / "absent.png"])
    with pytest.raises(InputError, match=r"matches nothing; expected a glob"):
        find([f"{tmp_path}/*.webp"])
    for address in ("s3://photos/2026", "https://host/*.jpg"):
        with pytest.raises(InputError, match=r"an address; expected local files or folders\. .* fused_vit\.ray"):
            find([address])


def test_a_glob_takes_the_kinds_that_a_folder_does_and_those_that_it_names(tmp_path: Path) -> None:
    photographs(tmp_path, range(3))
    for name, content in (("notes.txt", b"no list"), ("labels.json", b"{}"), ("plain", data(5)), ("odd.heic", data(6))):
        (tmp_path / name).write_bytes(content)
    listing = find([f"{tmp_path}/*"])
    assert same(listing.records, [0, 1, 2, 5]) and (len(listing.ignored), listing.unread) == (3, [])
    assert same(find([f"{tmp_path}/*.heic"]).records, [6])
    (tmp_path / "notes.txt").write_text(f"{tmp_path}/001.png\n")
    assert same(find([f"{tmp_path}/*.txt"]).records, [1])


def test_a_source_where_results_go_is_refused(tmp_path: Path) -> None:
    photographs(tmp_path / "in", range(2))
    for without in (tmp_path, tmp_path / "in"):
        with pytest.raises(InputError, match=rf"{tmp_path}/in lies in {without}, where results go"):
            find([tmp_path / "in"], without=without)
    assert len(find([tmp_path / "in"], without=tmp_path / "in" / "out").records) == 2


def test_a_webdataset_tar_is_read_member_by_member(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    with wds.TarWriter(str(tmp_path / "a.tar")) as sink:
        for seed in range(5):
            sample = {"__key__": f"deep/{seed:03d}", "txt": f"picture {seed}", "png": data(seed)}
            sink.write(sample | ({"left.png": data(seed + 50)} if seed == 3 else {}))
    records = find([tmp_path]).records
    assert sorted(r.key.removeprefix(f"{tmp_path}/a.tar/deep/") for r in records) == [
        "000.png", "001.png", "002.png", "003.left.png", "003.png", "004.png",
    ]  # fmt: skip
    by_name = {r.key.rpartition("/")[2]: r for r in records}
    assert same([by_name[f"{s:03d}.png"] for s in range(5)] + [by_name["003.left.png"]], [0, 1, 2, 3, 4, 53])
    assert sorted(r.index for r in records) == list(range(6))


def test_broken_and_compressed_tars_are_rows_of_unread(tmp_path: Path) -> None:
    (tmp_path / "broken.tar").write_bytes(b"no tar at all" * 100)
    with tarfile.open(tmp_path / "good.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    photographs(tmp_path, [0])
    listing = find([tmp_path, tmp_path / "good.tar.gz"])
    assert same(listing.records, [0])
    assert [u.key.rpartition("/")[2] for u in listing.unread] == ["broken.tar", "good.tar.gz"]
    assert "decompress it" in listing.unread[1].reason


def test_names_that_are_not_utf8_are_rows_of_unread_and_cost_nobody_else(tmp_path: Path) -> None:
    """A file's, a folder's, a tar's and a member's; of a tar or Parquet file itself without opening it."""
    photographs(tmp_path, [0, 1])
    os.mkdir(os.fsencode(tmp_path / "folder\udcff"))
    (tmp_path / "folder\udcff" / "a.png").write_bytes(data(2))
    for name in ("bad\udcff.png", "bad\udcff.tar", "bad\udcff.parquet"):
        (tmp_path / name).write_bytes(data(2))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for seed, name in ((3, "good.png"), (4, "member\udcff.png"), (5, "last.png")):
            info = tarfile.TarInfo(name)
            info.size = len(data(seed))
            tar.addfile(info, io.BytesIO(data(seed)))
    listing = find([tmp_path, *sorted(tmp_path.glob("bad*"))])
    assert same(listing.records, [0, 1, 3, 5])
    assert {u.key.removeprefix(f"{tmp_path}/") for u in listing.unread} == {
        r"bad\xff.png", r"bad\xff.tar", r"bad\xff.parquet", r"folder\xff/a.png", r"a.tar/member\xff.png",
    }  # fmt: skip
    assert {u.reason for u in listing.unread} == {"its name is not UTF-8, and results are kept by name; rename it"}


def test_a_folder_that_cannot_be_listed_is_named_in_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shut, real = tmp_path / "shut\udcff", os.scandir
    os.mkdir(os.fsencode(shut))
    photographs(tmp_path, [0])

    def scandir(path: str) -> object:
        if path == str(shut):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    listing = find([tmp_path])
    assert same(listing.records, [0])
    assert [(u.key, u.reason) for u in listing.unread] == [(rf"{tmp_path}/shut\xff", "Permission denied")]


def test_a_keys_digest_stays_what_it_is() -> None:
    """What a folder of results knows its images by: with another digest every run would start anew."""
    digests = [Record(key, 0, key, 0).digest for key in ("photos/a.png", "photos/é 写真.png", "a.parquet#7")]
    assert digests == [5922466941252404387, 9849366126614119958, 17642706739885786484]


def test_a_tar_that_was_cut_off_fails_where_it_ends(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for seed in range(2):
            info = tarfile.TarInfo(f"{seed}.png")
            info.size = len(data(seed))
            tar.addfile(info, io.BytesIO(data(seed)))
    records = find([tmp_path]).records
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: records[1].at[0] + 100])
    assert same(records[:1], [0])
    with pytest.raises(InputError, match=r"1\.png: the tar ends before it does"):
        read(records[1])


def test_a_large_member_of_a_tar_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A video, which is no image's size, is read."""
    limit, names = 1 << 20, ("most.png", "more.png", "clip.mp4")
    monkeypatch.setattr(images, "MAX_BYTES", limit)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, size in zip(names, (limit, limit + 1, limit + 1), strict=True):
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(bytes(size)))
    most, more, clip = find([tmp_path]).records
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=rf"a\.tar/more\.png: {limit + 1} bytes; expected at most {limit}$"):
            read(more)
        assert tracemalloc.get_traced_memory()[1] < limit // 2
    finally:
        tracemalloc.stop()
    assert (len(read(most)), len(read(clip))) == (limit, limit + 1)


@pytest.mark.parametrize("form", ["bytes", "struct", "large"])
def test_parquet_rows_are_read_alone_and_in_any_order(form: str, tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    photographs(tmp_path / "files", [90])
    values = [data(seed) for seed in range(200)] if form == "large" else [data(seed) for seed in range(7)]
    if form == "struct":  # as Hugging Face datasets have it: bytes, a path beside the file, or nothing
        structs = [{"bytes": value, "path": None} for value in values]
        structs[3] = {"bytes": None, "path": "files/000.png"}
        (tmp_path / "files" / "000.png").write_bytes(data(3))
        image = pa.array([*structs, None], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    else:
        image = pa.array(values, pa.large_binary() if form == "large" else pa.binary())
    table = pa.table({"caption": ["x"] * len(image), "image": image})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1000 if form == "large" else 3)
    records = find([tmp_path / "a.parquet"]).records
    assert [r.index for r in records] == list(range(len(image))) and records[4].key == f"{tmp_path}/a.parquet#4"
    order = [199, 3, 70, 0, 150] if form == "large" else [6, 0, 5, 1, 4, 2, 3]
    assert same([records[i] for i in order], order)
    if form == "struct":
        with pytest.raises(InputError, match=r"a\.parquet#7: null"):
            read(records[7])
        structs[3]["path"] = "../../etc/hosts.png"
        image = pa.array(structs, image.type)
        pq.write_table(pa.table({"image": image}), tmp_path / "a.parquet")
        with pytest.raises(InputError, match=r"a\.parquet#3: no bytes, and its path leads out"):
            read(find([tmp_path / "a.parquet"]).records[3])


@pytest.mark.parametrize(
    ("size", "dictionary", "rows"),
    [(900, False, 64), (10_000, False, 6), (100_000, False, 1), (100, True, 8), (900, True, 1), (8000, True, 8)],
)
def test_fewer_parquet_rows_are_in_memory_the_larger_they_are(
    size: int, dictionary: bool, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a dictionary each may be as large as all of them, but where honest files would be slow."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(sources, "PIECE", 1 << 16)
    values = [os.urandom(size) for _ in range(70)]
    image = pa.array([{"bytes": value} for value in values], pa.struct([("bytes", pa.binary())]))
    table = pa.table({"image": image, "image_large": values})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=dictionary)
    records = find([tmp_path / "a.parquet"], "image").records
    assert [read(record) for record in records] == values
    group = sources._rows_of(records[0].file, 0, "image")
    read(records[0])
    assert len(group.values) == rows


def test_a_value_that_a_dictionary_repeats_is_in_memory_a_few_times(tmp_path: Path) -> None:
    """Row by row where it is larger than a piece, which only a value that compresses well makes of a small file."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for mebibytes, rows in ((30, 2), (100, 1)):
        value = bytes(mebibytes << 20)
        repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), pa.array([value], pa.binary()))
        path = tmp_path / f"{mebibytes}.parquet"
        pq.write_table(pa.table({"image": repeated}), path, compression="zstd", store_schema=False)
        records = find([path]).records
        assert path.stat().st_size < 20_000 and len(records) == 64
        group = sources._RowGroup(str(path), 0, "image")
        assert group.at(0) == value and len(group.values) == rows


def test_the_column_of_images_is_found_or_asked_for(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    photographs(tmp_path, [0])
    table = pa.table({"left": [data(1)], "right": [data(2)], "path": ["000.png"], "n": [1]})
    pq.write_table(table, tmp_path / "a.parquet")
    file = tmp_path / "a.parquet"
    assert "not clear from left, right; name it with --column" in find([file]).unread[0].reason
    assert same(find([file], "right").records, [2]) and same(find([file], "path").records, [0])
    assert "'n' is int64; expected bytes" in find([file], "n").unread[0].reason
    assert "no column 'x'; its columns are left" in find([file], "x").unread[0].reason
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    assert "not a Parquet file" in find([tmp_path / "b.parquet"]).unread[0].reason


def test_parquet_files_of_metadata_beside_archives_are_no_failure_unless_they_are_named(tmp_path: Path) -> None:
    """As img2dataset writes: 00000.tar, 00000.parquet of addresses and captions, 00000_stats.json."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "in"
    photographs(folder, [0])
    meta, both = str(folder / "00000.parquet"), str(folder / "both.parquet")
    pq.write_table(pa.table({"url": ["https://a/0.png"], "key": ["0"], "width": [9]}), meta)
    (folder / "00000_stats.json").write_text("{}")
    for source in (folder, f"{folder}/*", f"{tmp_path}/*"):
        listing = find([source])
        assert same(listing.records, [0]) and not listing.unread
        assert listing.ignored == {meta, str(folder / "00000_stats.json")}
    (tmp_path / "list.txt").write_text(meta)
    for source in (meta, tmp_path / "list.txt", f"{tmp_path}/*.txt"):
        listing = find([source])
        assert not listing.ignored and "not clear from url, key, width" in listing.unread[0].reason
    assert "no column 'image'" in find([folder], "image").unread[0].reason
    pq.write_table(pa.table({"left": [b"1"], "right": [b"2"]}), both)
    assert [u.key for u in find([folder]).unread] == [both]


def test_videos_are_records_of_their_own_kind(tmp_path: Path) -> None:
    pytest.importorskip("av")
    photographs(tmp_path, [0])
    video(tmp_path / "clip.mp4")
    assert [(r.key.rpartition("/")[2], r.video) for r in find([tmp_path]).records] == [
        ("000.png", False), ("clip.mp4", True),
    ]  # fmt: skip


@given(st.integers(0, 300), st.integers(1, 40))
def test_shares_partition_whatever_their_number(count: int, parts: int) -> None:
    records = [Record(str(i), 0, str(i), 0) for i in range(count)]
    shares = [list(share(records, part, parts)) for part in range(parts)]
    assert [record for one in shares for record in one] == records
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("part", "parts"), [(-1, 2), (2, 2), (0, 0)])
def test_a_share_that_is_none_is_refused(part: int, parts: int) -> None:
    with pytest.raises(InputError, match="expected i/n"):
        share([], part, parts)


def test_a_list_may_begin_with_a_mark_and_hold_names_that_end_lines_elsewhere(tmp_path: Path) -> None:
    names = [str(tmp_path / "a.jpg"), str(tmp_path / "b\u2028c.jpg")]
    for name in names:
        Path(name).write_bytes(b"x")
    listing = tmp_path / "list.txt"
    listing.write_text("\n".join(names) + "\n", encoding="utf-8-sig")
    found = find([listing])
    assert [record.file for record in found.records] == names and not found.unread


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.jpg", "a.mp4"])
def test_a_pipe_is_a_failure_and_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    found = find([tmp_path / name])
    assert not found.records and "not a regular file" in found.unread[0].reason


def test_a_list_that_is_a_pipe_is_refused_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "list.txt")
    with pytest.raises(InputError, match=r"list\.txt: not a regular file"):
        find([tmp_path / "list.txt"])


def test_a_list_with_a_name_that_no_file_can_have_costs_nobody_else(tmp_path: Path) -> None:
    photographs(tmp_path, [0, 1])
    (tmp_path / "list.txt").write_text(f"{tmp_path}/000.png\n{tmp_path}/000.png\0x\n{tmp_path}/001.png\n")
    listing = find([tmp_path / "list.txt"])
    assert same(listing.records, [0, 1])
    assert [u.key for u in listing.unread] == [rf"{tmp_path}/000.png\x00x"] and "NUL" in listing.unread[0].reason


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a é 写真 😀.png", "a é 写真 😀.png"),
        ("\x1b[2J\x07.png", r"\x1b[2J\x07.png"),
        ("a\n\r\tb\x7f\x9b", r"a\n\r\tb\x7f\x9b"),
        ("a\u202egnp.\u2028", r"a\u202egnp.\u2028"),
        ("\udcff\udc80", r"\xff\x80"),
        ("\ud800", r"\ud800"),
        ("\U000e0001", r"\U000e0001"),
    ],
)
def test_a_name_is_shown_without_what_a_terminal_obeys(name: str, text: str) -> None:
    assert sources.shown(name) == text


def test_a_record_keeps_a_name_that_is_not_printable_and_an_error_shows_it(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("\x1b[2J\u202e.png"))
    assert [r.key for r in find([tmp_path]).records] == [f"{tmp_path}/a.tar/\x1b[2J\u202e.png"]
    (tmp_path / "\x1b.tar").write_bytes(b"no tar" * 200)
    assert [u.key for u in find([tmp_path]).unread] == [rf"{tmp_path}/\x1b.tar"]


def test_names_of_columns_are_shown_too(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"\x1b[2J": [b"1"], "b": [b"2"]}), tmp_path / "a.parquet")
    assert r"from \x1b[2J, b;" in find([tmp_path]).unread[0].reason
