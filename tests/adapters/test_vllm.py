"""The vLLM plug-in on a CPU: what it replaces and when, weights by vLLM's names, calls and results as its models do."""

from __future__ import annotations

import importlib
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fused_vit.vllm as plugin
from fused_vit.adapters import vllm as adapter
from fused_vit.errors import CheckpointError, FusedVitError
from tests.adapters import fake_vllm

pytest.importorskip("transformers")
from tests import families
from tests.adapters.vllm_towers import MODULES, SERVED, call, construct, expected, tower_class, weights_of
from tests.families import Family
from tests.towers_hf import relative

ROOT = Path(__file__).parents[2]
QWEN3 = next(family for family in SERVED if family.name == "Qwen3-VL")
GLM = next(family for family in SERVED if family.name == "GLM-4V")


@pytest.fixture(autouse=True)
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fake package, and nothing of it left afterwards; CPU towers are replaced too."""
    fake_vllm.write(tmp_path)
    kept = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "vllm"}
    for name in kept:
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(adapter, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setenv(plugin.SWITCH, "1")
    finders = list(sys.meta_path)
    yield
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]
    sys.modules.update(kept)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Messages of warnings so far; vLLM's logger may not propagate."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Keep(logging.WARNING)
    logging.getLogger("vllm.fused_vit").addHandler(handler)
    yield messages
    logging.getLogger("vllm.fused_vit").removeHandler(handler)


def loaded(family: Family = QWEN3, **changed: Any) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """A fused tower with the weights of a transformers tower, that one, and the weights."""
    plugin.register()
    reference = families.build(family)
    weights = weights_of(family, reference)
    fused = construct(family, reference.config, **changed)
    assert type(fused) is adapter.FusedTower
    assert "all_tensors" in fused.load_weights(iter(weights.items()))
    return fused, reference, weights


# --- numbers, names and layouts ---


@pytest.mark.parametrize("family", SERVED, ids=lambda family: family.name)
def test_the_same_rows_as_transformers_in_vllms_layout(family: Family) -> None:
    fused, reference, _ = loaded(family)
    for grid in family.grids.values():
        pixels = families.pixels(family, reference, grid)
        with torch.inference_mode():
            out = call(family, fused, pixels, grid)
        wanted = expected(family, reference, pixels, grid)
        if family.name.startswith("Kimi"):
            assert isinstance(out, list) and [len(t) for t in out] == [h * w // 4 for _, h, w in grid]
            assert all(t.shape[1:] == (4, fused.hidden_size) for t in out)
            out, wanted = torch.cat(out).flatten(), wanted.flatten()
        else:
            assert out.shape == (sum(t * h * w for t, h, w in grid) // 4, fused.out_hidden_size)
        assert relative(out, wanted) < 1e-5


def test_deepstack_features_follow_the_main_ones() -> None:
    fused, reference, _ = loaded()
    assert fused.out_hidden_size == reference.config.out_hidden_size * 3 and fused.deepstack_visual_indexes == [0, 1]


@pytest.mark.parametrize("family", [QWEN3, GLM], ids=lambda family: family.name)
def test_grids_as_the_data_parallel_helper_gives_them(family: Family) -> None:
    """run_dp_sharded_mrope_vision_model: lists, and of an idle rank only attributes."""
    fused, reference, _ = loaded(family)
    grid = family.grids["mixed"]
    pixels = families.pixels(family, reference, grid)
    assert torch.equal(call(family, fused, pixels, grid, "lists"), call(family, fused, pixels, grid))
    assert next(fused.parameters()).dtype == fused.dtype == torch.float32 and fused.device.type == "cpu"
    assert fused.spatial_merge_size == 2 and fused.merge_kernel_size == (2, 2)
    assert fused.config.hidden_size == fused.hidden_size == 32


def test_outputs_alias_nothing() -> None:
    fused, reference, _ = loaded()
    grid = [[1, 8, 12]]
    pixels = families.pixels(QWEN3, reference, grid)
    first = fused(pixels, grid)
    kept = first.clone()
    fused(pixels + 1, grid)
    assert torch.equal(first, kept)


def pieces(weights: dict[str, torch.Tensor], spelling: str) -> dict[str, torch.Tensor]:
    """qkv as q, k, v, or gate and up as one, as vLLM's towers stack them."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if ".attn.qkv." in name and spelling.startswith("q"):
            names = [name.replace("qkv", spelling.replace("q", n, 1)) for n in "qkv"]
            out |= dict(zip(names, tensor.chunk(3), strict=True))
        elif "gate_proj" in name and spelling == "gate_up":
            up = weights[name.replace("gate_proj", "up_proj")]
            out[name.replace("gate_proj", "gate_up_proj")] = torch.cat([tensor, up])
        elif not ("up_proj" in name and spelling == "gate_up"):
            out[name] = tensor
    return out


