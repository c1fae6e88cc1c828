"""attach / detach: a model answers the same with a fused tower, and is the same after it."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import fused_vit
from fused_vit.adapters.hf import FusedVisual

pytest.importorskip("transformers")
from tests.towers_hf import (
    random_inputs,
    random_pixels,
    randomize,
    relative,
    tiny_model,
    tiny_qwen3_vl_config,
    tiny_tower,
    transformers_major,
)

IMAGES = [[1, 6, 10], [1, 2, 4], [1, 14, 6]]
INPUTS: dict[str, dict[str, Any]] = {
    "one image": {"images": [[1, 6, 10]]},
    "odd images": {"images": IMAGES},
    "video": {"videos": [[3, 4, 6]]},
    "images and videos": {"images": [[1, 6, 10], [1, 10, 2]], "videos": [[2, 4, 6], [3, 2, 2]]},
}
OUTPUTS = transformers_major() >= 5  # a ModelOutput, not a tuple


@pytest.fixture
def model() -> Any:
    return tiny_model(1)


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.no_grad():
        yield


class Holder(nn.Module):
    """A parent of no known kind."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"vision": tower})
        self.visual = tower

    def forward(self, pixels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        out = self.visual(pixels, grid_thw=grid)
        return 2 * (out.pooler_output if OUTPUTS else out[0])


# --- the same answers ---


@pytest.mark.parametrize("shape", INPUTS.values(), ids=INPUTS)
def test_logits_are_the_same(model: Any, shape: dict[str, Any]) -> None:
    inputs = random_inputs(**shape)
    before = model(**inputs).logits
    other = model(**inputs | {k: 0.5 * v for k, v in inputs.items() if k.startswith("pixel")}).logits
    assert relative(other, before) > 1e-2, "logits must depend on the pixels for this test to mean anything"
    vit = fused_vit.attach(model)
    assert relative(model(**inputs).logits, before) <= 1e-5
    assert vit.stats()["calls"] == len(shape)


@pytest.mark.parametrize("shape", INPUTS.values(), ids=INPUTS)
def test_greedy_generation_is_the_same(model: Any, shape: dict[str, Any]) -> None:
    inputs = random_inputs(**shape)
    flags = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    before = model.generate(**inputs, **flags)
    vit = fused_vit.attach(model)
    after = model.generate(**inputs, **flags)
    assert torch.equal(after.sequences, before.sequences)
    assert relative(torch.stack(after.logits), torch.stack(before.logits)) <= 1e-5
    assert vit.stats()["calls"] == len(shape), "the tower runs in the prefill only"


@pytest.mark.parametrize("video", [False, True], ids=["image", "video"])
def test_features_are_the_same(model: Any, video: bool) -> None:
    grid = [[3, 4, 6], [1, 2, 2]] if video else IMAGES
    encode = model.model.get_video_features if video else model.model.get_image_features
    before = encode(random_pixels(grid), torch.tensor(grid))
    fused_vit.attach(model)
    after = encode(random_pixels(grid), torch.tensor(grid))
    assert type(after) is type(before)
    if OUTPUTS:
        assert relative(after.last_hidden_state, before.last_hidden_state) <= 1e-5
        before, after = ((out.pooler_output, out.deepstack_features) for out in (before, after))
    for was, now in zip(before, after, strict=True):
        assert len(was) == len(now) and type(was) is type(now)
        for a, b in zip(was, now, strict=True):
            assert type(a) is type(b)
            if isinstance(a, tuple):  # from 5.23 on, deepstack features come split per image
                a, b = torch.cat(a), torch.cat(b)
            assert relative(b, a) <= 1e-5


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe"])
def test_output_is_of_the_towers_own_class(family: str) -> None:
    tower = tiny_tower(2) if family == "qwen3_vl" else moe_tower()
    pixels, grid = random_pixels(IMAGES), torch.tensor(IMAGES)
    before = tower(pixels, grid_thw=grid)
    parent = Holder(tower)
    fused_vit.attach(parent)
    calls = {
        "positional": lambda: parent.visual(pixels, grid),
        "as the parent": lambda: parent.visual(pixels, grid_thw=grid),
        "by name": lambda: parent.visual(hidden_states=pixels, grid_thw=grid),
        "by another name": lambda: parent.visual(pixel_values=pixels, grid_thw=grid),
    }
    for name, call in calls.items():
        after = call()
        assert type(after) is type(before), name
        assert [type(x) for x in flat(after)] == [type(x) for x in flat(before)], name
        assert all(relative(b, a) <= 1e-5 for a, b in zip(tensors(before), tensors(after), strict=True)), name
    if OUTPUTS:
        assert list(after.keys()) == list(before.keys())
        after.pooler_output = "assigned, as the parent does"
        assert after["pooler_output"] == "assigned, as the parent does"


def test_return_dict_false_gives_a_tuple() -> None:
    tower = tiny_tower()
    pixels, grid = random_pixels(IMAGES), torch.tensor(IMAGES)
    before = tower(pixels, grid_thw=grid, return_dict=False)
    parent = Holder(tower)
    fused_vit.attach(parent)
    after = parent.visual(pixels, grid_thw=grid, return_dict=False)
    assert type(after) is type(before) is tuple
    assert [type(x) for x in after] == [type(x) for x in before]
    assert all(relative(b, a) <= 1e-5 for a, b in zip(tensors(before), tensors(after), strict=True))


def moe_tower() -> Any:
    from transformers.models.qwen3_vl_moe import configuration_qwen3_vl_moe, modeling_qwen3_vl_moe

    fields = tiny_qwen3_vl_config().to_dict()
    fields.pop("model_type")
    config = configuration_qwen3_vl_moe.Qwen3VLMoeVisionConfig(**fields)
    config._attn_implementation = "sdpa"
    return randomize(modeling_qwen3_vl_moe.Qwen3VLMoeVisionModel(config), 5)


def flat(out: Any) -> list[Any]:
    return list(out.to_tuple() if OUTPUTS and not isinstance(out, tuple) else out)


def tensors(out: Any) -> list[torch.Tensor]:
    return [t for part in flat(out) for t in (part if isinstance(part, list) else [part])]


# --- finding the tower, and putting it back ---


def test_detach_restores_the_very_module(model: Any) -> None:
    tower, inputs = model.model.visual, random_inputs(images=IMAGES)
    before = model(**inputs).logits
    names = [name for name, _ in model.named_modules()]
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    vit = fused_vit.attach(model)
    assert isinstance(model.model.visual, FusedVisual) and isinstance(vit, fused_vit.FusedViT)
    assert model.model.visual.encoder is vit
    fused_vit.detach(model)
    assert model.model.visual is tower
    assert [name for name, _ in model.named_modules()] == names
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers
    assert torch.equal(model(**inputs).logits, before)


def test_attach_and_detach_20_times(model: Any) -> None:
    tower, inputs = model.model.visual, random_inputs(images=[[1, 4, 6]])
    before = model(**inputs).logits
    for _ in range(20):
        vit = fused_vit.attach(model)
        assert relative(model(**inputs).logits, before) <= 1e-5
        fused_vit.detach(model)
        assert model.model.visual is tower and vit.weight_bytes == 0
    assert torch.equal(model(**inputs).logits, before)


def test_a_model_without_head() -> None:
    inner = tiny_model(1).model
    tower = inner.visual
    fused_vit.attach(inner)
    assert isinstance(inner.visual, FusedVisual)
    fused_vit.detach(inner)
    assert inner.visual is tower


def test_every_reference_to_the_tower_is_replaced() -> None:
    parent = Holder(tower := tiny_tower())
    outer = nn.Sequential(parent)
    fused_vit.attach(outer)
    assert isinstance(parent.visual, FusedVisual) and parent.inner["vision"] is parent.visual
    fused_vit.detach(parent)
    assert parent.visual is tower and parent.inner["vision"] is tower


def test_a_subclass_of_a_supported_tower() -> None:
    tower = tiny_tower()
    tower.__class__ = type("MyTower", (type(tower),), {})
    parent = Holder(tower)
    fused_vit.attach(parent)
    out = parent.visual(random_pixels(IMAGES), grid_thw=torch.tensor(IMAGES))
    assert isinstance(out, tuple) != OUTPUTS


@pytest.mark.skipif(not OUTPUTS, reason="transformers 5 option")
def test_a_tower_with_its_patch_embedding_fused_by_transformers() -> None:
    tower = tiny_tower()
    pixels, grid = random_pixels(IMAGES), torch.tensor(IMAGES)
    before = tower(pixels, grid_thw=grid).pooler_output
    conv = tower.patch_embed.proj
    linear = nn.Linear(conv.weight[0].numel(), len(conv.weight))
    linear.weight.copy_(conv.weight.flatten(1))
    linear.bias.copy_(conv.bias)
    del tower.patch_embed.proj
    tower.patch_embed.linear_proj = linear
    parent = Holder(tower)
    fused_vit.attach(parent)
    assert relative(parent.visual(pixels, grid_thw=grid).pooler_output, before) <= 1e-5


def test_options_reach_the_encoder(model: Any) -> None:
    vit = fused_vit.attach(model, dtype=torch.bfloat16, device="cpu", buckets=[(64, 4), (256, 8)])
    assert vit.dtype == torch.bfloat16 == model.model.visual.dtype
    assert [b.tokens for b in vit.buckets] == [64, 256]
    assert model(**random_inputs(images=IMAGES)).logits.dtype == torch.float32


# --- what stands at model.visual ---


def test_attributes_are_the_towers(model: Any) -> None:
    tower = model.model.visual
    tower.get_dtype = lambda: "the original's"  # as Qwen2-VL's tower has
    fused_vit.attach(model)
    visual = model.model.visual
    for name in (
        "config",
        "spatial_merge_size",
        "spatial_merge_unit",
        "patch_size",
        "deepstack_visual_indexes",
        "blocks",
    ):
        assert getattr(visual, name) is getattr(tower, name), name
    assert visual.dtype == torch.float32 and visual.device == torch.device("cpu")
    assert visual.get_dtype() == torch.float32
    assert not hasattr(visual, "get_device") and not hasattr(visual, "no_such_thing")
    assert model.dtype == torch.float32 and model.device == torch.device("cpu")
    assert "Qwen3VLVisionModel, definition" in repr(visual)
    if not OUTPUTS:
        assert model.visual is visual


def test_any_keyword_is_accepted(caplog: pytest.LogCaptureFixture) -> None:
    parent = Holder(tiny_tower())
    fused_vit.attach(parent)
    pixels, grid = random_pixels(IMAGES), torch.tensor(IMAGES)
    plain = tensors(parent.visual(pixels, grid_thw=grid))
    extra = {
        "use_cache": True,
        "cu_seqlens": torch.tensor([0, 60, 68, 152]),
        "max_seqlen": 84,
        "unknown": object(),
    }
    with caplog.at_level(logging.WARNING, "fused_vit"):
        out = tensors(parent.visual(pixels, grid_thw=grid, output_hidden_states=False, **extra))
    assert not caplog.records and all(torch.equal(a, b) for a, b in zip(plain, out, strict=True))


def test_hidden_states_and_attentions_warn_once(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    inputs, flags = random_inputs(images=IMAGES), {"output_hidden_states": True, "output_attentions": True}
    before = model(**inputs).logits
    visual = fused_vit.attach(model) and model.model.visual
    with caplog.at_level(logging.WARNING, "fused_vit"):
        for _ in range(2):
            visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"], **flags)
    assert [record.args or record.message.split()[0] for record in caplog.records] == list(flags)
    out = model(**inputs, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and relative(out.logits, before) <= 1e-5


def test_it_is_inference_only_and_says_so_in_training(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    tower, pixels, grid = model.model.visual, random_pixels(IMAGES), torch.tensor(IMAGES)
    fused_vit.attach(model)
    with torch.enable_grad(), caplog.at_level(logging.WARNING, "fused_vit"):
        out = tensors(model.model.visual(pixels.requires_grad_(), grid_thw=grid))
        assert not any(t.requires_grad for t in out) and not caplog.records
        model.train()
        for _ in range(2):
            model.model.visual(pixels, grid_thw=grid)
    assert len(caplog.records) == 1 and "inference only" in caplog.text
    assert tower.training, "the mode follows the model, for after detach"
    fused_vit.detach(model.eval())
    assert not tower.training and not tower.blocks[0].training


def test_a_compiled_parent() -> None:
    parent = Holder(tiny_tower())
    pixels, grid = random_pixels(IMAGES), torch.tensor(IMAGES)
    before = parent(pixels, grid)
    fused_vit.attach(parent)
    assert relative(torch.compile(parent, backend="eager")(pixels, grid), before) <= 1e-5


# --- saving, loading, moving ---


def test_state_dict_is_unchanged(model: Any) -> None:
    before = model.state_dict()
    fused_vit.attach(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) and after[k].data_ptr() == before[k].data_ptr() for k in before)


def test_save_pretrained_writes_the_same_checkpoint(model: Any, tmp_path: Any) -> None:
    from safetensors.torch import load_file

    inputs = random_inputs(images=IMAGES)
    before = model(**inputs).logits
    model.save_pretrained(tmp_path / "before")
    fused_vit.attach(model)
    model.save_pretrained(tmp_path / "after")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert (tmp_path / "before/config.json").read_text() == (tmp_path / "after/config.json").read_text()
    again = type(model).from_pretrained(tmp_path / "after", dtype=torch.float32, attn_implementation="sdpa").eval()
    assert torch.equal(again(**inputs).logits, before)
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    theirs = again.model.visual(pixels, grid_thw=grid)
    ours = fused_vit.load(tmp_path / "after", device="cpu")(pixels, grid)
    assert relative(ours.pooler_output, theirs.pooler_output if OUTPUTS else theirs[0]) <= 1e-5


def test_loading_while_attached_is_an_error(model: Any) -> None:
    state = tiny_model(2).state_dict()
    fused_vit.attach(model)
    own = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"model\.visual\.\* cannot be loaded .*detach"):
        model.load_state_dict(state)
    assert all(torch.equal(v, own[k]) for k, v in model.state_dict().items()), "nothing is loaded by halves"
    text = {k: v for k, v in state.items() if ".visual." not in k}
    result = model.load_state_dict(text, strict=False)
    assert not result.unexpected_keys and result.missing_keys == [k for k in state if ".visual." in k]
    fused_vit.detach(model)
    model.load_state_dict(state)


def test_moving_while_attached_is_an_error(model: Any) -> None:
    fused_vit.attach(model)
    model.to("cpu").float()
    for move in (lambda: model.to(torch.bfloat16), lambda: model.to("meta")):
        with pytest.raises(ValueError, match=r"stays torch.float32 on cpu; got .*detach"):
            move()
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}


def test_copying_while_attached_is_an_error(model: Any) -> None:
    fused_vit.attach(model)
    with pytest.raises(TypeError, match="detach"):
        copy.deepcopy(model)


def test_attaching_a_hundred_times_leaves_nothing_behind(model: Any) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    alive = []
    for _ in range(100):
        alive.append(weakref.ref(fused_vit.attach(model)))
        fused_vit.detach(model)
    gc.collect()
    assert not any(encoder() for encoder in alive)
    after = model.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)


