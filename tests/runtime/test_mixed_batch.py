"""Mixed batches: every row equals a run of its own adapter alone, in values and gradients, whatever the methods."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import tiny
from tests.handles import lora, out
from tests.methods.test_contract import COMBINATIONS, LAYERS, METHODS, make_config
from tunesmith import (
    AdapterNameError,
    AdaptionPromptConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    UsageError,
    get_peft_model,
)
from tunesmith.runtime.frame import current_frame

ROWS = ["first", "__base__", "second", "first", "second"]


def handle_with(configs: dict, name: str, dtype: torch.dtype = torch.float64):
    """A handle with an adapter for each config, every tensor of them random."""
    torch.manual_seed(3)
    base = tiny.make(name).to(dtype)
    handle = get_peft_model(base, next(iter(configs.values())), adapter_name=next(iter(configs)))
    for adapter, config in list(configs.items())[1:]:
        handle.add_adapter(adapter, config)
    with torch.no_grad():
        for parameter in handle.adapters.parameters():
            parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
    return handle.eval()


def alone(handle, inputs: dict, row: int, name: str):
    """The row's own output under its adapter alone."""
    inputs = {key: value[row : row + 1] for key, value in inputs.items()}
    if name == "__base__":
        with handle.disable_adapter():
            return tiny.main_output(handle(**inputs))
    handle.set_adapter(name)
    return tiny.main_output(handle(**inputs))


def assert_rows_are_alone(handle, inputs: dict, names: list[str]) -> None:
    """Mixed values and gradients equal those of single-adapter runs, row by row."""
    handle.set_adapter(sorted(set(names) - {"__base__"}))
    parameters = {n: p for n, p in handle.adapters.named_parameters() if p.requires_grad}
    mixed = tiny.main_output(handle(**inputs, adapter_names=names))
    weights = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(5), dtype=mixed.dtype)
    found = torch.autograd.grad((mixed * weights).sum(), list(parameters.values()), allow_unused=True, materialize_grads=True)
    singles = [alone(handle, inputs, row, name) for row, name in enumerate(names)]
    for row, single in enumerate(singles):
        torch.testing.assert_close(mixed[row : row + 1], single, rtol=1e-6, atol=1e-6)
    total: dict[str, torch.Tensor] = {}
    for row, name in enumerate(names):
        if name == "__base__":
            continue
        own = {n: p for n, p in parameters.items() if n.startswith(f"{name}.")}
        for p in own.values():
            p.requires_grad_(True)
        loss = (alone(handle, inputs, row, name) * weights[row : row + 1]).sum()
        for n, gradient in zip(own, torch.autograd.grad(loss, list(own.values()), allow_unused=True, materialize_grads=True)):
            total[n] = total.get(n, 0) + gradient
    scale = max(gradient.abs().max().item() for gradient in total.values())  # some are zero in exact arithmetic
    for n, gradient in zip(parameters, found):
        torch.testing.assert_close(gradient, total[n], rtol=1e-5, atol=1e-7 * scale, msg=n)


@pytest.mark.each_value_once
@pytest.mark.parametrize(("method", "layer"), COMBINATIONS)
def test_rows_of_one_method_equal_single_runs(method, layer):
    name = LAYERS[layer][0]
    handle = handle_with({"first": make_config(method, layer), "second": make_config(method, layer)}, name)
    assert_rows_are_alone(handle, tiny.inputs_for(name, rows=len(ROWS)), ROWS)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_rows_of_different_methods_on_different_modules_equal_single_runs(name):
    """LoRA of the attention beside IA3 of other modules; each row goes through sites that do not concern it."""
    task = tiny.task_of(name)
    configs = {
        "first": METHODS["LORA"](task_type=task, target_modules="all-linear", r=3),
        "second": METHODS["IA3"](task_type=task),
    }
    handle = handle_with(configs, name)
    assert_rows_are_alone(handle, tiny.inputs_for(name, rows=len(ROWS)), ROWS)


def test_embeddings_tied_heads_and_positions_that_all_rows_share():
    configs = {
        "first": LoraConfig(task_type="CAUSAL_LM", target_modules=["wte", "wpe", "c_attn"]),
        "second": LoraConfig(task_type="CAUSAL_LM", target_modules=["wpe"]),
    }
    assert_rows_are_alone(handle_with(configs, "gpt2"), tiny.inputs_for("gpt2", rows=len(ROWS)), ROWS)


def test_private_heads_and_biases():
    configs = {
        "first": LoraConfig(task_type="SEQ_CLS", bias="all"),
        "second": LoraConfig(task_type="SEQ_CLS", modules_to_save=["pooler"]),
    }
    assert_rows_are_alone(handle_with(configs, "bert-classifier"), tiny.inputs_for("bert-classifier", rows=len(ROWS)), ROWS)


