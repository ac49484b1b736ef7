"""Handles of every method and of the options that choose other computations, with random values that matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import tunesmith as ts
from tests.reach.models import FAMILIES, Family, base_of
from tunesmith import PeftModel, get_peft_model

LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}


def _lora(**fields: Any) -> Callable[[Family], ts.PeftConfig]:
    return lambda family: ts.LoraConfig(task_type=family.task, **{**LORA, "target_modules": family.linears, **fields})


def _plain(config: type[ts.PeftConfig], **fields: Any) -> Callable[[Family], ts.PeftConfig]:
    return lambda family: config(task_type=family.task, target_modules=family.linears, **fields)


def _prompts(config: type[ts.PeftConfig], **fields: Any) -> Callable[[Family], ts.PeftConfig]:
    return lambda family: config(task_type=family.task, num_virtual_tokens=3, **fields)


def _with_the_head(family: Family) -> ts.PeftConfig:
    return ts.LoraConfig(task_type=family.task, **LORA, target_modules=[*family.linears, family.head])


def _with_a_copy_of_the_head(family: Family) -> ts.PeftConfig:
    others = [name for name in family.linears if name != family.head]
    return ts.LoraConfig(task_type=family.task, **LORA, target_modules=others, modules_to_save=[family.head])


def _with_the_embedding(family: Family) -> ts.PeftConfig:
    return ts.LoraConfig(task_type=family.task, **LORA, target_modules=[*family.linears, family.embedding])


def _seen(family: Family) -> list[int]:
    """Tokens that each row ends with, so that training them changes the last position."""
    return family.inputs()["input_ids"][:, -2:].flatten().unique().tolist()


def _with_tokens(family: Family) -> ts.PeftConfig:
    tokens = {family.embedding: _seen(family)}
    return ts.LoraConfig(task_type=family.task, **LORA, target_modules=family.linears, trainable_token_indices=tokens)


def _on_experts(family: Family) -> ts.PeftConfig:
    return ts.LoraConfig(task_type=family.task, **LORA, target_modules=family.linears, target_parameters=family.experts)


def _ia3(family: Family) -> ts.PeftConfig:
    return ts.IA3Config(task_type=family.task, target_modules=family.linears, feedforward_modules=family.feedforward)


def _tokens(family: Family) -> ts.PeftConfig:
    return ts.TrainableTokensConfig(task_type=family.task, token_indices=_seen(family), target_modules=family.embedding)


MERGEABLE: dict[str, Callable[[Family], ts.PeftConfig]] = {
    "lora": _lora(),
    "lora, rslora": _lora(use_rslora=True),
    "lora, dora": _lora(use_dora=True),
    "lora, bias": _lora(lora_bias=True),
    "lora, biases of its modules": _lora(bias="lora_only"),
    "lora, all biases": _lora(bias="all"),
    "lora, pissa": _lora(init_lora_weights="pissa"),
    "lora, olora": _lora(init_lora_weights="olora"),
    "lora, all-linear": _lora(target_modules="all-linear"),
    "lora, head": _with_the_head,
    "lora, copied head": _with_a_copy_of_the_head,
    "lora, embedding": _with_the_embedding,
    "lora, tokens": _with_tokens,
    "lora, experts": _on_experts,
    "ia3": _ia3,
    "loha": _plain(ts.LoHaConfig, r=4),
    "lokr": _plain(ts.LoKrConfig, r=4),
    "adalora": _plain(ts.AdaLoraConfig, total_step=10),
    "oft": _plain(ts.OFTConfig, oft_block_size=4),
    "boft": _plain(ts.BOFTConfig, boft_block_size=4),
    "vera": _plain(ts.VeraConfig, r=4),
    "hra": _plain(ts.HRAConfig, r=4),
    "layer norms": lambda family: ts.LNTuningConfig(task_type=family.task, target_modules=family.norms),
    "biases": _plain(ts.BitFitConfig),
    "trainable tokens": _tokens,
}
ON_BLOCKS = {"bottleneck": lambda family: ts.BottleneckConfig(task_type=family.task, target_modules=family.blocks)}
ADAPTION_PROMPT = {
    "adaption prompt": lambda family: ts.AdaptionPromptConfig(task_type=family.task, adapter_len=3, adapter_layers=2)
}
PREFIX = {"prefix": _prompts(ts.PrefixTuningConfig)}
VIRTUAL_TOKENS = {
    "prompt": _prompts(ts.PromptTuningConfig),
    "p-tuning": _prompts(ts.PromptEncoderConfig, encoder_hidden_size=12),
}
UNMERGEABLE = ON_BLOCKS | ADAPTION_PROMPT | PREFIX | VIRTUAL_TOKENS

# What is made of several adapters, or of none, beside the configurations above.
TWO, OFF, SELECTED = "two at once", "switched off", "the second of two"
COMBINED = (TWO, OFF, SELECTED)
METHODS = [*MERGEABLE, *COMBINED, *UNMERGEABLE]

LINEAR_ONLY = {"lora, pissa", "lora, olora", "lora, bias", "adalora", "vera", "hra", "boft", "biases"}
TRAINS_BIASES = {"biases", "lora, bias", "lora, biases of its modules"}
WITHOUT_BIASES = {"llama", "llama-tied", "llama-classifier", "mixtral", "gemma3", "t5", "t5-untied"}
TIED = {"shared", "llama-tied", "gpt2", "bloom", "opt", "t5", "gemma3"}
WITH_PREFIXES = {"llama", "llama-classifier", "gpt2", "bloom", "opt", "t5", "bert-tagger"}
WITH_VIRTUAL_TOKENS = WITH_PREFIXES | {"llama-tied", "mixtral", "gemma3", "bert-classifier"}


def fits(method: str, name: str) -> bool:
    """Whether the family has what the method needs."""
    family = FAMILIES[name]
    if method in VIRTUAL_TOKENS:
        return name in WITH_VIRTUAL_TOKENS
    if method in PREFIX:
        return name in WITH_PREFIXES
    if method in ADAPTION_PROMPT:
        return name in ("llama", "llama-tied")
    if method in ON_BLOCKS:
        return bool(family.blocks)
    if method == "lora, experts":
        return bool(family.experts)
    if method == "layer norms":
        return bool(family.norms)
    if method in TRAINS_BIASES and name in WITHOUT_BIASES:
        return False
    if method in ("lora, head", TWO) and family.classifies:
        return False  # heads of classifiers are trained whole by themselves
    if method in ("lora, head", "lora, copied head"):
        return name not in TIED  # for those, tests/attach/test_plan.py says what is refused
    if method == "lora, embedding" and name.startswith("t5"):
        return False  # T5 looks tokens up in other modules that share the weight
    if method in LINEAR_ONLY | {"lora, embedding", "lora, tokens", "trainable tokens"}:
        return not family.convolutional
    return True


PAIRS = [(family, method) for family in FAMILIES for method in METHODS if fits(method, family)]
MERGED_PAIRS = [(family, method) for family, method in PAIRS if method not in UNMERGEABLE]


def handle_and_base(method: str, name: str) -> tuple[PeftModel, nn.Module]:
    """The family's base with this method's adapter on it, and the bare base; equal arguments give equal values."""
    base, family = base_of(name), FAMILIES[name]
    torch.manual_seed(1)
    config = {**MERGEABLE, **UNMERGEABLE}.get(method, MERGEABLE["lora"])(family)
    handle = get_peft_model(base, config)
    if method in (TWO, SELECTED):
        handle.add_adapter("second", MERGEABLE["ia3" if method == SELECTED else "lora, rslora"](family))
        handle.set_adapter(["default", "second"] if method == TWO else "second")
    with torch.no_grad():
        for parameter in handle.adapters.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    if method == OFF:
        handle.disable_adapters()
    return handle.eval(), base