@pytest.mark.parametrize(
    ("family", "spelling"), [(QWEN3, "q"), (QWEN3, "q_proj"), (GLM, "q"), (GLM, "gate_up")],
    ids=lambda value: getattr(value, "name", value),
)  # fmt: skip
def test_stacked_names(family: Family, spelling: str) -> None:
    fused, reference, weights = loaded(family)
    again = construct(family, reference.config)
    renamed = pieces(weights, spelling)
    assert renamed.keys() != weights.keys()
    assert "all_tensors" in again.load_weights(renamed.items())
    grid = family.grids["one"]
    pixels = families.pixels(family, reference, grid)
    assert torch.equal(call(family, again, pixels, grid), call(family, fused, pixels, grid))


def test_weights_come_in_parts_and_are_updated_in_place() -> None:
    """Shards interleave models' parts, trainers send buckets; graphs keep the tensors that they read."""
    fused, reference, weights = loaded()
    before = fused.vit.weights
    names = list(weights)
    assert "all_tensors" not in fused.load_weights((name, weights[name] * 0.5) for name in names[::2])
    pixels, grid = families.pixels(QWEN3, reference, [[1, 8, 12]]), [[1, 8, 12]]
    with pytest.raises(CheckpointError, match=r"were not loaded: .*FUSED_VIT_VLLM=0"):
        fused(pixels, grid)
    addresses = {name: tensor.data_ptr() for name, tensor in before.items()}
    assert "all_tensors" in fused.load_weights((name, weights[name] * 0.5) for name in names[1::2])
    assert addresses == {name: tensor.data_ptr() for name, tensor in fused.vit.weights.items()}
    fresh = construct(QWEN3, reference.config)
    fresh.load_weights((name, tensor * 0.5) for name, tensor in weights.items())
    assert torch.equal(fused(pixels, grid), fresh(pixels, grid))


