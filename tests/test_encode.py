"""FusedViT.encode and .stream: many images in, results in order or as they are done; Ray's class does the same."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fused_vit
from fused_vit import preparing
from fused_vit.calls import call_of, flatten_call
from fused_vit.embedding import Embedder, Times
from fused_vit.errors import InputError
from fused_vit.images import processor, read_image
from fused_vit.preparing import Preparer, Workers
from fused_vit.sources import find
from fused_vit.stills import proven_normalisation
from tests import archives

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archives.checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def vit(checkpoint: Path) -> fused_vit.FusedViT:
    return fused_vit.load(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return archives.photographs(tmp_path_factory.mktemp("photos"), range(12))


@pytest.fixture(scope="module")
def wanted(vit: fused_vit.FusedViT, checkpoint: Path, photos: list[Path]) -> list[torch.Tensor]:
    prepare = processor(vit.spec, checkpoint)
    return [vit.encode_images([read_image(path)], prepare).split()[0] for path in photos]


def same(got: Any, want: list[torch.Tensor]) -> bool:
    return len(got) == len(want) and all(
        torch.allclose(torch.as_tensor(a), b, rtol=1e-4, atol=1e-5) for a, b in zip(got, want, strict=True)
    )


# --- encode ---


def test_many_images_of_any_form_come_back_in_order(
    vit: fused_vit.FusedViT, checkpoint: Path, photos: list[Path], wanted: list[torch.Tensor]
) -> None:
    assert same(vit.encode(photos, processor=checkpoint, batch_tokens=128), wanted)
    prepare = processor(vit.spec, checkpoint)
    opened = [Image.open(path) for path in photos[:3]]
    mixed = [
        str(photos[0]), opened[1], np.asarray(opened[2]), torch.tensor(np.asarray(opened[0])), photos[1].read_bytes(),
    ]  # fmt: skip
    assert same(vit.encode(mixed, processor=prepare, workers=2), [wanted[i] for i in (0, 1, 2, 0, 1)])
    assert vit.encode([], processor=prepare) == []


def test_one_image_comes_back_alone(
    vit: fused_vit.FusedViT, checkpoint: Path, photos: list[Path], wanted: list[torch.Tensor]
) -> None:
    for image in (photos[0], str(photos[0]), Image.open(photos[0]), np.asarray(Image.open(photos[0]))):
        alone = vit.encode(image, processor=checkpoint)
        assert torch.equal(alone, wanted[0])
    assert vit.encode(photos[0], processor=checkpoint, pool="mean").shape == (32,)


def test_the_loaded_checkpoint_has_the_processor(
    vit: fused_vit.FusedViT, photos: list[Path], wanted: list[torch.Tensor]
) -> None:
    assert same(vit.encode(photos[:2]), wanted[:2])

    async def collected() -> dict[int, Any]:
        return {number: rows async for number, rows in vit.stream(photos[:2])}

    found = asyncio.run(collected())
    assert same([found[0], found[1]], wanted[:2])
    assert torch.equal(vit.encode_images([read_image(photos[0])]).split()[0], wanted[0])
    assert vit.warmup(photographs=True) is vit and vit.encode([], pool="mean").shape == (0, 32)
    other = fused_vit.FusedViT(vit.spec, vit.weights)

    async def first() -> None:
        await anext(other.stream(photos[:1]))

    for call in (lambda: other.encode(photos[:1]), lambda: asyncio.run(first()), lambda: other.encode_images([])):
        with pytest.raises(InputError, match=r"processor is missing, and this encoder was made from a module: give"):
            call()


def test_the_processor_stays_that_of_the_checkpoint_wherever_the_process_goes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    vit = fused_vit.load(checkpoint.name, device="cpu")
    other = archives.checkpoint(tmp_path / checkpoint.name)
    described = json.loads((other / "preprocessor_config.json").read_text()) | {"image_mean": [0.0] * 3}
    (other / "preprocessor_config.json").write_text(json.dumps(described))
    monkeypatch.chdir(tmp_path)
    assert vit.processor.image_mean == processor(vit.spec, checkpoint).image_mean != [0.0] * 3


def test_a_pil_image_has_the_features_of_its_file(vit: fused_vit.FusedViT, checkpoint: Path, tmp_path: Path) -> None:
    ramp = np.repeat(np.linspace(0, 65535, 80).astype(np.uint16)[None], 64, 0)
    turned = Image.Exif()
    turned[0x0112] = 6
    files = [tmp_path / name for name in ("deep.png", "clear.png", "turned.jpg")]
    Image.fromarray(ramp).save(files[0])
    Image.new("RGBA", (64, 64)).save(files[1])
    archives.picture(0).save(files[2], exif=turned)
    want = vit.encode(files, processor=checkpoint)
    for got in ([Image.open(file) for file in files], [file.read_bytes() for file in files]):
        assert same(vit.encode(got, processor=checkpoint), want)


def test_a_first_stream_holds_no_loop_up(checkpoint: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where the processor is looked for, or the tower for bytes made, in the loop's own thread."""
    vit, threads = fused_vit.load(checkpoint, device="cpu"), set()

    def seen(real: Any) -> Any:
        def watched(*arguments: Any, **options: Any) -> Any:
            threads.add(threading.current_thread())
            return real(*arguments, **options)

        return watched

    monkeypatch.setattr("fused_vit.images.processor", seen(processor))
    monkeypatch.setattr(vit, "for_bytes", seen(vit.for_bytes))

    async def streamed() -> int:
        return len([number async for number, _ in vit.stream(photos[:2])])

    assert asyncio.run(streamed()) == 2 and len(threads) > 0 and threading.current_thread() not in threads


