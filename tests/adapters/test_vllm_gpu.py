"""The plug-in in vLLM itself, on a GPU: a tower built both ways by vLLM's class, from the same weights.

Each is called by the code of vLLM's model, alone and through its data-parallel helper. Errors in bf16, to the tower in
fp32, are held to twice those of vLLM's own.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import fused_vit.vllm as plugin
from bench.peers import vllm_engine
from fused_vit.adapters.vllm import MAX_TOKENS, FusedTower
from tests import families
from tests.adapters.vllm_towers import SERVED, construct, expected, tower_class, weights_of
from tests.families import Family
from tests.towers_hf import relative

REASON = (
    "needs a CUDA device" if not torch.cuda.is_available()
    else "needs vLLM: pip install 'fused-vit[vllm]'" if importlib.util.find_spec("vllm") is None
    else ""
)  # fmt: skip
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(REASON), reason=REASON or "runs")]
MODELS = {  # family -> module and class of the model that holds the tower
    "Qwen2-VL": ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
    "Qwen2.5-VL": ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    "Qwen3-VL": ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
    "Qwen3-VL-MoE": ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"),
    "Qwen3.5": ("qwen3_5", "Qwen3_5ForConditionalGeneration"),
    "Qwen3.5-MoE": ("qwen3_5", "Qwen3_5MoeForConditionalGeneration"),
    "GLM-4V": ("glm4_1v", "Glm4vForConditionalGeneration"),
    "GLM-4V-MoE": ("glm4_1v", "Glm4vMoeForConditionalGeneration"),
    "Kimi-VL": ("kimi_vl", "KimiVLForConditionalGeneration"),
    "Kimi-K2.5": ("kimi_k25", "KimiK25ForConditionalGeneration"),
}
MOST = 0.02  # of vLLM's own error: 0.20 and 0.23 misplace some frames of GLM's clips, which is no measure for ours
WIDE = {"Qwen2-VL": {"embed_dim": 128}}  # heads of 64, for vLLM's attention


@pytest.fixture(scope="module")
def engine() -> Iterator[None]:
    """vLLM's globals as they are while it builds a model, of one rank.

    Torch compiles nothing: vLLM's towers ask it to (Qwen2.5-VL and GLM-4V for SiLU times its gate, Kimi-K2.5 for its
    positions), which takes far longer than the rest of a test and changes nothing that is compared here.
    """
    from vllm.distributed import cleanup_dist_env_and_memory

    torch.compiler.set_stance("force_eager")
    with vllm_engine():
        yield
        cleanup_dist_env_and_memory()
    torch.compiler.set_stance("default")


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.SWITCH, "1")


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Says what begins and how long it took: with pytest -s the last line names what a test is stuck in."""
    print(f"{what} ...", flush=True)
    start = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - start:.1f} s", flush=True)


def vllm_config(family: Family, config: Any, hub: dict[str, Any]) -> Any:
    """The config class that this vLLM has of its own for a family, if any."""
    fields = {name.removeprefix("vt_"): value for name, value in hub["vision_config"].items() if name != "model_type"}
    configs = "vllm.transformers_utils.configs."
    if family.name == "Kimi-VL":
        made = importlib.import_module(f"{configs}moonvit").MoonViTConfig(**fields)
        made._attn_implementation = "sdpa"
        return made
    if family.name == "Kimi-K2.5" and importlib.util.find_spec(f"{configs}kimi_k25"):  # up to 0.23
        return importlib.import_module(f"{configs}kimi_k25").KimiK25VisionConfig(**fields)
    return config


def both(family: Family) -> tuple[Family, Any, Any, Any]:
    """The family with heads of 64, its reference in fp32, vLLM's own tower and the fused one, in bf16."""
    wide = WIDE.get(family.name, {"hidden_size": 128})
    family = replace(family, tiny={**family.tiny, **wide})
    reference = families.build(family)
    config = vllm_config(family, reference.config, family.hub(reference)[0])
    plugin.enable()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            fused = construct(family, config)
            plugin.disable()
            own = construct(family, config)
        if family.name == "Kimi-K2.5":  # its model does: vLLM's table of frames is fp32 on the CPU whatever the default
            own, fused = own.to("cuda", torch.bfloat16), fused.to("cuda", torch.bfloat16)
        for tower in (own, fused):
            load(tower, weights_of(family, reference))
    finally:
        plugin.enable()
        torch.set_default_dtype(torch.float32)
    assert type(fused) is FusedTower and type(own) is tower_class(family)
    return family, reference, own, fused


