"""Hostile checkpoints: a table of crafted ones, and byte flips; run in a process of its own, which reports as JSON.

python -m tests.weights.hostile crafted           every case of CASES
python -m tests.weights.hostile processors        every case of PROCESSORS
python -m tests.weights.hostile videos            every case of VIDEO_PROCESSORS
python -m tests.weights.hostile flips 10000       as many flips of one bit to eight, all over a checkpoint

The process watches itself: Python's own opens by an audit hook, everybody's opens of files outside the checkpoint's
folder by inotify (safetensors opens from Rust, which no audit hook sees), its peak memory by getrusage.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

import fused_vit
from fused_vit.errors import CheckpointError, SpecError
from fused_vit.images import processor
from fused_vit.layouts import choose_layout
from fused_vit.towers import find_tower, parse_config
from fused_vit.videos import video_processor
from fused_vit.weights.checkpoint import LARGEST_CONFIG, LARGEST_COUNT, LARGEST_HEADERS, LARGEST_INDEX, Checkpoint

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
TEXT, ONE, TWO = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
VISION = {
    "model_type": "qwen3_vl", "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 8, "patch_size": 2,
    "temporal_patch_size": 1, "out_hidden_size": 8, "num_position_embeddings": 4, "deepstack_visual_indexes": [],
    "in_channels": 3, "spatial_merge_size": 2, "hidden_act": "gelu_pytorch_tanh",
    "rope_parameters": {"rope_theta": 10000.0},
}  # fmt: skip
PREFIX = "model.visual."
QKV, NORM = f"{PREFIX}blocks.0.attn.qkv.weight", f"{PREFIX}blocks.0.norm1.bias"
TIB, MIB = 1 << 40, 1 << 20
ROOT = Path(__file__).resolve().parents[2]  # Python opens modules of it


def good_tensors() -> dict[str, torch.Tensor]:
    config = {"model_type": "qwen3_vl", "vision_config": VISION}
    expected = find_tower(config).layouts[0].expected(parse_config(config))
    generator = torch.Generator().manual_seed(0)
    return {PREFIX + name: torch.randn(shape, generator=generator) for name, shape in expected.items()}


def good(folder: Path) -> Path:
    """A checkpoint that loads: text in one shard, the tower in two."""
    folder.mkdir(parents=True)
    shards: dict[str, dict[str, torch.Tensor]] = {TEXT: {"lm_head.weight": torch.ones(4, 4)}, ONE: {}, TWO: {}}
    for i, (name, tensor) in enumerate(good_tensors().items()):
        shards[(ONE, TWO)[i % 2]][name] = tensor
    for shard, tensors in shards.items():
        (folder / shard).write_bytes(save(tensors, {"format": "pt"}))
    files = {name: shard for shard, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    (folder / CONFIG).write_text(json.dumps({"model_type": "qwen3_vl", "vision_config": VISION}))
    (folder / PREPROCESSOR).write_text(json.dumps(FIELDS))
    (folder / VIDEO).write_text(json.dumps(VIDEO_FIELDS))
    (folder / PROCESSOR).write_text("{}")
    return folder


# --- how to spoil one -----------------------------------------------------------

Spoil = Callable[[Path, Path], None]  # (folder, a folder outside it that holds what must not be opened)


def put(name: str, content: bytes) -> Spoil:
    return lambda folder, _: void((folder / name).write_bytes(content))


def change(name: str, edit: Callable[[bytes], bytes]) -> Spoil:
    def spoil(folder: Path, _: Path) -> None:
        raw = (folder / name).read_bytes()
        assert edit(raw) != raw, "this case spoils nothing"
        (folder / name).write_bytes(edit(raw))

    return spoil


def remove(name: str) -> Spoil:
    return lambda folder, _: (folder / name).unlink()


def sparse(name: str, start: bytes, size: int) -> Spoil:
    def spoil(folder: Path, _: Path) -> None:
        with (folder / name).open("wb") as file:
            file.write(start)
            file.truncate(size)

    return spoil


def instead(name: str, make: Callable[[Path, Path], object]) -> Spoil:
    """Something else at a file's place: make(path, outside)."""

    def spoil(folder: Path, outside: Path) -> None:
        (folder / name).unlink()
        make(folder / name, outside)

    return spoil


def config(**fields: Any) -> Spoil:
    """The tower's fields in config.json; None removes one."""
    kept = {k: v for k, v in {**VISION, **fields}.items() if v is not None}
    return put(CONFIG, json.dumps({"model_type": "qwen3_vl", "vision_config": kept}).encode())


def index(**files: Any) -> Spoil:
    """Where the index says that QKV lies."""
    return change(INDEX, lambda raw: json.dumps(edited(json.loads(raw), files)).encode())


def edited(whole: dict[str, Any], files: dict[str, Any]) -> dict[str, Any]:
    return {**whole, "weight_map": {**whole["weight_map"], QKV: files["qkv"]}}