def test_pooled_is_one_tensor_and_numpy_an_array(
    vit: fused_vit.FusedViT, checkpoint: Path, photos: list[Path], wanted: list[torch.Tensor]
) -> None:
    pooled = vit.encode(photos, processor=checkpoint, pool="mean", show_progress_bar=True)
    assert pooled.shape == (12, 32) and pooled.dtype == torch.float32
    assert same(list(pooled), [rows.mean(0) for rows in wanted])
    arrays = vit.encode(photos, processor=checkpoint, convert_to_numpy=True)
    assert all(isinstance(array, np.ndarray) for array in arrays) and same(arrays, wanted)
    assert isinstance(vit.encode(photos, processor=checkpoint, pool="mean", convert_to_numpy=True), np.ndarray)


def test_sixteen_bits_come_back_as_they_are_and_to_numpy_exactly(checkpoint: Path, photos: list[Path]) -> None:
    vit = fused_vit.load(checkpoint, device="cpu", dtype=torch.bfloat16)
    rows = vit.encode(photos[:2], processor=checkpoint)
    arrays = vit.encode(photos[:2], processor=checkpoint, convert_to_numpy=True)
    assert all(r.dtype == torch.bfloat16 and np.array_equal(r.float(), a) for r, a in zip(rows, arrays, strict=True))
    pooled = vit.encode(photos[:2], processor=checkpoint, pool="mean")
    assert torch.equal(pooled, torch.stack([r.float().mean(0) for r in rows]))
    alone = vit.encode_images([read_image(photos[0])], processor(vit.spec, checkpoint))
    assert torch.equal(alone.split()[0], vit.encode(photos[0], processor=checkpoint))


def test_what_cannot_be_encoded_is_named(vit: fused_vit.FusedViT, checkpoint: Path, photos: list[Path]) -> None:
    for images, message in (
        ([photos[0], "absent.png"], "image 1: no such file"),
        ([b"no image"], "image 0: .*not an image that can be read"),
        ([np.zeros((4, 4))], r"image 0: an image is float64 \[4, 4\]; expected a path"),
        ([photos[0], 3], "image 1: an image is int; expected a path"),
    ):
        with pytest.raises(InputError, match=message):
            vit.encode(images, processor=checkpoint)
    with pytest.raises(InputError, match="processor is int; expected a checkpoint's path"):
        vit.encode(photos, processor=3)
    with pytest.raises(InputError, match="pool is 'max'; expected None"):
        vit.encode(photos, processor=checkpoint, pool="max")
    assert same([vit.encode(photos[0], processor=checkpoint)], [vit.encode(photos, processor=checkpoint)[0]])


