"""Handles whose adapters act from the start (no zero factors), and what tests measure on them."""

from __future__ import annotations

import torch
from torch import nn

from tests import tiny
from tunesmith import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model


def lora(model: nn.Module, seed: int = 1, adapter_name: str = "default", **fields):
    """A LoRA handle with both factors random; equal seeds give equal adapters."""
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(**{"init_lora_weights": False, "lora_alpha": 32, **fields}), adapter_name)


def prompted(model: nn.Module, seed: int = 1, task: str = "CAUSAL_LM", tokens: int = 3):
    """A prompt-tuning handle; equal seeds give equal virtual tokens."""
    torch.manual_seed(seed)
    return get_peft_model(model, PromptTuningConfig(task_type=task, num_virtual_tokens=tokens))


def prefixed(model: nn.Module, seed: int = 1, task: str = "CAUSAL_LM", tokens: int = 3, **fields):
    """A prefix-tuning handle; equal seeds give equal prefixes."""
    torch.manual_seed(seed)
    return get_peft_model(model, PrefixTuningConfig(task_type=task, num_virtual_tokens=tokens, **fields))


MAKERS = {"lora": lora, "prompt": prompted, "prefix": prefixed}


def out(model: nn.Module, inputs: dict) -> torch.Tensor:
    """The main output, without gradients."""
    with torch.no_grad():
        return tiny.main_output(model(**inputs))


def state(model: nn.Module) -> dict:
    """Everything of a base that no handle may change: names, types, parameter objects and bits."""
    return {
        "modules": {name: type(module) for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.detach().clone()) for name, p in model.named_parameters(remove_duplicate=False)},
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
    }


def assert_same_state(before: dict, after: dict) -> None:
    assert before["modules"] == after["modules"]
    assert before["parameters"].keys() == after["parameters"].keys()
    for name, (identity, value) in before["parameters"].items():
        assert after["parameters"][name][0] == identity, f"{name} is another object"
        assert torch.equal(after["parameters"][name][1], value), f"{name} changed"
    for name, value in before["buffers"].items():
        assert torch.equal(after["buffers"][name], value), f"{name} changed"


def gradients(handle: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in handle.adapters.named_parameters()}


def assert_same_gradients(found: dict, expected: dict, **tolerance) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None, f"{name} has no gradient in the reference run"
        assert found[name] is not None, f"{name} has no gradient"
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
