"""Handles under `nn.DataParallel`, whose replication is emulated on one device, tensor by tensor as torch does it."""

import threading

import pytest
import torch
from torch import nn

from tests import tiny
from tests.handles import assert_same_state, lora, out, prefixed, prompted, state
from tunesmith import (
    AdaLoraConfig,
    BitFitConfig,
    BottleneckConfig,
    LoraConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)  # fmt: skip
from tunesmith.errors import UsageError


def replicate(network: nn.Module, moved=lambda tensor: tensor * 1.0) -> nn.Module:
    """What `torch.nn.parallel.replicate` makes for one device; parameters become tensors computed from the original ones."""
    modules = list(network.modules())
    index = {id(module): i for i, module in enumerate(modules)}
    copies = [module._replicate_for_data_parallel() for module in modules]
    for copied in copies:
        copied._former_parameters = {}
    tensors = {}
    for module, copied in zip(modules, copies):
        for name, child in module._modules.items():
            setattr(copied, name, None if child is None else copies[index[id(child)]])
        for name, parameter in module._parameters.items():
            if parameter is None:
                copied._parameters[name] = None
                continue
            if id(parameter) not in tensors:
                new = moved(parameter) if parameter.requires_grad else moved(parameter.detach())
                tensors[id(parameter)] = new
            setattr(copied, name, tensors[id(parameter)])
            copied._former_parameters[name] = tensors[id(parameter)]
        for name, buffer in module._buffers.items():
            setattr(copied, name, None if buffer is None else buffer.clone())
    return copies[0]


def in_parallel(handle, inputs, replicas: int = 2):
    """Logits of the whole batch, each share of it in a thread and on a replica of its own."""
    copies = [replicate(handle) for _ in range(replicas)]
    shares = [{name: value.chunk(replicas)[i] for name, value in inputs.items()} for i in range(replicas)]
    results = [None] * replicas

    def run(i):
        try:
            results[i] = tiny.main_output(copies[i](**shares[i]))
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(replicas)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return torch.cat(results)


def tied():
    base = tiny.make("llama")
    base.lm_head.weight = base.model.embed_tokens.weight
    return base


def from_config(config):
    def make():
        torch.manual_seed(1)
        return get_peft_model(tiny.make("llama"), config())

    return make


HANDLES = {
    "lora": lambda: lora(tiny.make("llama"), target_modules="all-linear"),
    "lora on embeddings, biases, copies": lambda: lora(
        tiny.make("gpt2"), target_modules=["c_attn", "wte"], bias="all", modules_to_save=["ln_f"]
    ),
    "dora": from_config(lambda: LoraConfig(use_dora=True, init_lora_weights=False)),
    "pissa": from_config(lambda: LoraConfig(init_lora_weights="pissa", r=4)),
    "vera": from_config(lambda: VeraConfig(r=4)),
    "bitfit": lambda: get_peft_model(tiny.make("gpt2"), BitFitConfig()),
    "bottleneck": from_config(lambda: BottleneckConfig(target_modules=["mlp"])),
    "rows": lambda: get_peft_model(tied(), TrainableTokensConfig(token_indices=[5, 13, 25])),
    "tied": lambda: lora(tied(), target_modules=["embed_tokens"], ensure_weight_tying=True),
    "tied copy": lambda: lora(tied(), modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "parameters": from_config(lambda: LoraConfig(target_parameters=["q_proj.weight"], init_lora_weights=False)),
    "prompt": lambda: prompted(tiny.make("llama")),
    "prefix": lambda: prefixed(tiny.make("llama"), prefix_projection=True, encoder_hidden_size=8),
    "adalora": from_config(lambda: AdaLoraConfig(total_step=100, tinit=10, tfinal=10, init_r=4, target_r=2)),
}


@pytest.mark.parametrize("name", HANDLES)
def test_values_and_gradients_are_those_of_one_process(name):
    handle = HANDLES[name]().eval()
    inputs = tiny.inputs_for("llama", rows=4)
    before, expected = state(handle.bare_base), tiny.main_output(handle(**inputs))
    expected.square().mean().backward()
    wanted = {path: p.grad.clone() for path, p in handle.adapters.named_parameters() if p.grad is not None}
    handle.zero_grad()
    found = in_parallel(handle, inputs)
    torch.testing.assert_close(found, expected)
    found.square().mean().backward()
    assert wanted
    for path, parameter in handle.adapters.named_parameters():
        if path in wanted:
            torch.testing.assert_close(parameter.grad, wanted[path], rtol=1e-4, atol=1e-7)
    assert_same_state(before, state(handle.bare_base))
    torch.testing.assert_close(out(handle, inputs), expected)


@pytest.mark.parametrize("name", HANDLES)
def test_a_replica_computes_with_its_own_tensors(name):
    """Where a replica's tensors are other numbers, so is the result; on another device they would be the only usable ones."""
    handle = HANDLES[name]().eval()
    inputs = tiny.inputs_for("llama")
    copied = replicate(handle, lambda tensor: tensor * 0.5)
    with torch.no_grad():
        found = tiny.main_output(copied(**inputs))
        for parameter in handle.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(found, out(handle, inputs))


def test_training_mode_switched_and_merged_adapters():
    handle = lora(tiny.make("llama")).train()
    handle.add_adapter("second", LoraConfig(init_lora_weights=False, target_modules=["down_proj"]))
    inputs = tiny.inputs_for("llama", rows=4)
    for active in ("second", ["default", "second"]):
        handle.set_adapter(active)
        torch.testing.assert_close(in_parallel(handle, inputs), handle(**inputs).logits)
    handle.merge_adapter(["default"])
    torch.testing.assert_close(in_parallel(handle, inputs), handle(**inputs).logits)
    with handle.disable_adapter():
        torch.testing.assert_close(in_parallel(handle, inputs), handle.bare_base(**inputs).logits)


def test_the_first_step_is_checked_on_replicas():
    handle = lora(tiny.make("llama"), target_modules=["q_proj"]).train()
    for layer in handle.bare_base.model.layers:
        layer.self_attn.forward = lambda *args, **kwargs: (kwargs["hidden_states"], None)
    with pytest.raises(UsageError, match=r"layers\.1\.self_attn\.q_proj"):
        in_parallel(handle, tiny.inputs_for("llama", rows=4))


def test_the_wrapper_itself_on_a_machine_without_accelerators():
    handle = lora(tiny.make("llama"))
    inputs = tiny.inputs_for("llama")
    torch.testing.assert_close(out(nn.DataParallel(handle), inputs), out(handle, inputs))
