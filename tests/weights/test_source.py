"""What a checkpoint says of its image processor, wherever it says it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError

from fused_vit.errors import CheckpointError
from fused_vit.source import PREPROCESSOR, PROCESSOR, read_processor


@pytest.mark.parametrize(
    "files, where",
    [
        ({}, None),
        ({PREPROCESSOR: {"a": 1}}, PREPROCESSOR),
        ({PROCESSOR: {"image_processor": {"a": 1}}}, PROCESSOR),
        ({PROCESSOR: {"image_processor": {"a": 1}}, PREPROCESSOR: {"a": 2}}, PROCESSOR),
        ({PROCESSOR: {"processor_class": "X"}, PREPROCESSOR: {"a": 1}}, PREPROCESSOR),
        ({PROCESSOR: {"image_processor": 3}, PREPROCESSOR: {"a": 1}}, PREPROCESSOR),
        ({PROCESSOR: {"processor_class": "X"}}, None),
        ({PREPROCESSOR: {"image_processor": {"a": 1}}}, PREPROCESSOR),
    ],
)
def test_an_image_processor_is_found_where_transformers_finds_it(
    tmp_path: Path, files: dict[str, Any], where: str | None
) -> None:
    (tmp_path / "tower.safetensors").touch()
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    for source in (tmp_path, str(tmp_path), tmp_path / "tower.safetensors"):
        assert read_processor(source) == (None if where is None else (tmp_path / where, {"a": 1}))


def test_a_video_processor_has_a_file_of_its_own_before_the_images(tmp_path: Path) -> None:
    for name in (PREPROCESSOR, f"video_{PREPROCESSOR}"):
        (tmp_path / name).write_text(json.dumps({"of": name}))
        assert read_processor(tmp_path, "video_processor") == (tmp_path / name, {"of": name})
    (tmp_path / PROCESSOR).write_text(json.dumps({"video_processor": {"of": PROCESSOR}}))
    assert read_processor(tmp_path, "video_processor") == (tmp_path / PROCESSOR, {"of": PROCESSOR})
    assert read_processor(tmp_path) == (tmp_path / PREPROCESSOR, {"of": PREPROCESSOR})


def test_a_hub_id_without_one_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of reach and absent look alike, and the pixels of another processor would be wrong without a word."""

    def download(_: str, name: str, *, revision: str | None = None) -> str:
        raise EntryNotFoundError(name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(CheckpointError, match=r"owner/name: no preprocessor_config\.json.*give a folder"):
        read_processor("owner/name")
