"""Tiny mixture-of-experts models, and adapter files as transformers 4 would have written them for these."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import save_file
from torch import Tensor, nn

from tests import tiny

SIZES = {**tiny.SIZES, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0}
MOE = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
DEEPSEEK = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
CONFIGS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: tf.MixtralConfig(**SIZES, num_local_experts=4),
    "qwen2-moe": lambda: tf.Qwen2MoeConfig(**SIZES, **MOE, num_experts=4, shared_expert_intermediate_size=16),
    "qwen3-moe": lambda: tf.Qwen3MoeConfig(**SIZES, **MOE, num_experts=4),
    "olmoe": lambda: tf.OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    "deepseek-v3": lambda: tf.DeepseekV3Config(**{**SIZES, **DEEPSEEK, **LATENT, "head_dim": 4}, **MOE),
    "glm4-moe": lambda: tf.Glm4MoeConfig(**{**SIZES, **DEEPSEEK}, **MOE),
    "phi-moe": lambda: tf.PhimoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "llama4": lambda: tf.Llama4TextConfig(**SIZES, intermediate_size_mlp=64, num_local_experts=4),
    "gpt-oss": lambda: tf.GptOssConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, rope_parameters={"rope_type": "default"}
    ),
}
PREFIX = "base_model.model."


def make(name: str) -> Any:
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()


def expert_maps(base: Any, names: tuple[str, ...], block: str = "mlp") -> dict[str, Tensor]:
    """`{path in transformers 4: weight}`, views of the base's parameters, of experts' gate, up and down maps by these names."""
    maps = {}
    for layer, module in enumerate(base.model.layers):
        experts = getattr(module.mlp, "experts", None)
        for expert in range(len(experts.gate_up_proj) if experts is not None else 0):
            weights = (*experts.gate_up_proj[expert].chunk(2), experts.down_proj[expert])
            path = f"model.layers.{layer}.{block}.experts.{expert}"
            maps |= {f"{path}.{name}": weight for name, weight in zip(names, weights)}
    return maps


def factors(weights: dict[str, Tensor], rank: Callable[[str], int] = lambda path: 4) -> dict[str, Tensor]:
    """A file's tensors: random factors for each of these weights."""
    generator = torch.Generator().manual_seed(1)
    held = {}
    for path, weight in weights.items():
        out, inner = weight.shape
        held[f"{PREFIX}{path}.lora_A.weight"] = torch.randn(rank(path), inner, generator=generator) * 0.3
        held[f"{PREFIX}{path}.lora_B.weight"] = torch.randn(out, rank(path), generator=generator) * 0.3
    return held


@torch.no_grad()
def change(weights: dict[str, Tensor], held: dict[str, Tensor], scale: Callable[[str], float] = lambda path: 2.0) -> None:
    """Put the changes into the weights themselves."""
    for path, weight in weights.items():
        if f"{PREFIX}{path}.lora_A.weight" in held:
            weight += scale(path) * held[f"{PREFIX}{path}.lora_B.weight"] @ held[f"{PREFIX}{path}.lora_A.weight"]


def write(folder: Path, held: dict[str, Tensor], **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(held, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "inference_mode": True, **fields}
    if config["peft_type"] == "LORA":
        config = {"lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def weight_of(base: nn.Module, path: str) -> Tensor:
    weight: Tensor = base.get_submodule(path).weight.detach()
    return weight
