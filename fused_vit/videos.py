"""Videos: frames that a checkpoint's Hugging Face video processor asks for, decoded by PyAV, and their patches."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import CheckpointError, InputError
from .images import CAUSE, check_names, check_numbers
from .source import read_processor
from .spec import TowerSpec

logger = logging.getLogger("fused_vit")
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,asf,flv,ogg"  # no demuxer beyond these
MAX_BYTES = 1 << 32  # of the frames of one video, in RGB
# That a header may claim, which costs its writer nothing: a day and a half at 30 a second. What samples them may keep a
# list of them all, as some processors of transformers do.
MAX_FRAMES = 1 << 22


def video_processor(
    spec: TowerSpec,
    source: str | Path,
    *,
    fps: float | None = None,
    frames: int | None = None,
    revision: str | None = None,
) -> Any:
    """The video processor that `source` names, or Qwen3-VL's where it describes none.

    fps, frames: sample so many a second, or so many of a whole video, instead of what the processor is set to.
    Raises CheckpointError, as for the image processor, or ImportError where torchvision is missing, which Hugging
    Face's video processors need.
    """
    place = Path(source).expanduser()
    place = place.parent if place.is_file() else place
    p, described = spec.patch, read_processor(source, "video_processor", revision=revision)
    if described is not None:
        _check_numbers(*described, p.channels)
    try:
        import torchvision.transforms.v2.functional  # noqa: F401
        from transformers import Qwen3VLVideoProcessor
    except (ImportError, RuntimeError) as error:  # of a build for another torch: RuntimeError
        raise ImportError(
            "videos need transformers 5 and the torchvision that was built for this torch, for Hugging Face's video "
            f"processors ({error})"
        ) from error
    if described is None:
        found: Any = Qwen3VLVideoProcessor(patch_size=p.size, temporal_patch_size=p.temporal, merge_size=spec.merge)
    else:
        found = _named(place if place.is_dir() else str(source), *described, revision)
    if found.patch_size != p.size:
        raise CheckpointError(
            f"{source}: its video processor has patches of {found.patch_size}; config.json says {p.size}: take both "
            "from one release"
        )
    if fps is not None or frames is not None:
        found.fps, found.num_frames, found.do_sample_frames = fps, frames, True
    return found


def _named(source: str | Path, path: Path, fields: dict[str, Any], revision: str | None) -> Any:
    """The processor that transformers finds by the fields, which are in the file at `path`, or by config.json."""
    from transformers import AutoVideoProcessor

    named: Any = AutoVideoProcessor  # untyped
    try:
        found = named.from_pretrained(source, revision=revision, trust_remote_code=False)
        check_names(type(found), fields)
    except ImportError:
        raise
    except Exception as error:  # whatever transformers meets in what anybody may have written
        raise _unusable(path, error) from error
    return found


def _check_numbers(path: Path, fields: dict[str, Any], channels: int) -> None:
    """Before anything of transformers meets them."""
    try:
        check_numbers(fields, channels, areas=True)
    except ValueError as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: no video processor that can be used ({str(error)[:CAUSE]}). Take it from the tower's release."
    )


def need_av() -> Any:
    """PyAV. Raises ImportError with the remedy."""
    try:
        import av
    except ImportError as error:
        raise ImportError(f"videos need PyAV: pip install 'fused-vit[embed]' ({error})") from error
    return av


def read_video(file: str | bytes, name: str, prepare: Any) -> tuple[Any, Any]:
    """uint8 [frames, height, width, 3] of the frames that `prepare` samples, and transformers' VideoMetadata of them.

    Raises InputError naming the video.
    """
    av = need_av()
    try:
        # by a file that is open already: a playlist in disguise has no way to open others
        with (
            io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as opened,
            av.open(opened, options={"format_whitelist": FORMATS, "protocol_whitelist": "none"}) as container,
        ):
            return _sampled(container, name, prepare)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # decoders meet hostile bytes with whatever they stumble over
        logger.info("%s cannot be decoded", name, exc_info=error)
        raise InputError(f"{name}: not a video that can be read ({type(error).__name__})") from error


def _sampled(container: Any, name: str, prepare: Any) -> tuple[Any, Any]:
    import numpy as np
    from transformers.video_utils import VideoMetadata

    if not container.streams.video:
        raise InputError(f"{name}: holds no video stream")
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # there is a worker for every core
    total = stream.frames or _count(container, stream)
    fps = float(stream.average_rate or 0)
    if total <= 0 or fps <= 0:
        raise InputError(f"{name}: {total} frames at {fps} a second; expected some")
    if total > MAX_FRAMES:
        raise InputError(f"{name}: {total} frames, as its header has it; expected at most {MAX_FRAMES}: cut it up")
    metadata = VideoMetadata(
        total_num_frames=total, fps=fps, duration=total / fps, video_backend="pyav",
        height=stream.height, width=stream.width,
    )  # fmt: skip
    wanted: Sequence[int] = range(total)
    if prepare.do_sample_frames:
        settings = {key: getattr(prepare, key, None) for key in prepare.valid_kwargs.__annotations__}
        wanted = [int(i) for i in prepare.sample_frames(metadata, **settings)]
    size = len(wanted) * stream.height * stream.width * 3
    if size > MAX_BYTES:
        raise InputError(f"{name}: its {len(wanted)} frames take {size} bytes; expected at most {MAX_BYTES}: set --fps")
    kept: dict[int, Any] = {}
    needed, last = set(wanted), max(wanted)
    for i, frame in enumerate(container.decode(stream)):
        if i in needed:
            kept[i] = frame.to_ndarray(format="rgb24")
        if i >= last:
            break
    if not kept:
        raise InputError(f"{name}: none of its frames can be decoded")
    wanted = [i for i in wanted if i in kept]  # headers promise more than some files hold
    metadata.frames_indices = wanted
    return np.stack([kept[i] for i in wanted]), metadata


def _count(container: Any, stream: Any) -> int:
    """Containers that do not say how many frames they have: by their packets, without decoding."""
    total = sum(1 for packet in container.demux(stream) if packet.size)
    container.seek(0)
    return total


def prepare_video(prepare: Any, frames: Any, metadata: Any) -> tuple[Any, Any]:
    """pixel_values and grid of sampled frames."""
    batch = prepare(videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt")
    return batch["pixel_values_videos"], batch["video_grid_thw"]