def header(edit: Callable[[dict[str, Any]], object], name: str = TWO) -> Spoil:
    """A shard's header, edited in place; its bytes of data stay."""

    def rewrite(raw: bytes) -> bytes:
        size = struct.unpack("<Q", raw[:8])[0]
        fields = json.loads(raw[8 : 8 + size])
        edit(fields)
        encoded = json.dumps(fields).encode()
        return struct.pack("<Q", len(encoded)) + encoded + raw[8 + size :]

    return change(name, rewrite)


def text_header(old: bytes, new: bytes, name: str = TWO) -> Spoil:
    """A shard's header as text, for what no dict can hold."""

    def rewrite(raw: bytes) -> bytes:
        size = struct.unpack("<Q", raw[:8])[0]
        encoded = raw[8 : 8 + size].replace(old, new, 1)
        return struct.pack("<Q", len(encoded)) + encoded + raw[8 + size :]

    return change(name, rewrite)


def both(*spoils: Spoil) -> Spoil:
    return lambda folder, outside: void([spoil(folder, outside) for spoil in spoils])


def void(_: object) -> None: ...


class Exploit:
    """Unpickling it leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch exploited",)


def offsets(fields: dict[str, Any], by: int, name: str = QKV) -> None:
    begin, end = fields[name]["data_offsets"]
    fields[name]["data_offsets"] = [begin + by, end + by]


def shape(*dims: int) -> Spoil:
    return header(lambda fields: fields[QKV].update(shape=list(dims)))


def dtype(name: str) -> Spoil:
    return header(lambda fields: fields[QKV].update(dtype=name))


SHARD = "no readable safetensors"


@dataclass(frozen=True)
class Case:
    """says: what the message must contain; the file or the key at fault among it.

    reads: tensors that are read before it is seen; late: spoiled between the checks and the first of them.
    """

    spoil: Spoil
    says: tuple[str, ...]
    error: type[Exception] = CheckpointError
    reads: int = 0
    late: bool = False


def spec(spoil: Spoil, *says: str) -> Case:
    return Case(spoil, says, SpecError)


def bad(spoil: Spoil, *says: str) -> Case:
    return Case(spoil, says)


def late(spoil: Spoil, *says: str) -> Case:
    return Case(spoil, says, reads=1, late=True)


def cut(size: int) -> Spoil:
    """Both shards of the tower end after so many bytes."""
    return both(*(lambda folder, _, name=name: os.truncate(folder / name, size) for name in (ONE, TWO)))  # type: ignore[misc]


# --- dense JSON: as many values as fit, one byte below a limit -------------------


def dense(start: bytes, unit: bytes, end: bytes, size: int) -> bytes:
    """start, unit, unit, ..., spaces, end: size - 1 bytes."""
    body = start + unit * ((size - 1 - len(start) - len(end)) // len(unit))
    return body + b" " * (size - 1 - len(body) - len(end)) + end


def numbered(start: bytes, count: int, width: int, end: bytes) -> bytes:
    """An object of so many different keys and values."""
    return start + b"".join(b'"%0*d":"%0*d",' % (width, i, width, i) for i in range(count)) + end


def dense_header(unit: bytes, end: bytes = b'"z":0}', start: bytes = b"{") -> Spoil:
    content = dense(start, unit, end, LARGEST_HEADERS - 4096)  # which leaves room for the header of the other shard
    return put(TWO, struct.pack("<Q", len(content)) + content)


def dense_headers(folder: Path, _: Path) -> None:
    """A tensor of the tower in each of 40 shards, whose headers have 4 MiB, all but one name a comment."""
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    at = {name: f"x{i}.safetensors" for i, name in enumerate(n for n in files if n.startswith(PREFIX))}
    for name, shard in at.items():
        fields = {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {"a": "a" * 4 * MIB}}
        encoded = json.dumps(fields).encode()
        (folder / shard).write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(4))
    (folder / INDEX).write_text(json.dumps({"weight_map": files | at}))


CASES: dict[str, Case] = {
    # config.json
    "config absent": bad(remove(CONFIG), CONFIG),
    "config empty": bad(put(CONFIG, b""), CONFIG, "not JSON"),
    "config truncated": bad(change(CONFIG, lambda raw: raw[:-9]), CONFIG, "not JSON"),
    "config not UTF-8": bad(put(CONFIG, b'{"model_type": "\xff\xfe"}'), CONFIG, "not JSON"),
    "config a list": bad(put(CONFIG, b"[]"), CONFIG, "list"),
    "config nested deep": bad(put(CONFIG, b'{"a":' * 10**5), CONFIG, "not JSON"),
    "config of a tebibyte": bad(sparse(CONFIG, b"{", TIB), CONFIG, "not JSON", "more than"),
    "config a link outside": bad(instead(CONFIG, lambda p, o: p.symlink_to(o / CONFIG)), CONFIG, "outside its folder"),
    "config a pipe": bad(instead(CONFIG, lambda p, _: os.mkfifo(p)), CONFIG),
    "config a folder": bad(instead(CONFIG, lambda p, _: p.mkdir()), CONFIG),
    "config with a number of 5000 digits": bad(put(CONFIG, b'{"depth": %s}' % (b"9" * 5000)), CONFIG, "not JSON"),
    "config of dense lists": bad(put(CONFIG, dense(b'{"a":[', b"[],", b"0]}", LARGEST_CONFIG)), CONFIG, "values"),
    "config of as many objects as its bytes hold": spec(
        put(CONFIG, dense(b'{"model_type":"bert","a":[', b'{"":0},', b"0]}", LARGEST_CONFIG)), "model_type is bert"
    ),
    "config a byte too long": bad(put(CONFIG, dense(b"{", b" ", b"}", LARGEST_CONFIG + 2)), CONFIG, "more than"),
    "unknown model": spec(put(CONFIG, b'{"model_type": "bert"}'), "model_type is bert"),
    "model_type a list": spec(put(CONFIG, b'{"model_type": ["qwen3_vl"]}'), "model_type is ['qwen3_vl']"),
    "vision_config a list": spec(put(CONFIG, b'{"model_type": "qwen3_vl", "vision_config": []}'), "vision_config"),
    "gigantic depth": spec(config(depth=10**7), "depth is 10000000"),
    "depth of 4000 digits": spec(config(depth=10**4000), "vision_config.depth"),
    "gigantic width": spec(config(hidden_size=10**12), "hidden_size is 1000000000000"),
    "wide beyond the tensors": bad(config(hidden_size=128), "of another shape", "blocks.0.attn.qkv.weight"),
    "gigantic patches": spec(config(patch_size=10**9), "patch_size"),
    "gigantic position table": spec(config(num_position_embeddings=10**16), "num_position_embeddings"),
    "a block too many": bad(config(depth=2), "missing", "blocks.1.attn.qkv.weight"),
    "negative depth": spec(config(depth=-1), "depth is -1"),
    "fraction of a head": spec(config(num_heads=2.5), "num_heads is 2.5"),
    "width not a number": spec(config(hidden_size=float("nan")), "hidden_size is nan"),
    "infinite theta": spec(config(rope_parameters={"rope_theta": float("inf")}), "rope_theta is inf"),
    "theta not a number": spec(config(rope_parameters={"rope_theta": float("nan")}), "rope_theta is nan"),
    "rope_parameters a list": spec(config(rope_parameters=[1]), "rope_parameters is [1]"),
    "activation a list": spec(config(hidden_act=["gelu"]), "hidden_act is ['gelu']"),
    "sizes as lists of lists": spec(config(patch_size=[[2], [2]]), "patch_size is"),
    "deepstack outside": spec(config(deepstack_visual_indexes=[5]), "deepstack"),
    "config lies about the MLP": bad(config(intermediate_size=12), "of another shape", "mlp.linear_fc1"),
    "config lies about heads": spec(config(num_heads=3), "3 heads"),
    # the index
    "index truncated": bad(change(INDEX, lambda raw: raw[:-9]), INDEX, "not JSON"),
    "index not UTF-8": bad(change(INDEX, lambda raw: raw.replace(b"qkv", b"\xff\xfe\xfd", 1)), INDEX, "not JSON"),
    "index without a map": bad(put(INDEX, b'{"weight_map": [1]}'), INDEX, "weight_map"),
    "index of a tebibyte": bad(sparse(INDEX, b"{", TIB), INDEX, "not JSON", "more than"),
    "index names a key twice": bad(
        change(INDEX, lambda raw: raw.replace(b'"weight_map": {', f'"weight_map": {{"{QKV}": "{TEXT}", '.encode())),
        INDEX, QKV, "twice",
    ),
    "index climbs out": bad(index(qkv=f"../outside/{TWO}"), INDEX, "../outside"),
    "index is absolute": bad(index(qkv=f"/{TWO}"), INDEX, f"/{TWO}"),
    "index names a folder's file": bad(index(qkv=f"sub/{TWO}"), INDEX, f"sub/{TWO}"),
    "index with a backslash": bad(index(qkv=f"..\\outside\\{TWO}"), INDEX, "outside"),
    "index with NUL": bad(index(qkv="a\0.safetensors"), INDEX),
    "index names a pickle": bad(index(qkv="pytorch_model.bin"), INDEX, "pytorch_model.bin", "never loaded"),
    "index with a name of 5000 letters": bad(index(qkv="a" * 5000 + ".safetensors"), "aaa", "shards absent"),
    "index with a number for a name": bad(index(qkv=3), INDEX, "got 3"),
    "index names an absent shard": bad(index(qkv="nowhere.safetensors"), "nowhere.safetensors", "absent"),
    "index names the wrong shard": bad(index(qkv=TEXT), "missing", "blocks.0.attn.qkv.weight"),
    "index of another kind": bad(put(INDEX, b'"weight_map"'), INDEX, "str"),
    "index of dense lists": bad(put(INDEX, dense(b'{"a":[', b"[],", b"0]}", LARGEST_INDEX)), INDEX, "values"),
    "index of dense objects": bad(put(INDEX, dense(b'{"a":[', b'{"":0},', b"0]}", LARGEST_INDEX)), INDEX, "values"),
    "index of dense names": bad(put(INDEX, dense(b"{", b'"":"",', b'"a":0}', LARGEST_INDEX)), INDEX, "values"),
    "index of as many objects as it may have": bad(
        put(INDEX, dense(b'{"a":[', b'{"":0},', b"0]}", 7 * (LARGEST_COUNT // 2 - 9))), INDEX, "weight_map"
    ),
    "index of as many names as it may have": bad(
        put(INDEX, numbered(b'{"weight_map":{', LARGEST_COUNT - 9, 28, b'"a":""}}')), INDEX, "beside it, got"
    ),
    "index of one word": bad(put(INDEX, dense(b'{"a":"', b"a", b'"}', LARGEST_INDEX)), INDEX, "weight_map"),
    "index of one wide word": bad(
        put(INDEX, dense('{"a":"\U0001f600'.encode(), b"a", b'"}', LARGEST_INDEX)), INDEX, "quarter"
    ),
    "index of one wide word below its limit": bad(
        put(INDEX, dense('{"a":"\U0001f600'.encode(), b"a", b'"}', LARGEST_INDEX // 4)), INDEX, "weight_map"
    ),
    "index of one word that is wide once read": bad(
        put(INDEX, dense(b'{"a":"\\ud83d\\ude00', b"a", b'"}', LARGEST_INDEX)), INDEX, "weight_map"
    ),
    "index a link outside": bad(instead(INDEX, lambda p, o: p.symlink_to(o / INDEX)), INDEX, "outside its folder"),
    # a shard
    "shard absent": bad(remove(TWO), TWO, "absent"),
    "shard a link outside": bad(instead(TWO, lambda p, o: p.symlink_to(o / TWO)), TWO, "outside its folder"),
    "shard a relative link outside": bad(instead(TWO, lambda p, o: p.symlink_to(f"../{o.name}/{TWO}")), TWO, "outside"),
    "shard a link to itself": bad(instead(TWO, lambda p, _: p.symlink_to(p.name)), TWO, "absent"),
    "shard a pipe": bad(instead(TWO, lambda p, _: os.mkfifo(p)), TWO, "absent"),
    "shard a folder": bad(instead(TWO, lambda p, _: p.mkdir()), TWO, "absent"),
    "shard a device": bad(instead(TWO, lambda p, _: p.symlink_to("/dev/zero")), TWO),
    "shard empty": bad(put(TWO, b""), TWO, SHARD),
    "shard of 7 bytes": bad(change(TWO, lambda raw: raw[:7]), TWO, SHARD),
    "header truncated": bad(change(TWO, lambda raw: raw[:99]), TWO, SHARD),
    "data truncated": bad(change(TWO, lambda raw: raw[:-1]), TWO, SHARD),
    "data too long": bad(change(TWO, lambda raw: raw + b"\0"), TWO, SHARD),
    "header of 2^63 bytes": bad(change(TWO, lambda raw: struct.pack("<Q", 1 << 63) + raw[8:]), TWO, SHARD),
    "header of 99 MB": bad(sparse(TWO, struct.pack("<Q", 99 * 10**6), 200 * MIB), TWO, SHARD, "99000000 bytes"),
    "header of 15 MiB of spaces": bad(put(TWO, struct.pack("<Q", 15 * MIB) + b" " * (15 * MIB)), TWO, SHARD),
    "header of zeros, a tebibyte": bad(sparse(TWO, struct.pack("<Q", 64), TIB), TWO, SHARD),
    "header of dense lists": bad(dense_header(b"[],", b"0]}", b'{"a":['), TWO, SHARD, "values"),
    "header of dense objects": bad(dense_header(b'{"":0},', b"0]}", b'{"a":['), TWO, SHARD, "values"),
    "header of dense names": bad(dense_header(b'"":0,'), TWO, SHARD, "values"),
    "header of one word": bad(dense_header(b"a", b'"}', b'{"a":"'), TWO, SHARD, "no dtype"),
    "header of one wide word": bad(dense_header(b"a", b'"}', '{"a":"\U0001f600'.encode()), TWO, SHARD, "no dtype"),
    "headers of 160 MiB together": bad(dense_headers, SHARD, "in all headers together"),
    "header in UTF-16": bad(put(TWO, struct.pack("<Q", 4) + "{}".encode("utf-16-le")), TWO, SHARD),
    "header a list": bad(put(TWO, struct.pack("<Q", 2) + b"[]"), TWO, SHARD),
    "header without tensors": bad(header(lambda fields: fields.clear()), TWO, SHARD),
    "header with a number for a tensor": bad(header(lambda fields: fields.update(a=1)), TWO, SHARD),
    "header with a word for a shape": bad(header(lambda fields: fields[QKV].update(shape="48")), TWO, SHARD),
    "header with fractions for offsets": bad(
        header(lambda fields: fields[QKV].update(data_offsets=[float(at) for at in fields[QKV]["data_offsets"]])),
        TWO, SHARD,
    ),
    "header with truth for a side": bad(header(lambda fields: fields[QKV].update(shape=[True, 768])), TWO, SHARD),
    "header not UTF-8": bad(text_header(b"norm", b"\xff\xfe\xfd\xfc"), TWO, SHARD),
    "header nested deep": bad(put(TWO, struct.pack("<Q", 10**6) + b"[" * 10**6), TWO, SHARD),
    "header names a key twice": bad(
        text_header(b"{", f'{{"{QKV}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}},'.encode()),
        TWO, SHARD, QKV, "twice",
    ),
    "header names a field twice": bad(text_header(b'"dtype":"F32",', b'"dtype":"F64","dtype":"F32",'), TWO, "twice"),
    "offsets overlap": bad(header(lambda fields: offsets(fields, -4)), TWO, SHARD),
    "offsets leave a hole": bad(header(lambda fields: offsets(fields, 4)), TWO, SHARD),
    "offsets beyond the end": bad(header(lambda fields: offsets(fields, TIB)), TWO, SHARD),
    "offsets beyond 2^64": bad(header(lambda fields: offsets(fields, 1 << 64)), TWO, SHARD),
    "offsets negative": bad(header(lambda fields: offsets(fields, -TIB)), TWO, SHARD),
    "offsets reversed": bad(header(lambda fields: fields[QKV]["data_offsets"].reverse()), TWO, SHARD),
    "shape lies": bad(shape(48, 17), TWO, SHARD),
    "shape transposed": bad(shape(16, 48), "blocks.0.attn.qkv.weight is [16, 48], expected [48, 16]"),
    "shape of 2^62": bad(shape(1 << 62, 16), TWO, SHARD),
    "shape beyond 2^64": bad(shape(1 << 64), TWO, SHARD),
    "shape overflows to itself": bad(shape(48, 16, 1 << 32, 1 << 32), TWO, SHARD),
    "shape negative": bad(shape(-48, -16), TWO, SHARD),
    "shape of 64 dims": bad(shape(48, 16, *[1] * 62), "blocks.0.attn.qkv.weight is [48, 16, 1,"),
    "shape of 1000 dims": bad(shape(48, 16, *[1] * 1000), TWO, SHARD),
    "shape of a million digits": bad(shape(*[2**62] * 60), TWO, SHARD),
    "dtype unknown": bad(dtype("WHAT"), "of another dtype", "blocks.0.attn.qkv.weight is WHAT"),
    "dtype a list": bad(header(lambda fields: fields[QKV].update(dtype=["F32"])), TWO, SHARD),
    "dtype of 5000 letters": bad(dtype("F" * 5000), "blocks.0.attn.qkv.weight is FFF"),
    "dtype of integers": bad(dtype("I32"), "of another dtype", "blocks.0.attn.qkv.weight is I32"),
    "dtype lies": bad(dtype("F16"), TWO, SHARD),
    "tensor of integers' size": bad(both(dtype("U16"), shape(96, 16)), "blocks.0.attn.qkv.weight is U16"),
    "quantized to four bits": bad(both(dtype("F4"), shape(48, 128)), "blocks.0.attn.qkv.weight is F4"),
    "quantized to eight bits": bad(both(dtype("F8_E4M3"), shape(48, 64)), "blocks.0.attn.qkv.weight is F8_E4M3"),
    "a tensor too few": bad(header(lambda f: f.update({"model.visual.x": f.pop(NORM)}), ONE), "blocks.0.norm1.bias"),
    "a tensor in two shards": bad(put(ONE, save(good_tensors())), ONE, TWO, "lies in", PREFIX),
    "shards emptied while they are loaded": late(cut(0), "patch_embed", "cannot be read", "has shrunk"),
    "shards cut while they are loaded": late(cut(2000), "patch_embed", "cannot be read", "has shrunk"),
    "pickle renamed": bad(put(TWO, pickle.dumps(Exploit())), TWO, SHARD),
    "pickle of protocol 0 renamed": bad(put(TWO, pickle.dumps(Exploit(), 0)), TWO, SHARD),
    "torch.save renamed": bad(instead(TWO, lambda p, _: torch.save({QKV: Exploit()}, p)), TWO, SHARD),
    "git lfs pointer": bad(put(TWO, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), TWO, "lfs"),
    "pickle alone": bad(
        both(remove(INDEX), lambda f, _: torch.save({QKV: Exploit()}, f / "pytorch_model.bin")),
        "pytorch_model.bin", "never loaded",
    ),
}  # fmt: skip

PREPROCESSOR, PROCESSOR, VIDEO = "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"
FIELDS = {
    "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 2, "temporal_patch_size": 1, "merge_size": 2,
    "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 16, "longest_edge": 4096},
}  # fmt: skip


def fields(**changed: Any) -> Spoil:
    return put(PREPROCESSOR, json.dumps({**FIELDS, **changed}).encode())


def link(name: str) -> Spoil:
    return instead(name, lambda p, o: p.symlink_to(o / name))


def kind(name: Any, *says: str) -> Case:
    return bad(fields(image_processor_type=name), PREPROCESSOR, *says)


PROCESSORS: dict[str, Case] = {
    "a link outside": bad(link(PREPROCESSOR), PREPROCESSOR, "outside its folder"),
    "the processor's a link outside": bad(link(PROCESSOR), PROCESSOR, "outside its folder"),
    "nested deep": bad(put(PREPROCESSOR, b"[" * 10**5), PREPROCESSOR, "not JSON"),
    "nested as deep as JSON may be": bad(
        put(PREPROCESSOR, b'{"size":' + b'{"a":' * 900 + b"1" + b"}" * 901), PREPROCESSOR
    ),
    "truncated": bad(change(PREPROCESSOR, lambda raw: raw[:-9]), PREPROCESSOR, "not JSON"),
    "a list": bad(put(PREPROCESSOR, b"[]"), PREPROCESSOR, "list"),
    "of a tebibyte": bad(sparse(PREPROCESSOR, b"{", TIB), PREPROCESSOR, "more than"),
    "the processor's of a tebibyte": bad(sparse(PROCESSOR, b"{", TIB), PROCESSOR, "more than"),
    "dense": bad(put(PREPROCESSOR, dense(b'{"a":[', b"[],", b"0]}", LARGEST_CONFIG)), PREPROCESSOR, "values"),
    "of a type in a list": kind(["x"], "image_processor_type is ['x']"),
    "of a type that is a function": kind("pipeline", "image_processor_type is 'pipeline'; expected the name"),
    "of a type that is a module": kind("models", "image_processor_type is 'models'; expected the name"),
    "of a type that is a config": kind("BertConfig", "image_processor_type is 'BertConfig'; expected the name"),
    "of a type that chooses": kind("AutoProcessor", "image_processor_type is 'AutoProcessor'; expected the name"),
    "of a type that others derive from": kind("BaseImageProcessor", "BaseImageProcessor, which others derive from"),
    "of no type": kind("", "image_processor_type is ''; expected the name"),
    "of endless pixels": bad(
        fields(size={"shortest_edge": 10**12, "longest_edge": 10**12}), PREPROCESSOR, "size.shortest_edge is 10000"
    ),
    "of endless pixels in their old place": bad(fields(min_pixels=10**12), PREPROCESSOR, "min_pixels is 10000"),
    "of an endless side": bad(
        fields(image_processor_type="SiglipImageProcessor", size={"height": 10**5, "width": 4}), PREPROCESSOR, "height"
    ),
    "of an endless side in a list": bad(
        fields(image_processor_type="SiglipImageProcessor", size=[10**5, 4]), PREPROCESSOR, "size is 100000"
    ),
    "of an endless shorter side": bad(
        fields(image_processor_type="CLIPImageProcessor", size={"shortest_edge": 10**7}), PREPROCESSOR, "size.shortest"
    ),
    "of an endless crop": bad(
        fields(image_processor_type="CLIPImageProcessor", crop_size=10**7), PREPROCESSOR, "crop_size is 10000000"
    ),
    "of endless tiles": bad(
        fields(image_processor_type="GotOcr2ImageProcessor", size={"height": 8000, "width": 8000}, max_patches=99),
        PREPROCESSOR, "99 tiles of 8000",
    ),
    "of a size that is not a number": bad(
        put(PREPROCESSOR, b'{"size": {"shortest_edge": NaN}}'), PREPROCESSOR, "shortest_edge is nan"
    ),
    "of a number of 4000 digits": bad(fields(max_pixels=10**4000), PREPROCESSOR, "max_pixels is 1000"),
    "of endless frames": bad(fields(temporal_patch_size=10**6), PREPROCESSOR, "temporal_patch_size is 1000000"),
    "of a mean in words": bad(fields(image_mean="x"), PREPROCESSOR, "image_mean is 'x'"),
    "of a mean of two": bad(fields(image_mean=[0.5, 0.5]), PREPROCESSOR, "image_mean is [0.5, 0.5]"),
    "of a mean of nothing": bad(fields(image_mean=[None] * 3), PREPROCESSOR, "image_mean is [None, None, None]"),
    "of a spread of zero": bad(fields(image_std=[0.5, 0, 0.5]), PREPROCESSOR, "image_std is [0.5, 0, 0.5]"),
    "of a type that nobody has": kind("NoSuchImageProcessor", "has no NoSuchImageProcessor"),
    "with a method": bad(fields(preprocess=1), PREPROCESSOR, "preprocess is a method"),
    "of a size that transformers refuses": bad(fields(size={"depth": 3}), PREPROCESSOR),
    "of another tower": bad(fields(patch_size=14), PREPROCESSOR, "'patch_size': 14", "one release"),
    "the processor's of another tower": bad(
        put(PROCESSOR, json.dumps({"image_processor": {**FIELDS, "patch_size": 14}}).encode()), PROCESSOR, "one release"
    ),
}  # fmt: skip

VIDEO_FIELDS = FIELDS | {"video_processor_type": "Qwen3VLVideoProcessor"}


def video_fields(**changed: Any) -> Spoil:
    return put(VIDEO, json.dumps({**VIDEO_FIELDS, **changed}).encode())


VIDEO_PROCESSORS: dict[str, Case] = {
    "a link outside": bad(link(VIDEO), VIDEO, "outside its folder"),
    "the images' a link outside": bad(link(PREPROCESSOR), PREPROCESSOR, "outside its folder"),
    "nested deep": bad(put(VIDEO, b"[" * 10**5), VIDEO, "not JSON"),
    "truncated": bad(put(VIDEO, json.dumps(VIDEO_FIELDS).encode()[:-9]), VIDEO, "not JSON"),
    "a list": bad(put(VIDEO, b"[]"), VIDEO, "list"),
    "of a tebibyte": bad(sparse(VIDEO, b"{", TIB), VIDEO, "more than"),
    "the images' of a tebibyte": bad(sparse(PREPROCESSOR, b"{", TIB), PREPROCESSOR, "more than"),
    "the processor's of a tebibyte": bad(sparse(PROCESSOR, b"{", TIB), PROCESSOR, "more than"),
    "dense": bad(put(VIDEO, dense(b'{"a":[', b"[],", b"0]}", LARGEST_CONFIG)), VIDEO, "values"),
    "of endless pixels": bad(video_fields(size={"shortest_edge": 1, "longest_edge": 10**12}), "size.longest_edge is"),
    "of an endless side": bad(video_fields(crop_size={"height": 10**7, "width": 4}), "crop_size.height is 10000000"),
    "of a size that is not a number": bad(put(VIDEO, b'{"size": {"shortest_edge": NaN}}'), "shortest_edge is nan"),
    "of endless frames": bad(video_fields(temporal_patch_size=10**6), "temporal_patch_size is 1000000"),
    "of more frames than anything has": bad(video_fields(max_frames=10**12), "max_frames is 10000"),
    "of a mean of two": bad(video_fields(image_mean=[0.5, 0.5]), "image_mean is [0.5, 0.5]"),
    "the processor's of a spread of zero": bad(
        put(PROCESSOR, json.dumps({"video_processor": {**VIDEO_FIELDS, "image_std": [0.5, 0, 0.5]}}).encode()),
        "image_std is [0.5, 0, 0.5]",
    ),
}  # fmt: skip


# --- watching ---------------------------------------------------------------------

OPENED: list[str] | None = None  # what Python opens, while it is a list
FORBIDDEN: list[str] = []  # audit events that mean that a checkpoint's code ran, or was about to


def audit(event: str, args: tuple[Any, ...]) -> None:
    if OPENED is not None:
        if event == "open" and isinstance(args[0], (str, bytes)):
            OPENED.append(os.path.realpath(os.fsdecode(args[0])))
        elif event.startswith(("pickle.", "subprocess.", "os.system", "os.exec", "socket.")):
            FORBIDDEN.append(event)


class Watch:
    """Opens of a folder's files by anybody, as Linux's inotify sees them."""

    IN_OPEN = 0x20

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.inotify_init1(os.O_NONBLOCK)
        if self.fd < 0 or libc.inotify_add_watch(self.fd, os.fsencode(folder), self.IN_OPEN) < 0:
            raise OSError(ctypes.get_errno(), "inotify")

    def opened(self) -> bool:
        try:
            return bool(os.read(self.fd, 4096))
        except BlockingIOError:
            return False


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def recording(opened: list[str]) -> Iterator[None]:
    global OPENED
    OPENED = opened
    try:
        yield
    finally:
        OPENED = None


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All that the public `load` does; the weights."""
    return dict(fused_vit.load(folder, device="cpu").weights)


