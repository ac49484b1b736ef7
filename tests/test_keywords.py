"""No public call takes a misspelt keyword for nothing: each is called with one, or its signature has no room for one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import tunesmith as ts
from tests import tiny
from tests.handles import lora

MISSPELT = {"misspelt_keyword": "on"}

# Calls whose keywords are another's, which alone knows them: {the name's ending: whose}.
PASSED_ON = {
    "PeftModel.forward": "the base's forward; transformers' own take any",
    "PeftModel.forward_within": "the base's forward, as above",
    "LinearAdapter.forward": "the adapted module's forward",
    "load_tokenizer": "AutoTokenizer.from_pretrained, which keeps any",
}


@pytest.fixture(scope="module")
def handle(tmp_path_factory) -> ts.PeftModel:
    base = tiny.make("llama")
    base.name_or_path = str(tmp_path_factory.mktemp("base"))
    base.save_pretrained(base.name_or_path)
    return lora(base)


@pytest.fixture(scope="module")
def saved(handle, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    handle.save_pretrained(folder)
    return folder


def _trainer(folder: Path, **keywords: Any) -> ts.Trainer:
    return ts.Trainer(model=lora(tiny.make("llama")), args=_arguments(folder), **keywords)


def _arguments(folder: Path) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True)


# What has room for any keyword in its signature, called as it is meant to be, with one too many.
CALLS: dict[str, Callable[[ts.PeftModel, Path], Any]] = {
    "PeftConfig.from_dict": lambda handle, saved: ts.PeftConfig.from_dict({"peft_type": "LORA"}, **MISSPELT),
    "PeftConfig.from_pretrained": lambda handle, saved: ts.PeftConfig.from_pretrained(saved, **MISSPELT),
    "PeftModel.from_pretrained": lambda handle, saved: ts.PeftModel.from_pretrained(tiny.make("llama"), saved, **MISSPELT),
    "PeftModel.load_adapter": lambda handle, saved: handle.load_adapter(saved, "again", **MISSPELT),
    "PeftModel.generate": lambda handle, saved: handle.generate(torch.tensor([[5, 6]]), max_new_tokens=1, **MISSPELT),
    "PeftModel.resize_token_embeddings": lambda handle, saved: handle.resize_token_embeddings(tiny.VOCAB, **MISSPELT),
    "AutoPeftModel.from_pretrained": lambda handle, saved: ts.AutoPeftModelForCausalLM.from_pretrained(saved, **MISSPELT),
    "AutoPeftModel.__init__": lambda handle, saved: ts.AutoPeftModel(**MISSPELT),
    "AdapterTrainerMixin.train": lambda handle, saved: _trainer(saved).train(**MISSPELT),
    "AdapterTrainerMixin.create_optimizer": lambda handle, saved: _trainer(saved).create_optimizer(**MISSPELT),
    "LoraFAOptimizer.__init__": lambda handle, saved: ts.LoraFAOptimizer(handle.adapters.parameters(), [], **MISSPELT),
    "create_loraplus_optimizer": lambda handle, saved: ts.create_loraplus_optimizer(
        handle, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4.0, **MISSPELT
    ),
    "load_base": lambda handle, saved: ts.load_base("sprout", **MISSPELT),
}


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    """`(name, function)` of what users call; a class's methods under the first class that has them."""
    seen: set[object] = set()
    for name in ts.__all__:
        value = getattr(ts, name)
        found = {name: value} if inspect.isfunction(value) else {}
        if inspect.isclass(value) and not issubclass(value, Enum):
            methods = inspect.getmembers(value, lambda member: inspect.isfunction(member) or inspect.ismethod(member))
            found = {f"{name}.{method}": function for method, function in methods if method == "__init__" or method[0] != "_"}
        for full, function in found.items():
            plain = getattr(function, "__func__", function)
            if plain.__module__.startswith("tunesmith") and plain not in seen:
                seen.add(plain)
                yield f"{plain.__qualname__}" if "." in full else full, plain


def takes_any(function: Callable[..., Any]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def owners(name: str) -> set[str]:
    """The names that a function can have in the tables: a handle's methods are those of `PeftModel`."""
    return {name, f"PeftModel.{name.rpartition('.')[2]}"}


def test_every_public_call_knows_its_keywords():
    loose = [name for name, function in public() if takes_any(function)]
    unknown = [name for name in loose if not owners(name) & {*CALLS, *PASSED_ON}]
    assert not unknown, "these take any keyword: name theirs, or add a call that shows how they refuse others"
    assert len(list(public())) > 100


@pytest.mark.parametrize("name", CALLS)
def test_a_misspelt_keyword_is_an_error(name, handle, saved):
    with pytest.raises((ts.TunesmithError, TypeError, ValueError), match=r"misspelt_keyword|AutoPeftModel cannot be"):
        CALLS[name](handle, saved)


@pytest.mark.parametrize("name", [name for name in ts.__all__ if name.endswith("Config") and name != "PeftConfig"])
def test_a_misspelt_field_of_a_configuration_is_an_error(name):
    with pytest.raises((ts.ConfigError, TypeError), match="misspelt_keyword"):
        getattr(ts, name)(**MISSPELT)


def test_a_base_of_ones_own_refuses_what_its_forward_does_not_know():
    with pytest.raises(TypeError, match="misspelt_keyword"):
        lora(nn.Sequential(nn.Linear(4, 4)), target_modules=["0"])(torch.ones(1, 4), **MISSPELT)


def test_handles_methods_refuse_what_they_do_not_know(handle, tmp_path):
    """Those that once took anything."""
    for call in (
        lambda: handle.save_pretrained(tmp_path, selectd_adapters=["default"]),
        lambda: handle.save_pretrained(tmp_path, push_to_hub=True),
        lambda: handle.add_adapter("second", ts.LoraConfig(), autocast_adapter_dtyp=False),
        lambda: handle.enable_peft_hotswap(target_ranks=4),
        lambda: handle.push_to_hub("me/adapter", privat=True),
        lambda: ts.LoraConfig().save_pretrained(tmp_path, folder="x"),
    ):
        with pytest.raises(TypeError, match="unexpected keyword"):
            call()
