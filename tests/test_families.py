"""Every family against its own reference: the definition in fp32 to 1e-5, from a live module and from a checkpoint.

tests.families holds the references: transformers' classes, and for Kimi-VL a transcription of its published maths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fused_vit
from fused_vit.errors import CheckpointError, InputError, SpecError
from fused_vit.output import VisionOutput
from fused_vit.parity import Peer, hf_tower, random_call
from fused_vit.towers import TOWERS, parse_config
from fused_vit.weights.checkpoint import Checkpoint
from tests.families import FAMILIES, OTHER_HUB_LAYOUTS, Family, available, build, pixels, projector

HERE = [family for family in FAMILIES if available(family)]
NAMES = [family.name for family in HERE]


def outputs(out: VisionOutput) -> list[torch.Tensor]:
    """As tests.families has them: flat rows, no pooler_output where there is none."""
    pooled = [] if out.pooler_output is None else [out.pooler_output.flatten(0, -2)]
    return [out.last_hidden_state, *pooled, *out.deepstack_features]


def worst(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    assert [t.shape for t in got] == [t.shape for t in want]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True))


def save(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Path:
    """A checkpoint of three shards and an index."""
    names = sorted(tensors)
    files = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n].contiguous().clone() for n in names if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_every_row_of_the_table_has_a_reference() -> None:
    assert [tower.family for tower in TOWERS] == [family.name for family in FAMILIES]
    for tower in TOWERS:
        reference = next(family for family in FAMILIES if family.name == tower.family)
        assert tower.hf_classes == ((reference.cls,) if reference.module else ())
        assert tower.video == ("video" in reference.grids)


@pytest.mark.parametrize("family", [f for f in HERE if f.module], ids=[f.name for f in HERE if f.module])
def test_a_live_module_gives_the_same_numbers(family: Family) -> None:
    tower = build(family, seed=1)
    vit = fused_vit.FusedViT.from_module(tower, device="cpu")
    for name, grid in family.grids.items():
        x = pixels(family, tower, grid, seed=2)
        assert worst(outputs(vit(x, grid)), family.call(tower, x, grid)) <= 1e-5, name


@pytest.mark.parametrize("family", HERE, ids=NAMES)
def test_a_sharded_checkpoint_under_the_real_names_gives_the_same_numbers(family: Family, tmp_path: Path) -> None:
    tower = build(family, seed=3)
    vit = fused_vit.load(save(tmp_path, *family.hub(tower)), device="cpu")
    for name, grid in family.grids.items():
        x = pixels(family, tower, grid, seed=4)
        assert worst(outputs(vit(x, grid)), family.call(tower, x, grid)) <= 1e-5, name


OTHERS = [(name, i) for name, layouts in OTHER_HUB_LAYOUTS.items() if name in NAMES for i in range(len(layouts))]


@pytest.mark.parametrize(("name", "i"), OTHERS, ids=str)
def test_other_layouts_of_the_same_tower(name: str, i: int, tmp_path: Path) -> None:
    family = HERE[NAMES.index(name)]
    tower = build(family, seed=5)
    vit = fused_vit.load(save(tmp_path, *OTHER_HUB_LAYOUTS[name][i](tower)), device="cpu")
    grid = family.grids["one"]
    x = pixels(family, tower, grid, seed=6)
    assert worst(outputs(vit(x, grid)), family.call(tower, x, grid)) <= 1e-5


@pytest.mark.parametrize("name", [name for name in ("Kimi-VL", "Kimi-K2.5") if name in NAMES])
def test_a_projector_is_an_option(name: str, tmp_path: Path) -> None:
    family = HERE[NAMES.index(name)]
    tower = build(family, seed=7)
    config, tensors = family.hub(tower)
    out = config["text_config"]["hidden_size"]
    vit = fused_vit.load(save(tmp_path, config, tensors), device="cpu", projector=True)
    grid = [[1, 6, 10], [1, 2, 2]] if name == "Kimi-VL" else [[3, 6, 10], [1, 2, 2], [4, 4, 4]]
    x = pixels(family, tower, grid, seed=8)
    _, pooled = family.call(tower, x, grid)
    behind = projector(0, tower, out)
    with torch.no_grad():
        want = behind(pooled.unflatten(0, (-1, 4))).flatten(0, -2)
    got = vit(x, grid)
    assert got.pooler_output is not None and got.pooler_output.shape == (len(pooled) // 4, out)
    assert worst([got.pooler_output], [want]) <= 1e-5
    assert sum(len(rows) for rows in got.split()) == len(want)


def test_a_projector_that_a_family_lacks_is_refused() -> None:
    config = {"model_type": "qwen3_vl", "vision_config": {}}
    with pytest.raises(SpecError, match="Qwen3-VL has none; these families do: Kimi-VL, Kimi-K2"):
        parse_config(config, projector=True)
    with pytest.raises(SpecError, match="hidden_size is missing"):
        parse_config({"model_type": "kimi_vl", "vision_config": {"model_type": "moonvit"}}, projector=True)


@pytest.mark.parametrize("family", HERE, ids=NAMES)
def test_images_do_not_meet(family: Family, tmp_path: Path) -> None:
    """Each image of a mixed call alone gives the same rows."""
    tower = build(family, seed=9)
    vit = fused_vit.load(save(tmp_path, *family.hub(tower)), device="cpu")
    grid = family.grids["mixed"]
    x = pixels(family, tower, grid, seed=10)
    together = vit(x, grid).split()
    for one, part, row in zip(together, x.split([t * h * w for t, h, w in grid]), grid, strict=True):
        alone = vit(part, [row]).split()[0]
        assert alone.shape == one.shape and float((alone - one).norm() / one.norm()) <= 1e-6


@pytest.mark.parametrize("family", [f for f in HERE if f.module], ids=[f.name for f in HERE if f.module])
def test_check_finds_transformers_tower_the_same_at_every_step(family: Family, tmp_path: Path) -> None:
    """What `fused-vit check --steps` does: transformers' module filled from the checkpoint, step beside step."""
    path = save(tmp_path, *family.hub(build(family, seed=14)))
    vit = fused_vit.load(path, device="cpu")
    grid = [row for rows in family.grids.values() for row in rows]
    peer = Peer(hf_tower(Checkpoint.open(path), vit.device), vit, random_call(vit, grid), grid)
    rows = [*peer.outputs(), *peer.steps()]
    assert len(rows) >= 4 * vit.spec.depth
    assert not [row for row in rows if not row.ok]


