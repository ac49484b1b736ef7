"""Tiny bases of many families in float64, without dropout, so that training mode computes what evaluation does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from tests import tiny


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class OwnModel(nn.Module):
    """A model that is not of transformers, with a list, a sequence and a dictionary of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(tiny.VOCAB, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.tail = nn.Sequential(Block(), nn.LayerNorm(16))
        self.heads = nn.ModuleDict({"words": nn.Linear(16, tiny.VOCAB), "classes": nn.Linear(16, 3)})

    def features(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.tail(x)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        features = self.features(input_ids)
        return {"logits": self.heads["words"](features), "classes": self.heads["classes"](features.mean(1))}


class SharedModel(nn.Module):
    """One module under two names, and an output that reads the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(tiny.VOCAB, 16)
        self.first = self.second = Block()
        self.head = nn.Linear(16, tiny.VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.second(torch.tanh(self.first(self.embed(input_ids)))))}


class ConvNet(nn.Module):
    """Convolutions; its batch norms keep their statistics as they are (`momentum=0`)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=0.0), nn.Tanh())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, momentum=0.0), nn.Tanh())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.body(self.stem(x)).mean((2, 3)))}


@dataclass(frozen=True)
class Family:
    """A base, and what the configurations of adapters must know of it.

    Args:
        inputs: of its forward.
        linears: names of the linear maps or convolutions that are adapted.
        feedforward: those of `linears` whose inputs IA3 scales.
        norms, blocks, embedding, head: names of the modules of that kind, if it has them.
        experts: names of parameters that hold the fused weights of experts.
        task: the task type of a configuration, None for models that are not of transformers.
    """

    make: Callable[[], nn.Module]
    linears: list[str]
    feedforward: list[str]
    norms: list[str]
    task: str | None = "CAUSAL_LM"
    blocks: list[str] = field(default_factory=list)
    embedding: str | None = None
    head: str | None = None
    experts: list[str] = field(default_factory=list)
    inputs: Callable[[], dict[str, Tensor]] = lambda: tiny.inputs_for("llama")

    @property
    def generates(self) -> bool:
        return self.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM")

    @property
    def classifies(self) -> bool:
        return self.task in ("SEQ_CLS", "TOKEN_CLS")

    @property
    def convolutional(self) -> bool:
        return self.embedding is None


def base_of(family: str) -> nn.Module:
    """The family's base with seeded weights."""
    torch.manual_seed(0)
    model = FAMILIES[family].make().double().eval()
    if isinstance(model, tf.PreTrainedModel):
        model.config.use_cache = False  # a layer called twice with one cache would find its own keys in it
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "dropout_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.LayerNorm):  # ones and zeros would hide what acts on them
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def _own_ids() -> dict[str, Tensor]:
    return {"input_ids": tiny.inputs_for("llama")["input_ids"]}


def _of_tiny(name: str, **facts: Any) -> Family:
    """A family that `tests/tiny.py` makes."""
    inputs = facts.pop("inputs", lambda: tiny.inputs_for(name))
    return Family(make=tiny.MODELS[name][0], task=tiny.task_of(name), inputs=inputs, **facts)


_LLAMA: dict[str, Any] = {
    "linears": ["q_proj", "v_proj", "down_proj"], "feedforward": ["down_proj"], "norms": ["input_layernorm", "norm"],
    "blocks": ["self_attn", "mlp"], "embedding": "embed_tokens", "head": "lm_head",
}  # fmt: skip
_BERT: dict[str, Any] = {
    "linears": ["query", "value", "output.dense"], "feedforward": ["output.dense"], "norms": ["LayerNorm"],
    "embedding": "word_embeddings", "head": "classifier",
}  # fmt: skip
_T5: dict[str, Any] = {
    "linears": ["q", "v", "wo"], "feedforward": ["wo"], "norms": ["layer_norm"], "embedding": "shared", "head": "lm_head",
}  # fmt: skip
_OWN: dict[str, Any] = {
    "linears": ["up", "down"], "feedforward": ["down"], "norms": ["norm"], "embedding": "embed",
    "task": None, "inputs": _own_ids,
}  # fmt: skip
_SIZES: dict[str, Any] = {**tiny.SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}


def _mixtral() -> nn.Module:
    config = tf.MixtralConfig(**_SIZES, num_local_experts=3, num_experts_per_tok=2)
    config._experts_implementation = "eager"  # the grouped product has no float64
    return tf.MixtralForCausalLM(config)


def _gemma3() -> nn.Module:
    """Embeddings are scaled where they are looked up, and tied to the head, which does not scale."""
    ids = {"bos_token_id": 2, "eos_token_id": 1}
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_SIZES, **ids, head_dim=8, sliding_window=8))


FAMILIES: dict[str, Family] = {
    "own": Family(make=OwnModel, head="words", **_OWN),
    "shared": Family(make=SharedModel, head="head", **_OWN),
    "conv": Family(
        make=ConvNet, linears=["stem.0", "body.0", "head"], feedforward=["body.0"], norms=[], task=None, head="head",
        inputs=lambda: {"x": torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))},
    ),
    "llama": _of_tiny("llama", **_LLAMA),
    "llama-tied": Family(make=lambda: tf.LlamaForCausalLM(tiny._llama_config(tie_word_embeddings=True)), **_LLAMA),
    "llama-classifier": _of_tiny("llama-classifier", **{**_LLAMA, "head": "score"}),
    "gpt2": _of_tiny(
        "gpt2", linears=["c_attn", "mlp.c_proj"], feedforward=["mlp.c_proj"], norms=["ln_1", "ln_f"], blocks=["attn", "mlp"],
        embedding="wte", head="lm_head",
    ),
    "bloom": _of_tiny(
        "bloom", linears=["query_key_value", "dense_4h_to_h"], feedforward=["dense_4h_to_h"], norms=["input_layernorm", "ln_f"],
        blocks=["self_attention", "mlp"], embedding="word_embeddings", head="lm_head",
    ),
    "opt": _of_tiny(
        "opt", linears=["q_proj", "v_proj", "fc2"], feedforward=["fc2"], norms=["final_layer_norm"], embedding="embed_tokens",
        head="lm_head",
    ),
    "t5": _of_tiny("t5", **_T5),
    "t5-untied": Family(
        make=lambda: tf.T5ForConditionalGeneration(tf.T5Config(**tiny.T5_SIZES, tie_word_embeddings=False)),
        task="SEQ_2_SEQ_LM", inputs=lambda: tiny.inputs_for("t5"), **_T5,
    ),
    "bert-classifier": _of_tiny("bert-classifier", **_BERT),
    "bert-tagger": _of_tiny("bert-tagger", **_BERT),
    "mixtral": Family(
        make=_mixtral, experts=["experts.gate_up_proj", "experts.down_proj"],
        **{**_LLAMA, "linears": ["q_proj", "v_proj"], "feedforward": ["v_proj"]},
    ),
    "gemma3": Family(make=_gemma3, **_LLAMA),
}  # fmt: skip