def test_batches_are_filled_largest_first_and_never_over(
    vit: fused_vit.FusedViT, checkpoint: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[int]] = []
    real = Embedder._encode

    def watched(self: Embedder, pixels: Any, grid: Any, batch: Any) -> torch.Tensor:
        batches.append([one.tokens for one in batch.members])
        return real(self, pixels, grid, batch)

    monkeypatch.setattr(Embedder, "_encode", watched)
    vit.encode(photos * 4, processor=checkpoint, batch_tokens=128)
    assert all(sum(batch) <= 128 and batch[1:] == sorted(batch[1:], reverse=True) for batch in batches)
    assert sum(map(len, batches)) == 48
    total = sum(map(sum, batches))
    assert len(batches) <= 1.25 * -(-total // 128), "batches are a fifth empty"
    batches.clear()
    vit.encode(photos, processor=checkpoint, batch_tokens=5)
    assert all(len(batch) == 1 or sum(batch) <= 5 for batch in batches)  # larger than the budget: alone


# --- stream ---


def test_results_stream_as_they_are_done(
    vit: fused_vit.FusedViT, checkpoint: Path, photos: list[Path], wanted: list[torch.Tensor]
) -> None:
    async def collect() -> dict[int, Any]:
        return {number: rows async for number, rows in vit.stream([*photos, b"no"], processor=checkpoint, workers=2)}

    found = asyncio.run(collect())
    assert same([found[i] for i in range(12)], wanted)
    assert isinstance(found[12], InputError) and "image 12" in str(found[12])


def test_a_lone_image_does_not_wait_for_others(
    vit: fused_vit.FusedViT, checkpoint: Path, photos: list[Path], wanted: list[torch.Tensor]
) -> None:
    async def run() -> list[torch.Tensor]:
        answered = asyncio.Event()
        answered.set()

        async def arriving() -> AsyncIterator[Path]:
            for path in photos[:3]:
                await asyncio.wait_for(answered.wait(), 5)  # the next comes only after the answer to the last
                answered.clear()
                yield path

        found = []
        async for _, rows in vit.stream(arriving(), processor=checkpoint):
            found.append(rows)
            answered.set()
        return found

    assert same(asyncio.run(run()), wanted[:3])


def test_a_stream_that_nobody_reads_on_ends(vit: fused_vit.FusedViT, checkpoint: Path, photos: list[Path]) -> None:
    before = threading.active_count()

    async def run() -> int:
        stream = vit.stream(photos * 50, processor=checkpoint, workers=2)
        async for number, _ in stream:
            await stream.aclose()
            return number
        return -1

    assert asyncio.run(run()) >= 0
    end = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.02)
    assert threading.active_count() <= before


