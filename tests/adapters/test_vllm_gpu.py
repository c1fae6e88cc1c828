"""The plug-in in vLLM itself, on a GPU: a tower built both ways by vLLM's class, from the same weights.

Each is called by the code of vLLM's model, alone and through its data-parallel helper. Errors in bf16, to the tower in
fp32, are held to twice those of vLLM's own.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import fused_vit.vllm as plugin
from bench.peers import vllm_engine
from fused_vit.adapters.vllm import MAX_TOKENS, FusedTower
from tests import families
from tests.adapters.vllm_models import MOST, ask, load, vllm_config
from tests.adapters.vllm_towers import SERVED, construct, expected, tower_class, weights_of
from tests.families import Family
from tests.towers_hf import relative

REASON = (
    "needs a CUDA device" if not torch.cuda.is_available()
    else "needs vLLM: pip install 'fused-vit[vllm]'" if importlib.util.find_spec("vllm") is None
    else ""
)  # fmt: skip
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(REASON), reason=REASON or "runs")]
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