@pytest.mark.each_value_once
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": False}, {"num_beams": 2, "num_return_sequences": 2}], ids=str
)
@pytest.mark.parametrize("name", ["llama", "opt", "t5"])
def test_generation_of_mixed_rows_equals_that_of_each_row_alone(name, options):
    targets = {"llama": ["q_proj", "down_proj"], "opt": ["k_proj", "fc1"], "t5": ["q", "wo"]}[name]
    task = tiny.task_of(name)
    configs = {
        "first": LoraConfig(task_type=task, target_modules=targets, lora_alpha=64),
        "second": METHODS["IA3"](task_type=task),
    }
    handle = handle_with(configs, name)
    inputs = {key: value for key, value in tiny.inputs_for(name, rows=len(ROWS)).items() if not key.startswith("decoder")}
    common = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0, **options}
    mixed = handle.generate(**inputs, adapter_names=ROWS, **common)
    copies = options.get("num_return_sequences", 1)
    for row, adapter in enumerate(ROWS):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        if adapter == "__base__":
            with handle.disable_adapter():
                expected = handle.generate(**own, **common)
        else:
            handle.set_adapter(adapter)
            expected = handle.generate(**own, **common)
        assert torch.equal(mixed[row * copies : (row + 1) * copies], expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_recomputes_the_mixture(reentrant):
    configs = {"first": LoraConfig(task_type="CAUSAL_LM"), "second": METHODS["IA3"](task_type="CAUSAL_LM")}
    handle, inputs = handle_with(configs, "llama"), tiny.inputs_for("llama", rows=len(ROWS))
    handle.set_adapter(["first", "second"])
    handle.train()

    def gradients() -> list:
        handle.zero_grad()
        handle(**inputs, labels=inputs["input_ids"], adapter_names=ROWS).loss.backward()
        return [p.grad.clone() for p in handle.adapters.parameters()]

    expected = gradients()
    handle.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for found, wanted in zip(gradients(), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_all_rows_alike_is_the_plain_path_bit_for_bit(llama, llama_inputs):
    handle = lora(llama).eval()
    assert torch.equal(handle(**llama_inputs, adapter_names=["default"] * 2).logits, handle(**llama_inputs).logits)
    with handle.disable_adapter():
        plain = handle(**llama_inputs).logits
        assert torch.equal(handle(**llama_inputs, adapter_names=["default", "__base__"]).logits, plain)
    assert torch.equal(handle(**llama_inputs, adapter_names=["__base__"] * 2).logits, plain)


def test_only_the_rows_own_adapters_that_train_get_gradients(llama, llama_inputs):
    handle = lora(llama, adapter_name="first").train()
    handle.add_adapter("second", LoraConfig(init_lora_weights=False))
    handle.set_adapter("first")
    handle(**llama_inputs, labels=llama_inputs["input_ids"], adapter_names=["first", "second"]).loss.backward()
    assert all(p.grad is not None for p in handle.tree("first").parameters())
    assert all(p.grad is None for p in handle.tree("second").parameters())


def test_faults_are_named_and_leave_nothing_behind(llama, llama_inputs):
    handle = lora(llama).eval()
    expected = out(handle, llama_inputs)
    for call in (handle, handle.generate):
        with pytest.raises(UsageError, match="3 names for 2 rows"):
            call(**llama_inputs, adapter_names=["default"] * 3)
        with pytest.raises(AdapterNameError, match="defualt"):
            call(**llama_inputs, adapter_names=["defualt", "__base__"])
    handle.merge_adapter()
    with pytest.raises(UsageError, match="unmerge_adapter"):
        handle(**llama_inputs, adapter_names=["default", "__base__"])
    handle.unmerge_adapter()
    with pytest.raises(IndexError):  # from inside the base
        handle(input_ids=torch.full((2, 4), 10**6), adapter_names=["default", "__base__"])
    assert current_frame() is None
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in llama.modules())
    assert torch.equal(out(handle, llama_inputs), expected)


PROMPTS = {
    "prompt": lambda task, n: PromptTuningConfig(task_type=task, num_virtual_tokens=n),
    "p-tuning": lambda task, n: PromptEncoderConfig(task_type=task, num_virtual_tokens=n, encoder_hidden_size=8),
    "prefix": lambda task, n: PrefixTuningConfig(task_type=task, num_virtual_tokens=n),
    "projected prefix": lambda task, n: PrefixTuningConfig(
        task_type=task, num_virtual_tokens=n, prefix_projection=True, encoder_hidden_size=8
    ),
}


def trimmed(handle, inputs, names):
    """Outputs without what stands for virtual tokens (in front of a mixed batch there is the longest row's padding)."""
    length = inputs["input_ids"].shape[1]
    output = tiny.main_output(handle(**inputs, **({} if names is None else {"adapter_names": names})))
    return output[:, -length:] if output.dim() == 3 and output.shape[1] >= length else output


def assert_prompt_rows_are_alone(handle, inputs: dict, names: list[str]) -> None:
    """As `assert_rows_are_alone`, for adapters that lengthen their rows."""
    mixed = trimmed(handle, inputs, names)
    weights = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(5), dtype=mixed.dtype)
    trained = list(handle.adapters.parameters())
    for p in trained:
        p.requires_grad_(True)
    found = torch.autograd.grad(
        (trimmed(handle, inputs, names) * weights).sum(), trained, materialize_grads=True, allow_unused=True
    )
    total = [torch.zeros_like(p) for p in trained]
    for row, name in enumerate(names):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        single = trimmed(handle, own, [name])
        torch.testing.assert_close(mixed[row : row + 1], single, rtol=1e-5, atol=1e-5)
        if name != "__base__":
            loss = (single * weights[row : row + 1]).sum()
            parts = torch.autograd.grad(loss, trained, materialize_grads=True, allow_unused=True)
            total = [sum_ + part for sum_, part in zip(total, parts)]
    scale = max(gradient.abs().max().item() for gradient in total)
    for gradient, expected in zip(found, total):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.each_value_once
