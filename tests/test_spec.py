"""config.json to spec: published sizes, and one clear error for each unknown or inconsistent value."""

from __future__ import annotations

import dataclasses

import pytest

from fused_vit.errors import SpecError
from fused_vit.spec import AttentionSpec, TowerSpec
from fused_vit.towers import find_tower, parse_config

LARGE = {"hidden_size": 1152, "depth": 27, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
SMALL = {"hidden_size": 1024, "depth": 24, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
SIZES = {  # published vision configs
    "2B": ("qwen3_vl", SMALL | {"out_hidden_size": 2048}),
    "4B": ("qwen3_vl", SMALL | {"out_hidden_size": 2560}),
    "8B": ("qwen3_vl", LARGE | {"out_hidden_size": 4096}),
    "32B": ("qwen3_vl", LARGE | {"out_hidden_size": 5120}),
    "30B-A3B": ("qwen3_vl_moe", LARGE | {"out_hidden_size": 2048}),
    "235B-A22B": ("qwen3_vl_moe", LARGE | {"out_hidden_size": 4096}),
}
COMMON = {
    "num_heads": 16, "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3,
    "num_position_embeddings": 2304, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_every_published_size_parses(size: str) -> None:
    kind, vision = SIZES[size]
    config = {"model_type": kind, "vision_config": {"model_type": kind, **COMMON, **vision}}
    spec = parse_config(config)
    tower = find_tower(config)
    assert size in tower.sizes
    assert (spec.width, spec.depth, spec.mlp.width, spec.merger.out) == (  # type: ignore[union-attr]
        vision["hidden_size"], vision["depth"], vision["intermediate_size"], vision["out_hidden_size"],
    )  # fmt: skip
    assert spec.attention.head_dim == vision["hidden_size"] // 16 and spec.patch.features == 1536  # type: ignore[operator]
    assert spec.deepstack == tuple(vision["deepstack_visual_indexes"]) and spec.position.side == 48  # type: ignore[arg-type,union-attr]
    assert parse_config(config["vision_config"]) == spec  # type: ignore[arg-type]


def test_parameter_count_of_the_8b() -> None:
    spec = parse_config({"model_type": "qwen3_vl", "vision_config": {**COMMON, **SIZES["8B"][1]}})
    total = 0
    for shape in find_tower({"model_type": "qwen3_vl"}).layouts[0].expected(spec).values():
        count = 1
        for n in shape:
            count *= n
        total += count
    assert round(total / 1e6) == 576


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; supported: gelu, gelu_pytorch_tanh"),
        ({"num_position_embeddings": 2300}, "num_position_embeddings is 2300.*square"),
        ({"hidden_size": 1000}, "hidden_size is 1000 with 16 heads"),
        ({"hidden_size": 0}, "hidden_size is 0.*positive"),
        ({"depth": "27"}, "depth is '27'.*positive integer"),
        ({"depth": True}, "depth is True"),
        ({"depth": -1}, "depth is -1"),
        ({"patch_size": [16, 14]}, "patch_size is"),
        ({"deepstack_visual_indexes": [8, 27]}, "deepstack"),
        ({"deepstack_visual_indexes": [8, 8]}, "deepstack"),
        ({"deepstack_visual_indexes": "8"}, "deepstack_visual_indexes is '8'"),
        ({"hidden_size": 4096}, "head_dim is 256"),
        ({"intermediate_size": None}, "intermediate_size is None"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0"),
    ],
)
def test_a_bad_value_names_the_field_the_value_and_what_is_supported(change: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_config({"model_type": "qwen3_vl", "vision_config": {**COMMON, **LARGE, **change}})


@pytest.mark.parametrize("config", [{}, {"model_type": "bert"}, {"vision_config": {"model_type": "clip"}}], ids=str)
def test_an_unsupported_model_gets_the_list_of_what_is_supported(config: dict[str, object]) -> None:
    with pytest.raises(SpecError, match=r"supported: .*qwen3_vl, "):
        parse_config(config)


def test_a_spec_is_frozen_and_consistent() -> None:
    spec = parse_config({"model_type": "qwen3_vl", "vision_config": {**COMMON, **LARGE}})
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.depth = 3  # type: ignore[misc]
    with pytest.raises(SpecError, match="kv_heads is 5"):
        dataclasses.replace(spec, attention=AttentionSpec(16, 5, 72))
    assert isinstance(hash(spec), int) and isinstance(spec, TowerSpec)


def test_a_class_token_has_no_place_among_merged_patches_in_the_order_of_pixels() -> None:
    spec = parse_config({"model_type": "qwen3_vl", "vision_config": {**COMMON, **SIZES["2B"][1]}})
    norm = {"merger": None, "deepstack": (), "final_norm": spec.norm, "class_token": True}
    with pytest.raises(SpecError, match="a class token and a final norm with merge size 2; supported: merge size 1"):
        dataclasses.replace(spec, **norm)  # type: ignore[arg-type]
    assert dataclasses.replace(spec, **norm, merge=1).class_token  # type: ignore[arg-type]