# --- conventions of processors ---


def vit_of(name: str) -> tuple[Family, Any, fused_vit.FusedViT]:
    if name not in NAMES:
        pytest.skip(f"transformers has no {name}")
    family = HERE[NAMES.index(name)]
    tower = build(family, seed=11)
    return family, tower, fused_vit.FusedViT.from_module(tower, device="cpu")


@pytest.mark.parametrize("name", ["SigLIP", "InternVL"])
def test_whole_images_need_no_grid(name: str) -> None:
    family, tower, vit = vit_of(name)
    grid = family.grids["one"] * 2
    x = pixels(family, tower, grid, seed=12)
    p, (_, h, w) = vit.spec.patch.size, grid[0]
    images = x.view(2, h, w, 3, p, p).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, h * p, w * p)
    assert torch.equal(vit(images).last_hidden_state, vit(x, grid).last_hidden_state)
    with pytest.raises(InputError, match=r"whole images \[images, 3, height, width\]"):
        vit(images[:, :, 1:])
    with pytest.raises(InputError, match="no grid_thw"):
        vit(x)


@pytest.mark.parametrize("name", ["Kimi-K2.5", "PaddleOCR-VL"])
def test_patches_may_keep_their_dims(name: str) -> None:
    family, tower, vit = vit_of(name)
    grid = family.grids["mixed"]
    x = pixels(family, tower, grid, seed=13)
    p = vit.spec.patch.size
    want = vit(x, grid).last_hidden_state
    for shaped in (x.view(-1, 3, p, p), x.view(1, -1, 3, p, p), x.view(1, len(x), -1)):
        assert torch.equal(vit(shaped, grid).last_hidden_state, want)
    stills = [row for row in grid if row[0] == 1]
    if len(stills) == len(grid):
        assert torch.equal(vit(x, [[h, w] for _, h, w in grid]).last_hidden_state, want)


def test_a_clip_that_is_too_long_is_refused() -> None:
    family, tower, vit = vit_of("Kimi-K2.5")
    with pytest.raises(
        InputError, match=r"image 0: grid_thw is \(6, 2, 2\); clips of this tower have at most 4 frames"
    ):
        vit(pixels(family, tower, [[6, 2, 2]], seed=0), [[6, 2, 2]])


def test_a_missing_tensor_of_a_split_part_is_named(tmp_path: Path) -> None:
    if "Qwen2.5-Omni" not in NAMES:
        pytest.skip("transformers has no Qwen2.5-Omni")
    family = HERE[NAMES.index("Qwen2.5-Omni")]
    config, tensors = family.hub(build(family))
    tensors.pop("thinker.visual.blocks.1.attn.k.weight")
    with pytest.raises(CheckpointError, match=r"1 missing: blocks\.1\.attn\.k\.weight"):
        fused_vit.load(save(tmp_path, config, tensors), device="cpu")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "qwen2_5_vl", "window_size": 100}, "window_size is 100; expected a multiple of patch_size"),
        ({"model_type": "qwen2_5_vl", "window_size": 224}, "windows are 16 patches wide"),
        ({"model_type": "qwen2_5_vl", "fullatt_block_indexes": [99]}, "full attention names blocks"),
        ({"model_type": "exaone4_5", "num_key_value_heads": 5}, "kv_heads is 5"),
        ({"model_type": "glm4v", "hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"model_type": "glm4v", "attention_bias": "no"}, "attention_bias is 'no'; expected true or false"),
        ({"model_type": "glm_ocr", "hidden_size": 2048}, "head_dim is 128 with q/k norm"),
        ({"model_type": "moonvit", "init_pos_emb_width": 32}, "64 x 32; supported: squares"),
        ({"model_type": "moonvit", "merge_kernel_size": [2, 1]}, r"merge_kernel_size is \[2, 1\]"),
        ({"model_type": "kimi_k25", "merge_type": "other"}, "merge_type is 'other'; supported: 'sd2_tpool'"),
        ({"model_type": "intern_vit_6b", "qk_normalization": True}, "use_qk_norm is true"),
        ({"model_type": "siglip_vision_model", "layer_norm_eps": -1.0}, "layer_norm_eps is -1.0; expected a positive"),
    ],
    ids=str,
)
def test_a_model_that_does_not_fit_says_which_field(config: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_config(config)
