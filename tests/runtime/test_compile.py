"""Any number of handles compile into the graphs of one, and the compiled code computes the same (the one idea)."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from tests import tiny
from tests.handles import lora, out, prefixed, prompted


@pytest.fixture
def llama():
    """One layer is enough: compiling takes most of the time of these tests."""
    torch.manual_seed(0)
    return tiny.tf.LlamaForCausalLM(tiny._llama_config(num_hidden_layers=1)).eval()


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_twelve_handles_and_the_bare_base_compile_into_two_full_graphs(llama, llama_inputs):
    models = [lora(llama, seed, target_modules=["q_proj", "down_proj"]) for seed in range(12)] + [llama]
    expected = [out(model, llama_inputs) for model in models]
    compiled = [torch.compile(model, fullgraph=True, backend="eager") for model in models]
    for _ in range(2):
        for model, result in zip(compiled, expected):
            assert torch.equal(out(model, llama_inputs), result)
    assert counters["stats"]["unique_graphs"] <= 2, counters["stats"]
    assert not counters["graph_break"]


def test_switching_and_disabling_reuse_compiled_graphs(llama, llama_inputs):
    handle = lora(llama, 1)
    for seed in range(2, 6):
        torch.manual_seed(seed)
        handle.add_adapter(f"a{seed}", handle.peft_config["default"])
    compiled = torch.compile(handle, fullgraph=True, backend="eager")
    for _ in range(2):
        for name in handle.peft_config:
            handle.set_adapter(name)
            assert torch.equal(out(compiled, llama_inputs), out(handle, llama_inputs))
        with handle.disable_adapter():
            assert torch.equal(out(compiled, llama_inputs), out(llama, llama_inputs))
    assert counters["stats"]["unique_graphs"] <= 2, counters["stats"]


@pytest.mark.parametrize("maker", [prompted, prefixed])
def test_prompts_and_prefixes_compile_whole(maker, llama, llama_inputs):
    handles = [maker(llama, seed) for seed in range(4)]
    for handle in handles:
        compiled = torch.compile(handle, fullgraph=True, backend="eager")
        torch.testing.assert_close(out(compiled, llama_inputs), out(handle, llama_inputs), rtol=0, atol=0)
    assert counters["stats"]["unique_graphs"] <= 1, counters["stats"]


def test_a_compiled_training_step_gives_the_same_gradients(llama, llama_inputs):
    handle = lora(llama).train()
    labels = llama_inputs["input_ids"]

    def step(model):
        handle.zero_grad()
        model(**llama_inputs, labels=labels).loss.backward()
        return [p.grad.clone() for p in handle.adapters.parameters()]

    expected = step(handle)
    found = step(torch.compile(handle, fullgraph=True, backend="aot_eager"))
    for gradient, reference in zip(found, expected):
        torch.testing.assert_close(gradient, reference)


def test_checkpointed_layers_compile_with_their_adapters(llama, llama_inputs):
    handle = lora(llama).train()
    labels = llama_inputs["input_ids"]
    handle(**llama_inputs, labels=labels).loss.backward()
    expected = [p.grad.clone() for p in handle.adapters.parameters()]
    handle.zero_grad()
    tiny.enable_recomputing(handle, {"use_reentrant": False})
    torch.compile(handle, backend="aot_eager")(**llama_inputs, labels=labels).loss.backward()
    for parameter, gradient in zip(handle.adapters.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)


def test_generation_with_a_compiled_forward(llama):
    """What static caches do: the base's own forward, compiled, called inside `generate`."""
    ids = tiny.inputs_for("llama")["input_ids"]
    handle = lora(llama, 1)
    expected = handle.generate(ids, max_new_tokens=2, do_sample=False)
    plain = llama.generate(ids, max_new_tokens=2, do_sample=False)
    llama.forward = torch.compile(llama.forward, backend="eager", dynamic=True)
    try:
        assert torch.equal(handle.generate(ids, max_new_tokens=2, do_sample=False), expected)
        assert torch.equal(llama.generate(ids, max_new_tokens=2, do_sample=False), plain)
    finally:
        del llama.forward


def test_inductor_gives_the_same_output():
    base = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    handle = lora(base, target_modules=["0", "2"])
    x = torch.randn(3, 8)
    expected = handle(x)
    torch.testing.assert_close(torch.compile(handle, fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.compile(base, fullgraph=True)(x), base(x))


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "loftq"},
        {"lora_bias": True},
        {"bias": "all", "target_modules": ["q_proj"]},
        {"trainable_token_indices": [3, 7]},
        {"target_parameters": ["q_proj.weight"]},
    ],
    ids=str,
)
def test_variants_of_lora_compile_whole(fields):
    base, inputs = tiny.make("opt"), tiny.inputs_for("opt")
    handle = lora(base, **{"init_lora_weights": True, **fields})
    with torch.no_grad():
        for parameter in handle.adapters.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    compiled = torch.compile(handle.eval(), fullgraph=True, backend="eager")
    assert torch.equal(out(compiled, inputs), out(handle, inputs))
    assert not torch.equal(out(handle, inputs), out(base, inputs))
