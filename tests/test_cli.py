"""The command line on a tiny checkpoint: what it prints and writes, and that every error is one line."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from fused_vit import pca
from fused_vit.cli import app
from fused_vit.errors import InputError

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def error(result: Result) -> str:
    """The one line on stderr of a command that failed as it should."""
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("encoding")]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded tower of 2 blocks, as one safetensors file under the real names."""
    torch.manual_seed(0)
    vision = {
        "depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "out_hidden_size": 32,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 64,
    }  # fmt: skip
    config = transformers.Qwen3VLConfig(vision_config=vision).vision_config
    tower = transformers.Qwen3VLVisionModel(config)
    folder = tmp_path_factory.mktemp("checkpoint")
    tensors = {f"model.visual.{name}": torch.randn_like(t) * 0.1 for name, t in tower.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    whole = {"model_type": "qwen3_vl", "vision_config": {**vision, "model_type": "qwen3_vl"}}
    (folder / "config.json").write_text(json.dumps(whole))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    paths = [folder / "wide.png", folder / "tall.jpg"]
    for path, (w, h) in zip(paths, ((320, 256), (256, 300)), strict=True):
        pixels = torch.randint(0, 256, (h, w, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    return paths


def broken(checkpoint: Path, to: Path, change: dict[str, torch.Tensor | None]) -> Path:
    """A copy of the checkpoint with tensors replaced or left out."""
    tensors: dict[str, torch.Tensor | None] = {**load_file(checkpoint / "model.safetensors"), **change}
    save_file({name: t for name, t in tensors.items() if t is not None}, to / "model.safetensors")
    (to / "config.json").write_text((checkpoint / "config.json").read_text())
    return to


def test_describe_prints_spec_plan_costs_and_memory(checkpoint: Path) -> None:
    result = run("describe", checkpoint, "--grid", "1x16x16", "--max-tokens", 1024)
    assert result.exit_code == 0, result.output
    for part in ("Qwen3-VL tower", "heads=2", "block.1.fc2", "merger.fc2", "GFLOP", "workspace for 1024 tokens"):
        assert part in result.output, part


def test_check_agrees_with_hugging_face(checkpoint: Path) -> None:
    result = run("check", checkpoint, "--steps", "--device", "cpu")
    assert result.exit_code == 0 and "same as Hugging Face, at every step" in result.output, result.output
    assert all(name in result.output for name in ("pooler_output", "block.1.attention", "deepstack.0.fc2"))


@pytest.mark.parametrize("victim", ["block.0.proj", "block.1.fc1", "deepstack.0.fc2", "merger.fc1"])
def test_check_names_the_first_bad_step(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, victim: str) -> None:
    from fused_vit import cli

    real = cli.load

    def damaged(*args: object, **kwargs: object) -> object:
        vit = real(*args, **kwargs)  # type: ignore[arg-type]
        vit.weights[f"{victim}.bias"][0] += 1
        return vit

    monkeypatch.setattr(cli, "load", damaged)
    assert f"first bad step: {victim}" in error(run("check", checkpoint, "--device", "cpu"))


def test_check_names_the_steps_that_hugging_face_lays_out_otherwise(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fused_vit import cli

    real = cli.load

    def damaged(*args: object, **kwargs: object) -> object:
        vit = real(*args, **kwargs)  # type: ignore[arg-type]
        vit.weights["block.1.qkv.bias"] += 1
        return vit

    monkeypatch.setattr(cli, "load", damaged)
    message = error(run("check", checkpoint, "--device", "cpu"))
    assert "first bad step: block.1.attention (or block.1.qkv" in message


def test_encode_writes_each_image_and_a_picture(checkpoint: Path, photos: list[Path], tmp_path: Path) -> None:
    out, png = tmp_path / "out.safetensors", tmp_path / "pca.png"
    result = run("encode", *photos, "--checkpoint", checkpoint, "-o", out, "--pca", png, "--device", "cpu")
    assert result.exit_code == 0, result.output
    with safe_open(out, "pt") as file:
        assert file.metadata()["checkpoint"] == str(checkpoint)
        for photo in photos:
            t, h, w = file.get_tensor(f"{photo}.grid_thw").tolist()
            assert file.get_tensor(f"{photo}").shape == (t * h * w // 4, 32)
            assert file.get_tensor(f"{photo}.deepstack.0").shape == (t * h * w // 4, 32)
        assert len(file.keys()) == 6
    assert Image.open(png).size[1] == 2 * 640 + 16


def test_a_picture_that_is_too_large_costs_only_itself(
    checkpoint: Path, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pca, "MAX_PIXELS", 10**6)
    out, png = tmp_path / "out.safetensors", tmp_path / "pca.png"
    result = run("encode", *photos, "--checkpoint", checkpoint, "-o", out, "--pca", png, "--device", "cpu")
    assert result.exit_code == 1 and out.exists() and not png.exists()
    assert result.stderr.splitlines()[-1].startswith(f"error: {png}: a picture of {len(photos)} photographs, ")

    def short(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(pca, "picture", short)
    result = run("encode", *photos, "--checkpoint", checkpoint, "-o", out, "--pca", png, "--device", "cpu")
    assert result.exit_code == 1 and result.stderr.splitlines()[-1].startswith("error: not enough memory")


def test_encoding_alone_is_encoding_together(checkpoint: Path, photos: list[Path], tmp_path: Path) -> None:
    for name, paths in (("both", photos), ("one", photos[1:])):
        done = run("encode", *paths, "--checkpoint", checkpoint, "-o", tmp_path / name, "--device", "cpu")
        assert done.exit_code == 0, done.output
    both, one = load_file(tmp_path / "both"), load_file(tmp_path / "one")
    assert all(torch.equal(both[name], one[name]) for name in one)


def test_a_bad_image_costs_only_itself(checkpoint: Path, photos: list[Path], tmp_path: Path) -> None:
    bad, thin, out = tmp_path / "bad.png", tmp_path / "thin.png", tmp_path / "out.safetensors"
    bad.write_text("no image")
    Image.new("RGB", (3000, 2)).save(thin)
    command = ("encode", photos[0], bad, thin, photos[1], "--checkpoint", checkpoint, "-o", out, "--device", "cpu")
    result = run(*command)
    assert "2 of 4 images failed" in error(result)
    failures = [line for line in result.stdout.splitlines() if line.startswith("failed: ")]
    assert len(failures) == 2 and f"{bad}: not an image" in failures[0] and f"{thin}: " in failures[1]
    assert {f"{photo}" for photo in photos} <= set(load_file(out))
    for path in (bad, thin):
        Image.new("RGB", (256, 256), "red").save(path)
    assert run(*command).exit_code == 0
    assert {f"{path}" for path in (photos[0], bad, thin, photos[1])} <= set(load_file(out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.png", "out.safetensors", "thin.png"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bad\udcff.png", "its name is not UTF-8"),  # what Python makes of a byte of Latin-1
        ("x.png.grid_thw", "x.png.grid_thw names a result of x.png"),
        ("x.png.deepstack.0", "x.png.deepstack.0 names a result of x.png"),
        ("__metadata__", "safetensors keeps this name for itself"),
        ("colours", None), ("rows", None), ("grid_thw", None), ("deepstack.0", None),
    ],
)  # fmt: skip
def test_no_name_costs_another_photograph_its_result(
    name: str, says: str | None, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    photos = ["x.png", name, "good.png"]
    for i, photo in enumerate(photos):
        Image.new("RGB", (256, 256 + 32 * i), (90 * i, 20, 200)).save(photo, "PNG")
    common = ("--checkpoint", checkpoint, "--device", "cpu")
    for photo in ("x.png", "good.png", "other"):
        if photo == "other":
            os.link(os.fsencode(name), photo)
        assert run("encode", photo, *common, "-o", f"{photo}.out").exit_code == 0
    want = load_file("x.png.out") | load_file("good.png.out")
    if says is None:
        want |= {key.replace("other", name, 1): rows for key, rows in load_file("other.out").items()}
    result = run("encode", *photos, *common, "-o", "all.out", "--pca", "all.png")
    if says is None:
        assert result.exit_code == 0, result.output
    else:
        assert "1 of 3 images failed" in error(result)
        (failure,) = [line for line in result.stdout.splitlines() if line.startswith("failed: ")]
        assert says in failure
    got = load_file("all.out")
    assert set(got) == set(want) and all(torch.equal(got[key], want[key]) for key in want)
    assert Image.open("all.png").height == (2 if says else 3) * 656 - 16


def test_of_two_photographs_that_claim_a_name_the_first_has_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for photo in ("x.png", "x.png.grid_thw"):
        Image.new("RGB", (256, 256)).save(photo, "PNG")
    common = ("--checkpoint", checkpoint, "--device", "cpu", "-o", "out")
    result = run("encode", "x.png.grid_thw", "x.png", *common)
    assert "first x.png: x.png.grid_thw names a result of x.png.grid_thw" in error(result)
    assert set(load_file("out")) == {f"x.png.grid_thw{end}" for end in ("", ".grid_thw", ".deepstack.0")}
    assert run("encode", "x.png", "./x.png", *common).exit_code == 0, "a photograph may come twice"


@pytest.mark.parametrize("command", ["encode", "embed"])
def test_a_result_that_safetensors_could_not_open_is_refused_first(
    command: str, checkpoint: Path, photos: list[Path], tmp_path: Path
) -> None:
    arguments = (photos[0], "--checkpoint", checkpoint, "--device", "cpu", "-o", tmp_path / "out\udcff")
    options = ("--format", "safetensors") if command == "embed" else ()
    assert "choose another with -o" in error(run(command, *arguments, *options))
    assert not list(tmp_path.iterdir())


def test_a_photograph_that_memory_does_not_hold_costs_only_itself(
    checkpoint: Path, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fused_vit import images

    real, out = images._rgb, tmp_path / "out.safetensors"

    def small(image: Image.Image, in_place: bool) -> Image.Image:
        if image.format == "PNG":
            raise MemoryError
        return real(image, in_place)

    monkeypatch.setattr(images, "_rgb", small)
    result = run("encode", *photos, "--checkpoint", checkpoint, "-o", out, "--device", "cpu")
    assert "1 of 2 images failed" in error(result)
    assert f"failed: {photos[0]}: not enough memory to decode and resize it\n" in result.stdout
    assert f"{photos[1]}" in load_file(out)


def test_an_interrupted_run_does_the_rest(
    checkpoint: Path, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fused_vit import encoding

    real, calls, out = encoding._encode, [], tmp_path / "out.safetensors"
    whole = tmp_path / "whole.safetensors"
    common = ("--checkpoint", checkpoint, "--device", "cpu", "-o")
    assert run("encode", *photos, *common, whole).exit_code == 0

    def interrupted(vit: object, prepare: object, photo: Path, coloured: bool) -> object:
        calls.append(photo)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(vit, prepare, photo, coloured)  # type: ignore[arg-type]

    monkeypatch.setattr(encoding, "_encode", interrupted)
    assert run("encode", *photos, *common, out).exit_code != 0 and not out.exists()
    next((tmp_path / "out.safetensors.parts").iterdir()).with_suffix(".tmp").write_bytes(b"half a part")
    assert run("encode", *photos, *common, out).exit_code == 0
    assert calls == [photos[0], photos[1], photos[1]], "the first photograph was encoded again"
    want, got = load_file(whole), load_file(out)
    assert set(want) == set(got) and all(torch.equal(want[name], got[name]) for name in want)
    assert not (tmp_path / "out.safetensors.parts").exists()


def test_two_runs_to_one_file_are_refused(checkpoint: Path, photos: list[Path], tmp_path: Path) -> None:
    from fused_vit.encoding import Parts

    line = ("encode", *photos, "--checkpoint", checkpoint, "--device", "cpu", "-o", tmp_path / "out.safetensors")
    with Parts(tmp_path / "out.safetensors.parts", "another run's", False).locked():
        assert "another run is encoding to the same file" in error(run(*line))
    assert list(tmp_path.iterdir()) == [] and run(*line).exit_code == 0


def test_a_run_that_ends_in_this_moment_does_not_matter(tmp_path: Path) -> None:
    """The folder and the lock come and go while others try: only one is ever in, and nobody sees an error of files."""
    from fused_vit.encoding import Parts

    parts, inside, seen = Parts(tmp_path / "o.parts", "", False), [], []

    def turns(_: int) -> None:
        for _ in range(300):
            with contextlib.suppress(InputError), parts.locked():
                inside.append(1)
                seen.append(len(inside))
                inside.pop()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(turns, range(4)))
    assert set(seen) == {1} and not (tmp_path / "o.parts").exists()


@pytest.mark.parametrize("there", ["a file", "a link to nowhere"])
def test_a_lock_that_cannot_be_made_is_one_error(there: str, tmp_path: Path) -> None:
    from fused_vit.encoding import LOCK, Parts

    folder = tmp_path / "o.parts"
    if there == "a file":
        folder.write_bytes(b"")
    else:
        folder.mkdir()
        (folder / LOCK).symlink_to(tmp_path / "nowhere")
    with pytest.raises((InputError, OSError)), Parts(folder, "", False).locked():
        pass
    assert not (tmp_path / "nowhere").exists()


def test_no_photograph_and_no_features_are_written_over(checkpoint: Path, photos: list[Path], tmp_path: Path) -> None:
    photo = tmp_path / "o.safetensors.tmp"
    photo.write_bytes(photos[0].read_bytes())
    common = ("--checkpoint", checkpoint, "--device", "cpu", "-o")
    assert run("encode", photo, *common, tmp_path / "o.safetensors").exit_code == 0
    assert photo.read_bytes() == photos[0].read_bytes() and f"{photo}" in load_file(tmp_path / "o.safetensors")
    same = tmp_path / "same.png"
    assert "is the name of both" in error(run("encode", photo, *common, same, "--pca", same)) and not same.exists()


def test_odd_names_are_printed_as_they_are_and_nothing_of_them_is_obeyed(
    checkpoint: Path, photos: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "m[").mkdir()
    out = tmp_path / "m[" / "b].safetensors"
    bad = tmp_path / "\x1b[2J\nERROR.png"
    bad.write_bytes(b"no image")
    result = run("encode", photos[0], bad, "--checkpoint", checkpoint, "--device", "cpu", "-o", out)
    assert f"1 images to {out} " in result.stdout and out.exists()
    assert "\x1b" not in result.output and r"\x1b[2J\nERROR.png" in result.stdout and "\nERROR" not in result.output


def test_a_full_disk_is_one_line(checkpoint: Path, photos: list[Path], tmp_path: Path) -> None:
    line = [sys.executable, "-m", "fused_vit.cli", "encode", str(photos[0]), "--checkpoint", str(checkpoint)]
    command = shlex.join([*line, "--device", "cpu", "-o", str(tmp_path / "o.safetensors")])
    script = f"trap '' XFSZ; ulimit -f 1; exec {command}"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot be written" in done.stderr.splitlines()[-1]


def test_files_beside_the_parts_stay(checkpoint: Path, photos: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "o.safetensors.parts"
    folder.mkdir()
    for name in ("thesis.txt", "mine.safetensors", "mine.tmp"):
        (folder / name).write_text("of years")
    line = ("encode", *photos, "--checkpoint", checkpoint, "--device", "cpu", "-o", tmp_path / "o.safetensors")
    assert run(*line).exit_code == 0
    assert {path.name for path in folder.iterdir()} == {"thesis.txt", "mine.safetensors", "mine.tmp"}


@pytest.mark.parametrize("kind", [TypeError, IndexError, KeyError, RuntimeError])
def test_whatever_a_processor_raises_costs_only_its_photograph(
    kind: type[Exception], checkpoint: Path, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fused_vit import encoding

    real, out = encoding.read_image, tmp_path / "out.safetensors"

    def stumbling(photo: Path) -> Image.Image:
        if photo == photos[0]:
            raise kind("of the\nprocessor")
        return real(photo)

    monkeypatch.setattr(encoding, "read_image", stumbling)
    result = run("encode", *photos, "--checkpoint", checkpoint, "-o", out, "--device", "cpu")
    said = " ".join(str(kind("of the\nprocessor")).split())
    assert "1 of 2 images failed" in error(result)
    assert f"failed: {photos[0]}: {kind.__name__}: {said}\n" in result.stdout
    assert f"{photos[1]}" in load_file(out)


def test_what_changed_is_encoded_again(checkpoint: Path, tmp_path: Path) -> None:
    """A photograph under the same name, and a checkpoint: the run is never over, so parts stay."""
    photo, bad, out, other = (tmp_path / name for name in ("photo.png", "bad.png", "out.safetensors", "other"))
    bad.write_text("no image")
    other.mkdir()
    name = "model.visual.merger.linear_fc2.bias"
    features = []
    for colour, change in (("red", {}), ("white", {}), ("white", {name: torch.ones(32)})):
        broken(checkpoint, other, change)
        Image.new("RGB", (256, 256), colour).save(photo)
        assert run("encode", photo, bad, "--checkpoint", other, "-o", out, "--device", "cpu").exit_code == 1
        features.append(load_file(out)[f"{photo}"])
    assert not torch.equal(features[0], features[1]) and not torch.equal(features[1], features[2])


def test_env_says_what_a_report_needs() -> None:
    result = run("env")
    assert result.exit_code == 0
    assert torch.__version__.partition("+")[0] in result.output and "fused_vit" in result.output


def test_errors_are_one_line(checkpoint: Path, photos: list[Path], tmp_path: Path) -> None:
    assert "no such folder" in error(run("describe", tmp_path / "absent"))
    (tmp_path / "text.png").write_text("no image")
    encode = ("encode", "--checkpoint", checkpoint, "-o", tmp_path / "out.safetensors")
    assert "text.png" in error(run(*encode, tmp_path / "text.png"))
    assert "absent.png" in error(run(*encode, "absent.png"))
    assert "make it first" in error(run("encode", photos[0], "--checkpoint", checkpoint, "-o", tmp_path / "no" / "o"))
    for target in (photos[0], tmp_path):
        before = photos[0].read_bytes()
        kind = "is a folder" if target.is_dir() else "one of the photographs"
        assert kind in error(run("encode", photos[0], "--checkpoint", checkpoint, "-o", target))
        assert kind in error(run(*encode, photos[0], "--pca", target)) and photos[0].read_bytes() == before
    assert "--grid" in error(run("describe", checkpoint, "--grid", "64"))
    assert "merge size" in error(run("describe", checkpoint, "--grid", "1x3x3"))
    assert not (tmp_path / "out.safetensors").exists()


def test_a_wrong_checkpoint_is_one_line_with_every_tensor(checkpoint: Path, tmp_path: Path) -> None:
    change = {"model.visual.merger.norm.weight": None, "model.visual.merger.norm.bias": torch.zeros(3)}
    message = error(run("describe", broken(checkpoint, tmp_path, change)))
    assert "merger.norm.weight" in message and "merger.norm.bias" in message


def test_the_installed_command_leaves_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fused_vit.cli", "describe", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
