"""A package called vllm with what the plug-in meets of the real one, under the names and signatures of 0.20 to 0.33.

Its towers only record how they were built: numbers are compared with transformers' towers, and with vLLM's own where
vLLM is installed (test_vllm_gpu.py).
"""

from __future__ import annotations

from pathlib import Path

QWEN = "vision_config, norm_eps=1e-6, quant_config=None, prefix=''"  # 0.20
NORMED = "vision_config, norm_eps=1e-6, quant_config=None, input_norm=None, prefix=''"  # 0.33
TOWER = """
import torch

class {cls}(torch.nn.Module):
    def __init__(self, {signature}):
        super().__init__()
        self.built = True
"""
FILES = {
    "config": """
        from types import SimpleNamespace

        engine = SimpleNamespace(
            load_config=SimpleNamespace(load_format="auto"),
            lora_config=None,
            compilation_config=SimpleNamespace(cudagraph_mm_encoder=False),
            model_config=SimpleNamespace(multimodal_config=SimpleNamespace(mm_encoder_tp_mode="weights")),
        )

        def get_current_vllm_config():
            return engine
    """,
    "distributed": """
        ranks = 1

        def get_tensor_model_parallel_world_size():
            return ranks
    """,
    "model_executor/layers/linear": """
        class UnquantizedLinearMethod:
            pass

        class ReplicatedLinear:
            def __init__(self, input_size, output_size, bias=True, quant_config=None, prefix=""):
                assert quant_config is None
    """,
    "model_executor/models/vision": """
        from vllm.config import get_current_vllm_config

        def is_vit_use_data_parallel():
            return get_current_vllm_config().model_config.multimodal_config.mm_encoder_tp_mode == "data"
    """,
    "model_executor/models/qwen2_vl": TOWER.format(cls="Qwen2VisionTransformer", signature=QWEN),
    "model_executor/models/qwen2_5_vl": TOWER.format(cls="Qwen2_5_VisionTransformer", signature=NORMED),
    "model_executor/models/qwen3_vl": TOWER.format(cls="Qwen3_VisionTransformer", signature=NORMED),
    "model_executor/models/qwen3_5": "from .qwen3_vl import Qwen3_VisionTransformer\n",
    "model_executor/models/glm4_1v": TOWER.format(cls="Glm4vVisionTransformer", signature=f"text_config, {NORMED}"),
    "model_executor/models/glm_ocr": (
        "from .glm4_1v import Glm4vVisionTransformer\n\nclass GlmOcrVisionTransformer(Glm4vVisionTransformer): pass\n"
    ),
    "model_executor/models/moonvit": TOWER.format(
        cls="MoonVitPretrainedModel", signature="config, prefix='', *inputs, **kwargs"
    ),
    "model_executor/models/kimi_k25_vit": TOWER.format(
        cls="MoonViT3dPretrainedModel", signature="config, quant_config=None, input_norm=None, prefix=''"
    ),
}


def write(folder: Path) -> None:
    """The package, as files below a folder: the plug-in watches imports."""
    from textwrap import dedent

    for name, text in FILES.items():
        path = folder / "vllm" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
    for inner in (folder / "vllm").rglob("*.py"):
        (inner.parent / "__init__.py").touch()
    for package in ("vllm", "vllm/model_executor"):
        (folder / package / "__init__.py").touch()