@pytest.mark.parametrize("second", PROMPTS)
@pytest.mark.parametrize("first", PROMPTS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "opt"])
def test_rows_with_different_prompts_of_different_lengths(name, first, second):
    """Virtual tokens, prefixes and none at all in one batch. (Bloom itself gives NaN in float64 where a row is padded.)"""
    configs = {"first": PROMPTS[first]("CAUSAL_LM", 3), "second": PROMPTS[second]("CAUSAL_LM", 5)}
    handle = handle_with(configs, name, torch.float32 if name == "bloom" else torch.float64)
    inputs = tiny.inputs_for(name, rows=len(ROWS))
    assert_prompt_rows_are_alone(handle, inputs, ROWS)


@pytest.mark.each_value_once
@pytest.mark.parametrize("name", ["t5", "bert-classifier", "bert-tagger", "llama-classifier", "bert-features"])
@pytest.mark.parametrize("first", ["prompt", "prefix"])
def test_rows_with_and_without_prompts_for_every_task(name, first):
    task = tiny.task_of(name)
    handle = handle_with({"first": PROMPTS[first](task, 3), "second": LoraConfig(task_type=task, r=3)}, name)
    if name == "bert-features" and first == "prompt":  # pooled from the first position, which some rows lack
        with pytest.raises(UsageError, match="pools each row's first position"):
            trimmed(handle, tiny.inputs_for(name, rows=len(ROWS)), ROWS)
        return
    assert_prompt_rows_are_alone(handle, tiny.inputs_for(name, rows=len(ROWS)), ROWS)


@pytest.mark.each_value_once
@pytest.mark.parametrize("first", ["prompt", "prefix"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": False}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation_of_rows_with_and_without_prompts(name, options, first):
    task = tiny.task_of(name)
    handle = handle_with({"first": PROMPTS[first](task, 3), "second": LoraConfig(task_type=task, lora_alpha=64)}, name)
    inputs = {key: value for key, value in tiny.inputs_for(name, rows=len(ROWS)).items() if not key.startswith("decoder")}
    common = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0, **options}
    mixed = handle.generate(**inputs, adapter_names=ROWS, **common)
    for row, adapter in enumerate(ROWS):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        assert torch.equal(mixed[row : row + 1], handle.generate(**own, adapter_names=[adapter], **common))


@pytest.mark.parametrize("reentrant", [True, False])
def test_prefixes_of_mixed_rows_under_gradient_checkpointing(reentrant):
    handle = handle_with({"first": PROMPTS["prefix"]("CAUSAL_LM", 3), "second": PROMPTS["prefix"]("CAUSAL_LM", 5)}, "llama")
    inputs = tiny.inputs_for("llama", rows=len(ROWS))
    handle.set_adapter(["first"])
    handle.tree("second").requires_grad_(True)
    handle.train()

    def gradients() -> list:
        handle.zero_grad()
        handle(**inputs, labels=inputs["input_ids"], adapter_names=ROWS).loss.backward()
        return [p.grad.clone() for p in handle.adapters.parameters()]

    expected = gradients()
    handle.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for found, wanted in zip(gradients(), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_bottlenecks_beside_lora_in_one_batch_with_a_cache():
    configs = {
        "first": LoraConfig(task_type="CAUSAL_LM", lora_alpha=64),
        "second": AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2),
    }
    handle = handle_with(configs, "llama")
    inputs = tiny.inputs_for("llama", rows=len(ROWS))
    assert_prompt_rows_are_alone(handle, inputs, ROWS)
    common = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    mixed = handle.generate(**inputs, adapter_names=ROWS, **common)
    for row, adapter in enumerate(ROWS):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        assert torch.equal(mixed[row : row + 1], handle.generate(**own, adapter_names=[adapter], **common))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        return self.experts[0](x[:2]) + self.experts[1](x[2:])


def test_lists_of_experts_are_refused_since_their_tokens_are_of_no_known_row():
    handle = get_peft_model(Experts(), LoraConfig(target_modules=["experts.0", "experts.1"]))
    with pytest.raises(UsageError, match=r"experts\.0"):
        handle(torch.randn(4, 4), adapter_names=["default", "__base__", "default", "__base__"])


def test_an_input_that_is_no_multiple_of_the_rows_is_refused():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x[1:])

    handle = get_peft_model(Odd(), LoraConfig(target_modules=["linear"]))
    with pytest.raises(UsageError, match=r"\(3, 4\), which cannot be split into 4 rows"):
        handle(torch.randn(4, 4), adapter_names=["default", "__base__", "default", "__base__"])
