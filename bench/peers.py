"""Peers: what else runs Qwen3-VL's tower, each as a call pixels -> [pooled, *deepstack], or the reason why not.

A peer is bound to one case, so that what it may prepare ahead of a call (a graph, a compilation) is not timed with it.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fused_vit.vllm as plugin
from bench.assembly import Assembly, Captured

Grids = list[list[int]]
Outputs = list[torch.Tensor]
Call = Callable[[torch.Tensor], Outputs]


class Missing(Exception):
    """Why a peer does not run a case."""


class LinearPatchEmbed(nn.Module):
    """Hugging Face's patch embedding as a matmul: what its Conv3d-as-linear option computes."""

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight.flatten(1), conv.bias

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.linear(pixels.to(self.weight.dtype), self.weight, self.bias)


def rounded(tower: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The tower as a checkpoint of that dtype loads: parameters rounded, rotary frequencies left in fp32."""
    peer = copy.deepcopy(tower)
    for parameter in peer.parameters():
        parameter.data = parameter.data.to(dtype)
    return peer


def with_linear(tower: Any) -> Any:
    """The same tower, its patch embedding a matmul; all other parameters are shared."""
    peer = copy.deepcopy(tower, {id(p): p for p in tower.parameters()})
    peer.patch_embed = LinearPatchEmbed(tower.patch_embed.proj)
    return peer


def hf_call(tower: nn.Module, grids: Grids) -> Call:
    """transformers' tower with the grid on the pixels' device already."""
    grid = torch.tensor(grids, device=next(tower.parameters()).device)
    return lambda pixels: outputs(tower(pixels, grid_thw=grid))


def outputs(result: Any) -> Outputs:
    """[pooled, *deepstack] of transformers' output or ours; features may come image by image."""
    found = [result.pooler_output, *result.deepstack_features]
    return [torch.cat(list(t)) if isinstance(t, (list, tuple)) else t for t in found]


class Peers:
    """The peers of one tower. `towers` holds it in fp32 for the truth, and rounded, for who runs it in 16 bits."""

    def __init__(self, tower: nn.Module, compile_seconds: float = 0.0) -> None:
        self.truth, self.hf_sdpa = tower, rounded(tower)
        self.hf_sdpa_linear = with_linear(self.hf_sdpa)
        self.compile_seconds = compile_seconds
        self.compiled: Any = None
        self.vllm_tower: Any = None
        self.reasons: dict[str, str] = {}

    def call(self, name: str, grids: Grids, pixels: torch.Tensor) -> Call:
        """A peer on these grids. Raises Missing with the reason where it cannot run."""
        if name in self.reasons:
            raise Missing(self.reasons[name])
        if name in ("hf_sdpa", "hf_sdpa_linear"):
            return hf_call(getattr(self, name), grids)
        builders = {
            "hf_compiled": self.hf_compiled, "assembly": self.assembly, "vllm": self.vllm, "vllm_graph": self.vllm_graph
        }  # fmt: skip
        return builders[name](grids, pixels)

    def gone(self, name: str, error: Exception) -> Missing:
        """A peer that failed once is not tried again."""
        self.reasons[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Missing(self.reasons[name])

    def assembly(self, grids: Grids, pixels: torch.Tensor) -> Call:
        try:
            return Captured(Assembly(self.hf_sdpa, grids), pixels)
        except RuntimeError as error:
            raise self.gone("assembly", error) from error

    def hf_compiled(self, grids: Grids, pixels: torch.Tensor) -> Call:
        """Blocks compiled one by one, since the tower around them reads the grid on the host.

        Each new shape may compile again; no more is begun once compile_seconds are spent.
        """
        if self.compile_seconds <= 0:
            raise Missing("the time for compiling is spent")
        start = time.perf_counter()
        try:
            if self.compiled is None:
                self.compiled = with_linear(self.hf_sdpa)
                for block in self.compiled.blocks:
                    block.compile()
            call = hf_call(self.compiled, grids)
            for _ in range(2):
                call(pixels)
            torch.cuda.synchronize()
        except Exception as error:  # a compiler fails in ways of its own
            raise self.gone("hf_compiled", error) from error
        finally:
            self.compile_seconds -= time.perf_counter() - start
        return call

    def vllm(self, grids: Grids, pixels: torch.Tensor) -> Call:
        """vLLM's own tower, launched eagerly, without its engine."""
        try:
            tower, width = self.of_vllm()
        except Exception as error:  # absent, or with other names than those below
            raise self.gone("vllm", error) from error
        return lambda pixels: list(tower(pixels, grid_thw=grids).split(width, 1))

    def vllm_graph(self, grids: Grids, pixels: torch.Tensor) -> Call:
        """vLLM's own tower in a CUDA graph, as its encoder graphs run it, but of exactly these grids.

        It is spared what those do besides: padding to a budget, and making the grids' metadata in every call.
        """
        try:
            tower, width = self.of_vllm()
            about = tower.prepare_encoder_metadata(grids)
            return Captured(lambda pixels: list(tower(pixels, None, encoder_metadata=about).split(width, 1)), pixels)
        except Exception as error:
            raise self.gone("vllm_graph", error) from error

    def of_vllm(self) -> tuple[Any, int]:
        """vLLM's tower, built once, and the width of each of its outputs, which it returns side by side."""
        self.vllm_tower = self.vllm_tower or vllm_tower(self.hf_sdpa)
        return self.vllm_tower, self.vllm_tower.merger.linear_fc2.output_size


def vllm_tower(tower: Any, fused: bool = False) -> Any:
    """What vLLM builds for a Qwen3-VL with a Hugging Face tower's parameters: its own tower or the plug-in's."""
    from vllm.model_executor.models.qwen3_vl import Qwen3_VisionTransformer

    weight, before = next(tower.parameters()), torch.get_default_dtype()
    (plugin.enable if fused else plugin.disable)()
    torch.set_default_dtype(weight.dtype)
    try:
        with vllm_engine(), weight.device:
            peer = Qwen3_VisionTransformer(tower.config, norm_eps=1e-6)
    finally:
        torch.set_default_dtype(before)
    peer.load_weights(tower.state_dict().items())
    return peer.eval()


@contextmanager
def vllm_engine() -> Iterator[None]:
    """vLLM's globals as they are while it builds a model of one rank; its process groups stay, for the calls."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.distributed.parallel_state import model_parallel_is_initialized

    with set_current_vllm_config(VllmConfig()):
        if not model_parallel_is_initialized():
            init_distributed_environment(1, 0, f"file://{tempfile.mktemp()}", torch.cuda.current_device())
            initialize_model_parallel()
        yield
