"""Bases that ZeRO's stage 3 has partitioned, emulated: every tensor is empty but for the time of its module's call."""

import sys
import types

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.handles import gradients, lora, out
from tunesmith import (
    AdaLoraConfig,
    BitFitConfig,
    BottleneckConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)  # fmt: skip
from tunesmith.bases.stored_tensors import copied, is_placeholder, shape_of, whole
from tunesmith.errors import UsageError


class Gathered:
    """As `deepspeed.zero.GatheredParameters`."""

    def __init__(self, parameters):
        self.parameters = [p for p in parameters if hasattr(p, "ds_shape") and p.shape != p.ds_shape]

    def __enter__(self):
        for p in self.parameters:
            p.data = p.held

    def __exit__(self, *_):
        for p in self.parameters:
            p.data = torch.empty(0, dtype=p.dtype)


@pytest.fixture(autouse=True)
def deepspeed(monkeypatch):
    package = types.ModuleType("deepspeed")
    package.zero = types.SimpleNamespace(GatheredParameters=Gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", package)


def partitioned(model):
    """Take the values out of a model; hooks put a module's own ones in place for its call, and for its backward pass."""
    for parameter in model.parameters():
        parameter.ds_shape, parameter.held = parameter.shape, parameter.data
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    for module in model.modules():
        own = list(module.parameters(recurse=False))

        def gather(*_, own=own):
            for p in own:
                p.data = p.held

        if own:
            module.register_forward_pre_hook(gather)
    return model


def release(model):
    for parameter in model.parameters():
        if hasattr(parameter, "held"):
            parameter.data = torch.empty(0, dtype=parameter.dtype)


CONFIGS = {
    "lora": ("llama", lambda: LoraConfig(target_modules="all-linear", init_lora_weights=False)),
    "conv1d and embedding": ("gpt2", lambda: LoraConfig(target_modules=["c_attn", "wte"], init_lora_weights=False)),
    "copies and biases": (
        "gpt2", lambda: LoraConfig(target_modules=["c_attn"], bias="all", modules_to_save=["ln_f"], init_lora_weights=False)
    ),
    "dora": ("llama", lambda: LoraConfig(use_dora=True, init_lora_weights=False)),
    "pissa": ("llama", lambda: LoraConfig(init_lora_weights="pissa", r=4)),
    "olora": ("gpt2", lambda: LoraConfig(init_lora_weights="olora", r=4)),
    "loftq": ("llama", lambda: LoraConfig(init_lora_weights="loftq", r=4)),
    "rows": ("llama", lambda: TrainableTokensConfig(token_indices=[5, 13, 25])),
    "bitfit": ("gpt2", lambda: BitFitConfig()),
    "ia3": ("llama", lambda: IA3Config(init_ia3_weights=False)),
    "oft": ("llama", lambda: OFTConfig(oft_block_size=8, init_weights=False)),
    "vera": ("llama", lambda: VeraConfig(r=4)),
    "adalora": ("llama", lambda: AdaLoraConfig(total_step=100, tinit=10, tfinal=10, init_r=4, target_r=2)),
    "bottleneck": ("llama", lambda: BottleneckConfig()),
    "parameters": ("llama", lambda: LoraConfig(target_parameters=["q_proj.weight"], init_lora_weights=False)),
    "prompt": (
        "llama", lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB")
    ),
}  # fmt: skip


def handle_on(base, config):
    torch.manual_seed(3)
    return get_peft_model(base, config())


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_on_a_partitioned_base_are_those_on_a_whole_one(name):
    model, config = CONFIGS[name]
    inputs = tiny.inputs_for(model)
    plain, base = handle_on(tiny.make(model), config), partitioned(tiny.make(model))
    handle = handle_on(base, config)
    assert all(is_placeholder(p) for p in base.parameters()), "nothing is left gathered"
    for (path, found), (_, expected) in zip(handle.adapters.named_parameters(), plain.adapters.named_parameters()):
        assert torch.equal(found, expected) and not hasattr(found, "ds_shape"), path
    assert handle.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()
    assert repr(handle) == repr(plain)
    torch.testing.assert_close(out(handle, inputs), out(plain, inputs))
    for each in (handle, plain):
        tiny.main_output(each.eval()(**inputs)).square().mean().backward()
    for found, expected in zip(gradients(handle).values(), gradients(plain).values()):
        torch.testing.assert_close(found, expected)


def test_what_reads_all_values_is_refused():
    base = partitioned(tiny.make("llama"))
    handle = lora(base)
    for merge in (handle.merge_adapter, handle.merge_and_unload, lambda: handle.merge_and_unload(copy=True)):
        with pytest.raises(UsageError, match="partitioned, so its weight cannot be merged"):
            merge()
    assert all(is_placeholder(p) for p in base.parameters())


def test_a_partitioned_adapter_is_saved_whole(tmp_path):
    handle = lora(tiny.make("llama"), modules_to_save=["lm_head"])
    handle.save_pretrained(tmp_path / "before")
    partitioned(handle.adapters)
    handle.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert all(is_placeholder(p) for p in handle.adapters.parameters())


def test_a_partitioned_tied_copy_is_refused():
    base = tiny.make("llama")
    base.lm_head.weight = base.model.embed_tokens.weight
    handle = lora(base, modules_to_save=["lm_head"], ensure_weight_tying=True).eval()
    partitioned(handle.adapters)
    with pytest.raises(UsageError, match="use stage 2"):
        out(handle, tiny.inputs_for("llama"))


def test_shapes_and_values_of_one_tensor():
    module = partitioned(torch.nn.Linear(3, 2))
    assert shape_of(module.weight) == (2, 3) and module.weight.shape == (0,)
    assert torch.equal(whole(module.weight), module.weight.held) and is_placeholder(module.weight)
    plain = copied(module)
    assert torch.equal(plain.weight, module.weight.held) and not hasattr(plain.weight, "ds_shape")
    assert plain.weight.requires_grad and is_placeholder(module.weight)
    assert whole(plain.weight) is plain.weight