def test_leaving_a_stream_holds_nobody_up(
    vit: fused_vit.FusedViT, checkpoint: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its workers are waited for, the loop runs what ends that wait. Fails where the loop itself waits."""
    real, leaving, free = ThreadPoolExecutor.shutdown, threading.Event(), threading.Event()
    freed: list[bool] = []

    def shutdown(self: ThreadPoolExecutor, *args: Any, **kwargs: Any) -> None:
        if self._thread_name_prefix == "fused-vit-prepare":
            leaving.set()
            freed.append(free.wait(10))
        real(self, *args, **kwargs)

    async def others() -> None:
        while not leaving.is_set():
            await asyncio.sleep(0.01)
        free.set()

    async def run() -> None:
        stream = vit.stream(photos, processor=checkpoint, workers=2)
        await anext(stream)
        other = asyncio.ensure_future(others())
        await stream.aclose()
        assert freed == [True]
        await other

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shutdown)
    asyncio.run(run())


def test_an_error_of_the_encoder_or_the_source_ends_the_stream(
    vit: fused_vit.FusedViT, checkpoint: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def source() -> AsyncIterator[Path]:
        yield photos[0]
        raise LookupError("no more")

    async def run(images: Any) -> list[Any]:
        return [result async for result in vit.stream(images, processor=checkpoint)]

    with pytest.raises(LookupError, match="no more"):
        asyncio.run(run(source()))

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("the device went away")

    monkeypatch.setattr(Embedder, "_encode", broken)
    with pytest.raises(RuntimeError, match="went away"):
        asyncio.run(run(photos))


# --- preparing ---


def test_images_travel_as_bytes_of_one_frame(vit: fused_vit.FusedViT, checkpoint: Path, photos: list[Path]) -> None:
    prepare = processor(vit.spec, checkpoint)
    prepared = Preparer(vit.spec, prepare)([(0, photos[0]), (1, photos[1])])
    assert prepared.pixels.dtype == torch.uint8 and prepared.pixels.shape[1] == vit.spec.patch.features // 2
    batch = prepare(images=[read_image(path) for path in photos[:2]], return_tensors="pt")
    mean, std = proven_normalisation(vit.spec, prepare) or ((), ())
    rows = prepared.pixels.view(-1, 3, 1, 256) / 255
    numbers = (rows - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(numbers.expand(-1, -1, 2, -1).flatten(1), batch["pixel_values"], atol=1e-6)
    assert [part.grid for part in prepared.parts] == [[row] for row in batch["image_grid_thw"].tolist()]


def test_a_processor_that_does_more_than_normalise_is_taken_as_it_is(
    vit: fused_vit.FusedViT, checkpoint: Path, photos: list[Path]
) -> None:
    real = processor(vit.spec, checkpoint)

    class Stranger:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    class Sharpened(Stranger):
        def __call__(self, **options: Any) -> Any:
            batch = real(**options)
            pixels = batch["pixel_values"]
            batch["pixel_values"] = pixels if "do_rescale" in options else pixels + 0.1 * pixels.roll(1, 1)
            return batch

    class Strict(Stranger):
        def __call__(self, images: Any, return_tensors: str) -> Any:
            return real(images=images, return_tensors=return_tensors)

    for prepare in (Sharpened(), Strict()):
        assert proven_normalisation(vit.spec, prepare) is None
        call = call_of(prepare(images=[read_image(photos[0])], return_tensors="pt"))
        pixels = Preparer(vit.spec, prepare)([(0, photos[0])]).pixels
        assert torch.equal(pixels, flatten_call(vit.spec, *call)[0])


def test_images_beside_a_video_are_numbers(
    vit: fused_vit.FusedViT, checkpoint: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = Preparer(vit.spec, processor(vit.spec, checkpoint))
    (record,) = find([photos[0]]).records
    clip = torch.rand(8, 1536)
    monkeypatch.setattr(preparing, "read_video", lambda *_: (None, None))
    monkeypatch.setattr(preparing, "prepare_video", lambda *_: (clip, torch.tensor([[2, 2, 2]])))
    video = type(record)("clip.mp4", 0, "clip.mp4", 1, video=True)
    prepared = prepare([(0, record), (1, video)])
    assert prepared.pixels.dtype == torch.float32
    first, second = (pixels for _, pixels in prepared.split())
    image = processor(vit.spec, checkpoint)(images=[read_image(photos[0])], return_tensors="pt")
    assert torch.equal(second, clip) and torch.equal(first, image["pixel_values"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [None, 0, 1 << 10, 1 << 24], ids=["none", "all in use", "too small", "roomy"])
def test_pixels_come_through_slots_or_beside_them(
    slots: int | None, dtype: torch.dtype, vit: fused_vit.FusedViT, checkpoint: Path, photos: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """From worker processes: several tasks, one of which holds no image at all."""
    prepare = Preparer(vit.spec, processor(vit.spec, checkpoint), dtype=dtype)
    if dtype == torch.float32:
        prepare.normalisation = None  # numbers travel
    monkeypatch.setattr(preparing, "TASK_BYTES", slots or 1 << 24)
    monkeypatch.setattr(preparing, "TASK_IMAGES", 3)
    with Workers(prepare, 1) as workers:
        if slots is None:
            workers.slots = None
        while slots == 0 and workers.slots and workers.slots.take() is not None:
            pass
        sources = [photos[0], b"no", photos[1], photos[2], b"no", *photos]
        got = {part.number: pixels for found in workers.run(sources) for part, pixels in found.split()}
        assert sorted(got) == list(range(len(sources)))
        for number, source in enumerate(sources):
            want = prepare([(number, source)]).pixels
            same = torch.equal(got[number], want) and got[number].dtype == want.dtype
            assert same or len(got[number]) == len(want) == 0
        if slots == 1 << 24 and workers.slots is not None:
            assert len(workers.slots._free) < workers.slots.count, "views hold their slots"
            got.clear()
            assert len(workers.slots._free) == workers.slots.count


def test_ctrl_c_is_left_to_the_process_that_started_the_workers(vit: fused_vit.FusedViT, checkpoint: Path) -> None:
    with Workers(Preparer(vit.spec, processor(vit.spec, checkpoint)), 1) as workers:
        assert signal.SIGINT in workers.pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, ()).result()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="handlers are the main thread's")
def test_ctrl_c_waits_until_workers_are_whole(vit: fused_vit.FusedViT, checkpoint: Path, monkeypatch: Any) -> None:
    """A process that was half started would belong to no pool, and find nothing of its parent's when it is ready."""
    prepare, real, done = Preparer(vit.spec, processor(vit.spec, checkpoint)), ProcessPoolExecutor.submit, []
    leave = threading.Event()
    other = threading.Thread(target=leave.wait)  # whichever thread the system gives it to, the main one answers
    other.start()

    def interrupted(self: ProcessPoolExecutor, *arguments: Any) -> Any:
        assert other.ident is not None
        signal.pthread_kill(other.ident, signal.SIGINT)
        time.sleep(0.01)
        done.append(real(self, *arguments))
        return done[-1]

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(ProcessPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Workers(prepare, 2)
    leave.set()
    assert len(done) == 2 and all(future.done() for future in done), "both were started, and ended"
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_workers_prepare_a_bounded_number_ahead(vit: fused_vit.FusedViT, checkpoint: Path, photos: list[Path]) -> None:
    taken: list[int] = []

    def asked() -> Any:
        for i in range(500):
            taken.append(i)
            yield photos[i % 12]

    prepare = Preparer(vit.spec, processor(vit.spec, checkpoint))
    with Workers(prepare, 2, threads=True) as workers:
        found = workers.run(asked())
        for _ in range(3):
            next(found)
        assert len(taken) <= 4 * preparing.TASK_IMAGES * 2
        found.close()
    with pytest.raises(InputError, match="workers is 0; expected at least 1"):
        Workers(prepare, 0, threads=True)


def test_what_bounded_a_run_is_said_from_its_times() -> None:
    def said(**seconds: float) -> str:
        return Times(wall=10, workers=4, images=1, **seconds).bound()

    assert said(decode=30, prepare=8, encode=3).startswith("bounded by decode, so more --workers")
    assert said(decode=8, prepare=30, encode=3).startswith("bounded by preprocess, so more --workers")
    assert said(decode=8, prepare=3, encode=9, copy=4).startswith("bounded by encode; busy: decode 20%, preprocess 8%")
    assert said(copy=8, encode=2).startswith("bounded by copy") and said(write=8).startswith("bounded by write")
    assert said(encode=2).startswith("nothing bounded the run for long")
    failed = Times(decode=1.0, wall=1e-6)  # the only image: nothing was prepared, and no time counted
    assert failed.bound() == "nothing was encoded" and set(failed.shares().values()) == {0.0}


# --- Ray ---


def test_rays_class_keeps_other_columns_and_names_errors(
    checkpoint: Path, photos: list[Path], wanted: list[torch.Tensor]
) -> None:
    from fused_vit.ray import Encoder

    batch = {"bytes": np.array([p.read_bytes() for p in photos[:3]] + [b"no"], object), "id": np.arange(4)}
    encoder = Encoder(str(checkpoint), device="cpu")
    bad = encoder({"bytes": np.array([b"no", b"no"], object)})
    assert bad["embedding"].shape == (2, 32) and np.isnan(bad["embedding"]).all(), "a column of one type in every batch"
    pooled = encoder(batch)
    assert sorted(pooled) == ["embedding", "error", "id", "rows"] and pooled["id"].tolist() == [0, 1, 2, 3]
    assert same(list(pooled["embedding"][:3]), [rows.mean(0) for rows in wanted[:3]])
    assert np.isnan(pooled["embedding"][3]).all() and pooled["rows"].tolist()[3] == 0
    assert pooled["error"][:3].tolist() == [""] * 3 and "not an image" in pooled["error"][3]
    encoder = Encoder(str(checkpoint), device="cpu", pool=None)
    rows = encoder(batch)
    assert same(list(rows["embedding"][:3]), wanted[:3]) and rows["embedding"][3].shape == (0, 32)
    alike = encoder({"bytes": batch["bytes"][[0, 0]]})["embedding"]
    assert alike.dtype == object and same(list(alike), [wanted[0]] * 2)