def stored(folder: Path) -> dict[str, tuple[torch.Tensor, bool]]:
    """The tower's tensors as read."""
    checkpoint = Checkpoint.open(folder)
    tower, spec = find_tower(checkpoint.config), parse_config(checkpoint.config)
    layout = choose_layout(tower.layouts, spec, checkpoint.files)
    return {k: v.clone() for k, v in checkpoint.tower(layout.prefixes, layout.expected(spec), layout.unused).items()}


def prepare(folder: Path) -> Any:
    """The image processor, which has no tensor of the tower to read."""
    return processor(parse_config({"model_type": "qwen3_vl", "vision_config": VISION}), folder)


def prepare_video(folder: Path) -> None:
    """The video processor; where there is no torchvision, as far as it is not needed."""
    with suppress(ImportError):
        video_processor(parse_config({"model_type": "qwen3_vl", "vision_config": VISION}), folder)


def crafted(root: Path, cases: dict[str, Case], act: Callable[[Path], object]) -> dict[str, Any]:
    """Each case: what it raised, what it opened and what it cost."""
    outside = good(root / "outside")
    reads: list[str] = []
    spoiling: list[Callable[[], None]] = []
    plain = Checkpoint._read

    def read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
        reads.append(name)
        if spoiling:
            spoiling.pop()()
        return plain(checkpoint, name)

    Checkpoint._read = read  # type: ignore[method-assign]
    act(good(root / "good"))
    assert len(reads) == (len(good_tensors()) if act is load else 0)
    watch = Watch(outside)
    (outside / CONFIG).read_bytes()
    assert watch.opened(), "the watch sees nothing"
    rows = {}
    for i, (name, case) in enumerate(cases.items()):
        folder = good(root / f"case{i}" / "model")
        (folder.parent / "outside").symlink_to(outside)
        spoil = partial(case.spoil, folder, outside)
        if case.late:
            spoiling.append(spoil)
        else:
            spoil()
        reads.clear()
        FORBIDDEN.clear()
        watch.opened()
        opened: list[str] = []
        before, start = peak_mib(), time.perf_counter()
        error: BaseException | None = None
        try:
            with recording(opened):
                act(folder)
        except BaseException as caught:
            error = caught
        rows[name] = {
            "error": type(error).__name__,
            "message": str(error),
            "seconds": time.perf_counter() - start,
            "grown_mib": peak_mib() - before,
            "outside": watch.opened(),
            "opened": [p for p in opened if not p.startswith((str(folder), sys.prefix, sys.base_prefix, str(ROOT)))],
            "forbidden": list(FORBIDDEN),
            "tensors_read": len(reads),
            "exploited": Path("exploited").exists(),
        }  # fmt: skip
    return rows