def test_loading_is_not_changed_by_vllms_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM loads with the model's dtype and device as torch's default, and trainers reload in inference mode."""
    fused, reference, weights = loaded()
    again = construct(QWEN3, reference.config)
    pack, seen = adapter.pack, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append((torch.get_default_dtype(), torch.is_inference_mode_enabled(), torch.empty(0).device.type))
        return pack(*args, **kwargs)

    monkeypatch.setattr(adapter, "pack", watched)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode(), torch.device("meta"):
            again.load_weights(weights.items())
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen == [(torch.float32, False, "cpu")]
    for name, tensor in fused.vit.weights.items():
        assert torch.equal(tensor, again.vit.weights[name]), name
    again.load_weights(weights.items())  # outside: what was made in inference mode could not be written to


def test_loaders_may_reuse_their_buffers() -> None:
    fused, reference, weights = loaded()
    again = construct(QWEN3, reference.config)
    buffer = torch.empty(max(t.numel() for t in weights.values()))

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights.items():
            view = buffer[: tensor.numel()].view(tensor.shape)
            yield name, view.copy_(tensor)

    again.load_weights(stream())
    assert all(torch.equal(t, again.vit.weights[name]) for name, t in fused.vit.weights.items())


def test_foreign_tensors_are_named() -> None:
    plugin.register()
    reference = families.build(QWEN3)
    fused = construct(QWEN3, reference.config)
    weights = weights_of(QWEN3, reference) | {"blocks.0.attn.qkv.weight_scale": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"not of a Qwen3-VL tower: blocks\.0\.attn\.qkv\.weight_scale"):
        fused.load_weights(weights.items())


def test_made_up_weights() -> None:
    """load_format dummy never calls load_weights."""
    importlib.import_module("vllm.config").engine.load_config.load_format = "dummy"
    plugin.register()
    reference = families.build(QWEN3)
    out = construct(QWEN3, reference.config)(families.pixels(QWEN3, reference, [[1, 4, 4]]), [[1, 4, 4]])
    assert out.shape == (4, 72) and out.isfinite().all()


NORMED = [family for family in SERVED if family.name in ("Qwen3-VL", "Kimi-K2.5")]


@pytest.mark.parametrize("family", NORMED, ids=lambda family: family.name)
def test_pixels_normalised_on_the_device(family: Family) -> None:
    class Norm(torch.nn.Module):
        def forward(self, pixel_values: torch.Tensor, visual_dtype: torch.dtype) -> torch.Tensor:
            assert pixel_values.ndim == 2  # as vLLM's does
            return pixel_values.to(visual_dtype) / 128 - 1

    fused, reference, _ = loaded(family, input_norm=Norm())
    grid = [[1, 4, 4]]
    data = torch.randint(0, 256, families.pixels(family, reference, grid).shape, dtype=torch.uint8)
    out = call(family, fused, data, grid)
    rows = torch.cat(out) if isinstance(out, list) else out
    assert relative(rows.flatten(), expected(family, reference, data / 128 - 1, grid).flatten()) < 1e-5


# --- what is replaced, and when ---


def test_a_module_is_imported_by_vllm_not_by_the_plug_in() -> None:
    plugin.register()
    plugin.register()  # vLLM may call it again
    assert not any(name.startswith(plugin.MODELS) for name in sys.modules)
    fused = construct(QWEN3, families.build(QWEN3).config)
    assert type(fused) is adapter.FusedTower


def test_modules_imported_before_are_seen_to() -> None:
    reference = families.build(QWEN3)
    by_name = importlib.import_module(f"{plugin.MODELS}qwen3_5").Qwen3_VisionTransformer
    plugin.register()
    assert type(by_name(reference.config, 1e-6)) is adapter.FusedTower


def test_subclasses_are_other_towers() -> None:
    plugin.register()
    cls = importlib.import_module(f"{plugin.MODELS}glm_ocr").GlmOcrVisionTransformer
    assert type(cls(None, families.build(GLM).config, 1e-5)) is cls


@pytest.mark.parametrize("value", ["0", "false", " OFF "])
def test_the_switch(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.SWITCH, value)
    before = list(sys.meta_path)
    plugin.register()
    assert sys.meta_path == before
    tower = construct(QWEN3, families.build(QWEN3).config)
    assert type(tower) is tower_class(QWEN3) and tower.built


def test_disable_and_enable(warnings: list[str]) -> None:
    config = families.build(QWEN3).config
    plugin.enable()
    assert type(construct(QWEN3, config)) is adapter.FusedTower
    plugin.disable()
    own = construct(QWEN3, config)
    assert type(own) is tower_class(QWEN3) and own.built and os.environ[plugin.SWITCH] == "0"
    plugin.enable()
    assert type(construct(QWEN3, config)) is adapter.FusedTower and not warnings


def test_enable_without_vllm_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FusedVitError, match=r"pip install 'fused-vit\[vllm\]'"):
        plugin.enable()


def test_the_entry_point_costs_nothing() -> None:
    """In a fresh interpreter: neither torch nor triton nor vLLM's models are imported."""
    code = (
        "import sys; from fused_vit.vllm import register; register(); "
        "print([m for m in ('torch', 'triton', 'transformers', 'vllm') if m in sys.modules])"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_class_is_built_by_these_tests() -> None:
    assert {plugin.MODELS + module for module in MODULES.values()} == plugin.TOWERS.keys()


def test_the_entry_point_is_declared() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["fused-vit"].partition(":")
    assert getattr(importlib.import_module(module), name) is plugin.register
    assert project["optional-dependencies"]["vllm"] == ["vllm"]


def test_a_version_without_the_class_is_reported(warnings: list[str], tmp_path: Path) -> None:
    (tmp_path / "vllm/model_executor/models/qwen2_vl.py").write_text("")
    plugin.register()
    importlib.import_module(f"{plugin.MODELS}qwen2_vl")
    assert len(warnings) == 1 and "has no Qwen2VisionTransformer" in warnings[0]


# --- what falls back ---


def engine() -> Any:
    return importlib.import_module("vllm.config").engine


class Quantized:
    """A quantization config that leaves `ignored` alone."""

    def __init__(self, ignored: str) -> None:
        self.ignored = ignored

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        if self.ignored and prefix.startswith(self.ignored):
            return importlib.import_module("vllm.model_executor.layers.linear").UnquantizedLinearMethod()
        return SimpleNamespace()


def _ranks() -> None:
    importlib.import_module("vllm.distributed").ranks = 2


def _lora() -> None:
    engine().lora_config = SimpleNamespace(enable_tower_connector_lora=True)


REASONS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "ranks": (_ranks, {}, "split over 2 ranks; supported: one, or --mm-encoder-tp-mode data"),
    "LoRA": (_lora, {}, "LoRA is enabled on the tower"),
    "graphs": (lambda: setattr(engine().compilation_config, "cudagraph_mm_encoder", True), {}, "has its own"),
    "fp8 attention": (
        lambda: setattr(engine().model_config.multimodal_config, "mm_encoder_attn_dtype", "fp8"), {}, "dtype is fp8",
    ),
    "format": (lambda: setattr(engine().load_config, "load_format", "sharded_state"), {}, "load_format is sharded"),
    "quantized": (None, {"quant_config": Quantized("")}, r"visual\.blocks\.0\.attn\.qkv is quantized"),
    "merger quantized": (None, {"quant_config": Quantized("visual.blocks")}, r"visual\.merger\.linear_fc1 is quant"),
    "eps": (None, {"norm_eps": 1e-5}, "norm_eps is 1e-05; expected 1e-06"),
    "max tokens": (lambda: os.environ.update({adapter.MAX_TOKENS: "many"}), {}, "is 'many'; expected"),
}  # fmt: skip


