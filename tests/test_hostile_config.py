"""Configs with any JSON value at any field, of every family: a spec or a SpecError, in no time, never anything else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from fused_vit.errors import SpecError
from fused_vit.plan import build_plan
from fused_vit.spec import TowerSpec
from fused_vit.towers import TOWERS, Tower, parse_config

JUNK: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 3, 8, 24, -1, 10**9, 10**18, 1 << 64, 10**400, 0.5, 1e-9, 1e300, float("nan"),
    float("inf"), float("-inf"), "", "8", "gelu", "\ud800", "x" * 10**5, [], [1], [0, 0], [[1], [1]], [{}], [None, 1],
    [10**400, 10**400], ["8", "8"], {}, {"rope_theta": []}, {"rope_theta": float("nan")}, {"rope_type": {}},
)  # fmt: skip


class Recorder(dict[str, Any]):
    """A config that remembers which fields were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


def fields(tower: Tower) -> list[str]:
    """Every field that a family reads of a config that has none; a family that copies its config shares its kin's."""
    recorder = Recorder()
    recorder["attention_bias"] = True  # InternViT's has no default
    tower.parse(recorder)
    return sorted(recorder.asked)


def spoiled(tower: Tower) -> Iterator[Mapping[str, Any]]:
    known = sorted({field for row in TOWERS for field in fields(row)})
    for field in known:
        for value in JUNK:
            yield {"model_type": tower.model_types[0], "vision_config": {"attention_bias": True, field: value}}


@pytest.mark.parametrize("tower", TOWERS, ids=lambda tower: tower.family)
def test_any_value_at_any_field(tower: Tower) -> None:
    specs: set[TowerSpec] = set()
    refused = 0
    for config in spoiled(tower):
        try:
            spec = parse_config(config)
        except SpecError as error:
            assert str(error)
            refused += 1
            continue
        if spec in specs:  # the family does not read this field
            continue
        specs.add(spec)
        assert 0 < spec.depth <= 1024 and all(0 < side < 1 << 25 for side in (spec.width, spec.mlp.width))
        if spec.depth < 100:
            build_plan(spec)
            assert len(tower.layouts[0].expected(spec)) < 10_000
    assert len(specs) > 5 and refused > 100


@pytest.mark.parametrize("junk", JUNK, ids=lambda value: repr(value)[:20])
def test_any_value_for_a_whole_part(junk: Any) -> None:
    for config in (
        {"model_type": junk}, {"model_type": "qwen3_vl", "vision_config": junk}, {"thinker_config": junk},
        {"model_type": "qwen3_omni_moe", "thinker_config": {"vision_config": junk}},
    ):  # fmt: skip
        try:
            parse_config(config)
        except SpecError as error:
            assert len(str(error)) < 200_000