def flips(root: Path, count: int, seed: int) -> dict[str, Any]:
    """One to eight bits of a random byte turned, `count` times: what came of it by part of the files, what is wrong."""
    folder = good(root / "model")
    watch = Watch(good(root / "outside"))
    want = stored(folder)
    parts = [(name, part) for name in (CONFIG, INDEX, ONE, TWO) for part in ("header", "data")]
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    rng, start, before = random.Random(seed), time.perf_counter(), peak_mib()
    slowest = 0.0
    while sum(outcomes.values()) < count and len(wrong) < 20:
        name, part = rng.choice(parts)
        raw = (folder / name).read_bytes()
        split = len(raw) if name in (CONFIG, INDEX) else 8 + struct.unpack("<Q", raw[:8])[0]
        if part == "data" and split == len(raw):
            continue
        at = rng.randrange(split) if part == "header" else rng.randrange(split, len(raw))
        value = raw[at] ^ rng.randrange(1, 256)
        (folder / name).write_bytes(raw[:at] + bytes([value]) + raw[at + 1 :])
        began = time.perf_counter()
        outcome, fault = judge(folder, want, name, part)
        slowest = max(slowest, time.perf_counter() - began)
        (folder / name).write_bytes(raw)
        kind = name if name in (CONFIG, INDEX) else f"shard {part}"
        outcomes[f"{kind}: {outcome}"] += 1
        if fault or watch.opened() or FORBIDDEN:
            wrong.append(f"{name} byte {at} to {value}: {fault or 'opened a file outside'}")
    return {
        "flips": count, "seed": seed, "outcomes": dict(sorted(outcomes.items())), "wrong": wrong,
        "seconds": round(time.perf_counter() - start, 1), "slowest_seconds": round(slowest, 3),
        "grown_mib": round(peak_mib() - before, 1),
    }  # fmt: skip


