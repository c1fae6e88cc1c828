"""Photographs as bytes: the same as through the processor, normalised there, for every kind that cuts patches."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import fused_vit
from fused_vit.calls import call_of
from fused_vit.errors import InputError
from fused_vit.images import processor
from tests.families import FAMILIES, available, build
from tests.test_families import outputs, worst
from tests.test_processors import PROCESSORS, photos

pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")
NAMES = {family.name: family for family in FAMILIES}
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def made(name: str, folder: Path, **fields: Any) -> tuple[fused_vit.FusedViT, Any]:
    """A tiny tower and its processor."""
    if not available(NAMES[name]):
        pytest.skip(f"transformers has no {name}")
    kind, about = PROCESSORS[name]
    vit = fused_vit.FusedViT.from_module(build(NAMES[name], seed=1), device="cpu", buckets=[(256, 16)])
    described = {"image_processor_type": kind, **about, "patch_size": vit.spec.patch.size, "image_mean": MEAN}
    (folder / "preprocessor_config.json").write_text(json.dumps(described | {"image_std": STD} | fields))
    try:
        return vit, processor(vit.spec, folder)
    except (ImportError, ValueError) as error:
        pytest.skip(f"{kind} cannot run here: {error}")


@pytest.mark.parametrize("name", PROCESSORS)
def test_bytes_give_what_normalised_pixels_give(name: str, tmp_path: Path) -> None:
    vit, prepare = made(name, tmp_path)
    images = [np.asarray(photo) for photo in photos()]
    pixels, grid = call_of(prepare(images=photos(), return_tensors="pt"))
    want = vit(pixels, grid)
    for given in (photos(), images, [torch.from_numpy(image.copy()) for image in images]):
        got = vit.encode_images(given, prepare)
        assert worst(outputs(got), outputs(want)) <= 1e-5
        assert got.merged_rows == want.merged_rows and got.rows == want.rows
    alone = vit.encode_images(images[1:], prepare)
    second = [part[-len(own) :] for part, own in zip(outputs(want), outputs(alone), strict=True)]
    assert worst(outputs(alone), second) <= 1e-5


def test_the_tower_for_bytes_shares_every_weight_but_one_and_is_kept(tmp_path: Path) -> None:
    vit, prepare = made("Qwen3-VL", tmp_path)
    vit.encode_images(photos(), prepare)
    vit.encode_images(photos(), prepare)
    (other,) = vit._for_bytes.values()
    own = {name for name in vit.weights if other.weights[name] is not vit.weights[name]}
    assert own == {"patch_embed.weight", "patch_embed.bias"} and other.stats()["calls"] == 2
    assert other.weights["patch_embed.weight"].shape[1] == 3 * vit.spec.patch.size**2, "one frame of two"
    prepare.image_mean = STD
    vit.encode_images(photos(), prepare)
    assert len(vit._for_bytes) == 2
    assert 0 < vit.stats()["weight_bytes"] - vit.weight_bytes < vit.weight_bytes, "what the two have of their own"
    other.close()
    again = vit.for_bytes(tuple(prepare.image_std), tuple(prepare.image_std))
    assert again.weights and len(vit._for_bytes) == 2
    for numbers in ((0.5,) * 2, (0.5, 0.5, float("nan")), (0.5, 0.5, 0.0)):
        with pytest.raises(InputError, match="expected 3 finite numbers"):
            vit.for_bytes((0.5,) * 3, numbers)
    vit.close()
    with pytest.raises(InputError, match="closed"):
        other(torch.zeros(16, 3 * vit.spec.patch.size**2, dtype=torch.uint8), [[1, 4, 4]])


def test_images_that_are_none_are_refused(tmp_path: Path) -> None:
    vit, prepare = made("Qwen3-VL", tmp_path)
    good = np.asarray(photos()[0])
    for images, message in (
        ([], "empty"),
        ([good, good[..., 0]], r"image 1 is uint8 \[60, 44\]"),
        ([good.astype(float)], "image 0 is float64"),
        ([good, Image.new("F", (60, 44))], "image 1: not an image that can be read"),
        ([torch.zeros(3, 60, 44, dtype=torch.uint8)], "image 0"),
        ([np.zeros((8, 2000, 3), np.uint8)], "8 x 2000.*aspect ratio"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            vit.encode_images(images, prepare)
    assert vit.encode_images([good], prepare).split()


def test_pil_images_are_taken_as_their_files_are(tmp_path: Path) -> None:
    """Of every mode and upright: test_images has them all."""
    vit, prepare = made("Qwen3-VL", tmp_path)
    clear = Image.fromarray(np.asarray(photos()[0].convert("RGBA")) * np.uint8([1, 1, 1, 0]))
    turned = Image.Exif()
    turned[0x0112] = 6
    clear.save(tmp_path / "clear.png", exif=turned)
    got = vit.encode_images([Image.open(tmp_path / "clear.png")], prepare)
    want = vit.encode_images([np.full((44, 60, 3), 255, np.uint8)], prepare)
    assert all(torch.equal(one, other) for one, other in zip(outputs(got), outputs(want), strict=True))


@pytest.mark.parametrize(
    "fields",
    [{"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 128}, {"image_mean": [0.5]}],
    ids=str,
)
def test_a_processor_that_does_something_else_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    vit, prepare = made("Qwen3-VL", tmp_path, **fields)
    with pytest.raises(InputError, match="divides by 255"):
        vit.encode_images(photos(), prepare)


def test_a_processor_whose_values_are_no_bytes_is_refused(tmp_path: Path) -> None:
    vit, prepare = made("Qwen3-VL", tmp_path)

    def halves(**arguments: Any) -> Any:
        batch = prepare(**arguments)
        return {"pixel_values": batch["pixel_values"] + 0.5, "image_grid_thw": batch["image_grid_thw"]}

    stranger = SimpleNamespace(**{k: getattr(prepare, k) for k in ("do_rescale", "rescale_factor", "do_normalize")})
    stranger.image_mean, stranger.image_std = MEAN, STD

    class Called(SimpleNamespace):
        def __call__(self, **arguments: Any) -> Any:
            return halves(**arguments)

    with pytest.raises(InputError, match="no bytes"):
        vit.encode_images(photos(), Called(**vars(stranger)))


def test_clips_are_not_bytes(tmp_path: Path) -> None:
    vit, prepare = made("Qwen3-VL", tmp_path)
    vit.encode_images(photos(), prepare)
    (other,) = vit._for_bytes.values()
    with pytest.raises(InputError, match="expected uint8"):
        other(torch.zeros(16, other.spec.patch.features), [[1, 4, 4]])