@pytest.mark.parametrize("reason", REASONS)
def test_a_tower_that_does_not_fit_is_vllms_with_one_warning(
    reason: str, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(adapter.MAX_TOKENS, "1024")
    change, arguments, message = REASONS[reason]
    if change:
        change()
    plugin.register()
    tower = construct(QWEN3, families.build(QWEN3).config, **arguments)
    assert type(tower) is tower_class(QWEN3) and tower.built
    assert len(warnings) == 1 and "vLLM's own Qwen3_VisionTransformer runs" in warnings[0]
    assert re.search(message, warnings[0]), warnings[0]


def test_an_unknown_config_falls_back(warnings: list[str]) -> None:
    plugin.register()
    config = families.build(QWEN3).config
    config.hidden_act = "relu"
    assert type(construct(QWEN3, config)) is tower_class(QWEN3)
    assert len(warnings) == 1 and "hidden_act is 'relu'" in warnings[0]


def test_an_unknown_argument_falls_back(warnings: list[str], tmp_path: Path) -> None:
    source = fake_vllm.TOWER.format(cls="Qwen3_VisionTransformer", signature=f"{fake_vllm.QWEN}, novelty=None")
    (tmp_path / "vllm/model_executor/models/qwen3_vl.py").write_text(source)
    plugin.register()
    config = families.build(QWEN3).config
    assert type(construct(QWEN3, config)) is adapter.FusedTower
    assert type(construct(QWEN3, config, novelty=1)) is tower_class(QWEN3)
    assert len(warnings) == 1 and "gives it novelty" in warnings[0]


def test_other_devices_fall_back(warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "DEVICES", ("cuda",))
    plugin.register()
    assert type(construct(QWEN3, families.build(QWEN3).config)) is tower_class(QWEN3)
    assert len(warnings) == 1 and "built on cpu; supported: cuda" in warnings[0]


def test_a_vllm_that_moved_what_is_asked_of_it_falls_back(warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def moved() -> None:
        raise KeyError("visual")

    monkeypatch.setattr(adapter, "_check_engine", moved)
    plugin.register()
    assert type(construct(QWEN3, families.build(QWEN3).config)) is tower_class(QWEN3)
    assert len(warnings) == 1 and "runs, not the fused one: KeyError('visual')" in warnings[0]


def test_gpus_on_which_the_kernels_do_not_run_fall_back(warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_place", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (7, 5))
    plugin.register()
    assert type(construct(QWEN3, families.build(QWEN3).config)) is tower_class(QWEN3)
    assert len(warnings) == 1 and "cuda:0 has compute capability 7.5; supported: 8.0 and newer" in warnings[0]


def test_a_tower_that_vllm_throws_away_is_its_own(warnings: list[str]) -> None:
    """limit_mm_per_prompt 0: built on meta, replaced by a placeholder."""
    plugin.register()
    config = families.build(QWEN3).config
    with torch.device("meta"):
        assert type(construct(QWEN3, config)) is tower_class(QWEN3)
    assert not warnings


def test_a_quantized_model_with_a_plain_tower_is_fused(warnings: list[str]) -> None:
    plugin.register()
    tower = construct(QWEN3, families.build(QWEN3).config, quant_config=Quantized("visual."))
    assert type(tower) is adapter.FusedTower and not warnings


def test_data_parallel_ranks_are_fused(warnings: list[str]) -> None:
    _ranks()
    engine().model_config.multimodal_config.mm_encoder_tp_mode = "data"
    plugin.register()
    assert type(construct(QWEN3, families.build(QWEN3).config)) is adapter.FusedTower and not warnings