# --- errors ---


def test_attaching_twice(model: Any) -> None:
    vit = fused_vit.attach(model)
    with pytest.raises(ValueError, match=r"Qwen3VLForConditionalGeneration has a fused tower already; .*detach"):
        fused_vit.attach(model)
    assert model.model.visual.encoder is vit


def test_detaching_what_is_not_attached(model: Any) -> None:
    with pytest.raises(ValueError, match=r"Qwen3VLForConditionalGeneration has no fused tower; .*attach"):
        fused_vit.detach(model)


def test_unsupported_models() -> None:
    with pytest.raises(ValueError, match=r"Linear has no supported vision tower; .*Qwen3VLVisionModel"):
        fused_vit.attach(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"Qwen3VLVisionModel is a tower; .*from_module"):
        fused_vit.attach(tiny_tower())
    with pytest.raises(ValueError, match="ModuleList has 2 supported"):
        fused_vit.attach(nn.ModuleList([Holder(tiny_tower()), Holder(tiny_tower(1))]))


def test_a_changed_tower_is_refused_whole(model: Any) -> None:
    tower = model.model.visual
    tower.blocks[1].attn.proj = nn.ModuleDict({"base_layer": tower.blocks[1].attn.proj})
    tower.merger.linear_fc1.weight = nn.Parameter(torch.zeros(9, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError) as error:
        fused_vit.attach(model)
    for part in (
        "blocks.1.attn.proj.weight is missing",
        "merger.linear_fc1.weight is torch.uint8 [9]",
        "merge adapters",
    ):
        assert part in str(error.value)
    assert model.model.visual is tower


def test_an_unsupported_config_leaves_the_model_as_it_was(model: Any) -> None:
    tower = model.model.visual
    tower.config.hidden_act = "relu"
    with pytest.raises(ValueError, match="hidden_act"):
        fused_vit.attach(model)
    assert model.model.visual is tower


def test_bad_calls(model: Any) -> None:
    fused_vit.attach(model)
    visual, pixels = model.model.visual, random_pixels(IMAGES)
    with pytest.raises(TypeError, match="grid_thw"):
        visual(pixels)
    with pytest.raises(TypeError, match="pixel_values"):
        visual(grid_thw=torch.tensor(IMAGES))
    with pytest.raises(ValueError):
        visual(pixels[:-1], grid_thw=torch.tensor(IMAGES))
    visual(pixels, grid_thw=torch.tensor(IMAGES))


# --- on the GPU ---


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", INPUTS.values(), ids=INPUTS)
def test_gpu_logits_are_as_near_to_fp32_as_transformers_own(shape: dict[str, Any]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    sizes = {"depth": 6, "hidden_size": 288, "num_heads": 4, "intermediate_size": 544, "out_hidden_size": 256}
    model = tiny_model(4, **sizes, patch_size=16, deepstack_visual_indexes=[1, 3]).cuda()
    inputs = {k: v.cuda() for k, v in random_inputs(**shape, features=1536).items()}
    truth = model(**inputs).logits
    for parameter in model.parameters():  # in place: inv_freq stays fp32, as in a loaded checkpoint
        parameter.data = parameter.data.bfloat16()
    theirs = model(**inputs).logits
    tower = model.model.visual
    vit = fused_vit.attach(model, max_tokens=1024)
    assert {t.device.type for t in (*tower.parameters(), *tower.buffers())} == {"cpu"}
    assert model.device.type == "cuda" and vit.backend == "cuda graphs"
    ours = model(**inputs).logits
    assert ours.dtype == theirs.dtype
    assert relative(ours, truth) <= 2 * relative(theirs, truth), (relative(ours, truth), relative(theirs, truth))
    fused_vit.detach(model)
    assert model.model.visual is tower
    assert {t.device.type for t in (*tower.parameters(), *tower.buffers())} == {"cuda"}
    assert torch.equal(model(**inputs).logits, theirs)