def judge(folder: Path, want: dict[str, Any], name: str, part: str) -> tuple[str, str | None]:
    """The outcome of a flip, and what is wrong with it, if anything."""
    try:
        with recording([]):
            got = stored(folder)
            load(folder)
    except (CheckpointError, SpecError) as error:
        return type(error).__name__, None
    except BaseException as error:
        return type(error).__name__, f"{type(error).__name__}: {error}"
    if {k: (v.shape, v.dtype) for k, v in got.items()} != {k: (v.shape, v.dtype) for k, v in want.items()}:
        return "loads otherwise", "tensors of other shapes"
    different = sum(int((got[k].view(torch.int32) != want[k].view(torch.int32)).sum()) for k in want)
    if different > (part == "data"):
        return "loads otherwise", f"{different} numbers differ"
    return "loads, one number differs" if different else "loads the same", None


def main() -> None:
    sys.addaudithook(audit)
    with tempfile.TemporaryDirectory() as root:
        os.chdir(root)
        if sys.argv[1] == "crafted":
            print(json.dumps(crafted(Path(root).resolve(), CASES, load)))
        elif sys.argv[1] == "processors":
            print(json.dumps(crafted(Path(root).resolve(), PROCESSORS, prepare)))
        elif sys.argv[1] == "videos":
            print(json.dumps(crafted(Path(root).resolve(), VIDEO_PROCESSORS, prepare_video)))
        else:
            count, seed = int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0
            print(json.dumps(flips(Path(root).resolve(), count, seed)))


if __name__ == "__main__":
    main()