def load(tower: Any, weights: dict[str, torch.Tensor]) -> None:
    """As vLLM's loader does: through its AutoWeightsLoader, every parameter accounted for."""
    from vllm.model_executor.models.utils import AutoWeightsLoader

    model = torch.nn.Module()
    model.visual = tower
    loaded = AutoWeightsLoader(model).load_weights((f"visual.{name}", t) for name, t in weights.items())
    assert {name for name, _ in model.named_parameters()} <= loaded
    for module in tower.modules():
        if hasattr(getattr(module, "quant_method", None), "process_weights_after_loading"):
            module.quant_method.process_weights_after_loading(module)


class Projector(torch.nn.Module):
    """Kimi-K2.5's, but for its arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.pre_norm = torch.nn.LayerNorm(1, dtype=torch.bfloat16)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.flatten(1)


def ask(family: Family, tower: Any, pixels: torch.Tensor, grid: list[list[int]], parallel: bool) -> list[torch.Tensor]:
    """Features of every item, by the code of vLLM's model."""
    module, name = MODELS[family.name]
    loaded = importlib.import_module(plugin.MODELS + module)
    rows = torch.tensor(grid)
    patches = pixels.view(-1, 3, 4, 4) if family.name.startswith("Kimi") else pixels
    with torch.inference_mode():
        if family.name == "Kimi-K2.5":
            return list(loaded.vision_tower_forward(tower, patches, rows, Projector(), parallel))
        model = getattr(loaded, name)
        if family.name == "Kimi-VL":
            inputs = {"pixel_values": patches, "image_grid_hws": rows[:, 1:]}
            holder = SimpleNamespace(vision_tower=tower, use_data_parallel=parallel)
            return list(model._process_image_pixels(holder, inputs))
        kind = "video" if grid[0][0] > 1 else "image"
        values = "pixel_values_videos" if kind == "video" else "pixel_values"
        inputs = {"type": values, values: patches, f"{kind}_grid_thw": rows}
        holder = SimpleNamespace(visual=tower, use_data_parallel=parallel)
        return list(getattr(model, f"_process_{kind}_input")(holder, inputs))


@pytest.mark.parametrize("family", SERVED, ids=lambda family: family.name)
def test_beside_vllms_own_tower(family: Family, engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MAX_TOKENS, "1024")  # what these grids fill: a larger graph is more to compile
    with timed(f"{family.name}, building"):
        family, reference, own, fused = both(family)
    for name, grid in family.grids.items():
        pixels = families.pixels(family, reference, grid).bfloat16()
        wanted = expected(family, reference, pixels.float(), grid).flatten()
        for parallel in (False, True):
            if family.name == "Kimi-K2.5" and name == "video" and parallel:
                continue  # vLLM's helper expects as many rows as patches: frames that were pooled are missing
            with timed(f"{family.name}, {name}, data parallel {parallel}, vLLM's"):
                theirs = ask(family, own, pixels.cuda(), grid, parallel)
            with timed(f"{family.name}, {name}, data parallel {parallel}, fused"):
                ours = ask(family, fused, pixels.cuda(), grid, parallel)
            assert [t.shape for t in ours] == [t.shape for t in theirs]
            assert all(t.dtype == torch.bfloat16 and t.is_cuda for t in ours)
            errors = [relative(torch.cat(out).float().cpu().flatten(), wanted) for out in (ours, theirs)]
            assert errors[0] <= 2 * min(errors[1], MOST), (name, parallel, errors)


def test_the_first_call_takes_all_memory(engine: None) -> None:
    """vLLM's profiling run sees workspace and graphs: later calls, of any size, add their outputs only."""
    family, reference, own, fused = both(next(family for family in SERVED if family.name == "Qwen3-VL"))
    del own
    pixels = families.pixels(family, reference, [[1, 4, 4]]).bfloat16().cuda()
    with torch.inference_mode():
        fused(pixels, [[1, 4, 4]])
        torch.cuda.synchronize()
        free, reserved = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
        graphs = fused.vit.stats()["graphs"]
        for side in (2, 8, 16, 32, 64, 128):
            grid = [[1, side, side]]
            fused(families.pixels(family, reference, grid).bfloat16().cuda(), grid)
        torch.cuda.synchronize()
    assert fused.vit.stats()["graphs"] == graphs == len(fused.vit.buckets)
    grown = torch.cuda.memory_reserved() - reserved  # by pixels and outputs
    assert free - torch.cuda.mem_get_info()[0] <= grown + (2 << 20)
