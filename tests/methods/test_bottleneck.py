"""Bottleneck adapters: the equation on every architecture's blocks, and beside other adapters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from safetensors import safe_open
from torch import nn

from tests import tiny
from tests.handles import out
from tunesmith import BottleneckConfig, ConfigError, LoraConfig, PeftModel, TargetError, get_peft_model


def adapted(model: nn.Module, task: str | None = "CAUSAL_LM", **fields) -> PeftModel:
    """A handle whose every trained value is random."""
    handle = get_peft_model(model, BottleneckConfig(task_type=task, **fields))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in handle.adapters.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return handle.eval()


def paths(handle: PeftModel) -> set[str]:
    return {path for path, adapter in handle.tree("default").items() if type(adapter).__name__ == "Bottleneck"}


# --- the equation, by hooks on an untouched copy of the base -------------------------------------------------------

OPTIONS = {
    "sequential": {},
    "by size": {"bottleneck_size": 5},
    "by factor": {"reduction_factor": 8},
    "scaled": {"scaling": 4.0},
    "learned scale": {"scaling": "learned"},
    "normalised": {"layer_norm_before": True},
    "gelu": {"non_linearity": "gelu"},
    "tanh": {"non_linearity": "tanh"},
    "beside both blocks": {"use_parallel_adapter": True},
    "beside, normalised": {"style": "parallel", "layer_norm_before": True, "scaling": "learned"},
}


def by_hooks(plain_base: nn.Module, handle: PeftModel, config: BottleneckConfig) -> None:
    """The paper's equation, written once more, on the same modules."""
    function = {"relu": torch.relu, "gelu": F.gelu, "tanh": torch.tanh}[config.non_linearity]

    def hook(module, args, kwargs, result, adapter):
        hidden = result[0] if isinstance(result, tuple) else result
        x = (args[0] if args else kwargs["hidden_states"]) if config.use_parallel_adapter else hidden
        if config.layer_norm_before:
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            x = x * adapter.norm.weight + adapter.norm.bias
        small = function(x @ adapter.down.weight.T + adapter.down.bias)
        scale = adapter.scale if config.scaling == "learned" else config.scaling
        hidden = hidden + scale * (small @ adapter.up.weight.T + adapter.up.bias)
        return (hidden, *result[1:]) if isinstance(result, tuple) else hidden

    for path, adapter in handle.tree("default").items():
        plain_base.get_submodule(path).register_forward_hook(
            lambda m, a, k, r, adapter=adapter: hook(m, a, k, r, adapter), with_kwargs=True
        )


@pytest.mark.each_value_once
@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "t5"])
def test_outputs_and_gradients_are_the_equations(name, case):
    base, plain_base, inputs = tiny.make(name), tiny.make(name), tiny.inputs_for(name)
    handle = adapted(base, tiny.task_of(name), **OPTIONS[case])
    by_hooks(plain_base, handle, handle.peft_config["default"])
    found, expected = tiny.main_output(handle(**inputs)), tiny.main_output(plain_base(**inputs))
    assert (expected - tiny.main_output(base(**inputs))).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    parameters = list(handle.adapters.parameters())
    pairs = zip(torch.autograd.grad(found.square().sum(), parameters), torch.autograd.grad(expected.square().sum(), parameters))
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * max(1.0, wanted.abs().max().item()))


# --- where they go --------------------------------------------------------------------------------------------------

PLACES = {
    ("llama", "houlsby"): {"self_attn", "mlp"},
    ("llama", "pfeiffer"): {"mlp"},
    ("llama", "parallel"): {"mlp"},
    ("gpt2", "houlsby"): {"attn", "mlp"},
    ("bloom", "houlsby"): {"self_attention.dense", "mlp.dense_4h_to_h"},
    ("bloom", "parallel"): {"mlp"},
    ("opt", "houlsby"): {"self_attn", "fc2"},
    ("opt", "pfeiffer"): {"fc2"},
    ("t5", "houlsby"): {"SelfAttention", "DenseReluDense"},
    ("mt5", "pfeiffer"): {"DenseReluDense"},
    ("bert-classifier", "houlsby"): {"attention.output.dense", "output.dense"},
    ("bert-classifier", "pfeiffer"): {"output.dense"},
}


@pytest.mark.parametrize(("name", "style"), PLACES)
def test_default_places(name, style, tmp_path):
    base, task, inputs = tiny.make(name), tiny.task_of(name), tiny.inputs_for(name)
    handle = adapted(base, task, style=style)
    wanted = PLACES[name, style]
    found = {next((w for w in sorted(wanted, key=len, reverse=True) if path.endswith(w)), path) for path in paths(handle)}
    assert found == wanted
    layers = 4 if name in ("t5", "mt5") else 2
    assert len(paths(handle)) == layers * len(wanted)
    if style == "pfeiffer":
        assert not any("attention" in path for path in paths(handle))
    handle.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.make(name), tmp_path).eval()
    assert paths(again) == paths(handle)
    assert torch.equal(out(again, inputs), out(handle, inputs))


def test_pfeiffer_on_bert_keeps_what_the_user_excludes():
    for excluded in (["layer.0.output.dense"], r".*layer\.0\.output\.dense"):
        handle = adapted(tiny.make("bert-classifier"), "SEQ_CLS", style="pfeiffer", exclude_modules=excluded)
        assert paths(handle) == {"bert.encoder.layer.1.output.dense"}


def test_blocks_that_are_no_module_have_nothing_beside_them():
    with pytest.raises(ConfigError, match=r'"opt" is not a module of its own.*houlsby'):
        adapted(tiny.make("opt"), style="parallel")


def test_unknown_architectures_are_told_to_name_their_blocks():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6))

        def forward(self, x):
            return {"logits": x + self.block(x)}

    with pytest.raises(ConfigError, match=r"not known; name them in target_modules"):
        adapted(Own(), None)
    handle = adapted(Own(), None, target_modules=["block"], bottleneck_size=3)
    assert handle.tree("default").node("block")._adapter.down.weight.shape == (3, 6)
    assert (handle(x=torch.ones(1, 6))["logits"] - handle.bare_base(x=torch.ones(1, 6))["logits"]).abs().max() > 1e-3


def test_a_module_of_unknown_width_is_refused_by_name():
    with pytest.raises(TargetError, match=r"act_fn: the output width of SiLU"):
        adapted(tiny.make("llama"), target_modules=["act_fn"])


def test_a_block_without_a_tensor_result_is_refused_when_it_runs():
    from tunesmith import UsageError

    handle = adapted(tiny.make("llama"), target_modules=["model"])
    with pytest.raises(UsageError, match="returned a BaseModelOutputWithPast"):
        handle(**tiny.inputs_for("llama"))


def test_width_of_attention_whose_heads_are_wider_than_the_stream():
    sizes = {**tiny.SIZES, "head_dim": 16, "num_key_value_heads": 2}
    handle = adapted(tf.Qwen3ForCausalLM(tf.Qwen3Config(**sizes)).eval(), bottleneck_size=4)
    assert {a.up.weight.shape for _, a in handle.tree("default").items()} == {(32, 4)}
    assert out(handle, tiny.inputs_for("llama")).isfinite().all()


def test_width_of_a_block_of_experts():
    sizes = {**tiny.SIZES, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    handle = adapted(tf.MixtralForCausalLM(tf.MixtralConfig(**sizes)).eval(), style="pfeiffer", bottleneck_size=4)
    assert {a.up.weight.shape for _, a in handle.tree("default").items()} == {(32, 4)}
    assert out(handle, tiny.inputs_for("llama")).isfinite().all()


def test_vision_blocks():
    model = tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64, image_size=8, patch_size=4
        )
    ).eval()
    handle, inputs = adapted(model, "SEQ_CLS"), {"pixel_values": torch.randn(2, 3, 8, 8)}
    assert len(paths(handle)) == 4
    assert (out(handle, inputs) - out(model, inputs)).abs().max() > 1e-3


# --- beside other things --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("blocks", "inside"), ("inside", "blocks")])
def test_lora_on_the_very_linear_that_ends_a_block_acts_first_in_any_order(order, tmp_path):
    name = "bert-features"
    base, inputs = tiny.make(name), tiny.inputs_for(name)
    configs = {
        "blocks": BottleneckConfig(style="pfeiffer"),
        "inside": LoraConfig(target_modules=["output.dense"], init_lora_weights=False),
    }
    torch.manual_seed(3)
    handle = get_peft_model(base, configs["blocks"], "blocks")
    handle.add_adapter("inside", configs["inside"])
    with torch.no_grad():
        for parameter in handle.tree("blocks").parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    handle.eval().set_adapter(list(order))
    together = out(handle, inputs)
    handle.merge_adapter(["inside"])
    torch.testing.assert_close(out(handle, inputs), together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant):
    inputs = tiny.inputs_for("llama")
    grads = []
    for checkpointing in (False, True):
        handle = adapted(tiny.make("llama"), style="houlsby").train()
        if checkpointing:
            handle.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        handle(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append([p.grad for p in handle.adapters.parameters()])
    for plain, recomputed in zip(*grads):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", tiny.GENERATING)
def test_generation_with_a_cache_equals_generation_without(name):
    handle = adapted(tiny.make(name), tiny.task_of(name))
    ids = tiny.inputs_for(name)["input_ids"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    cached, plain = (handle.generate(input_ids=ids, use_cache=use, **options) for use in (True, False))
    bare = handle.bare_base.generate(input_ids=ids, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-5, atol=1e-5)
    assert (cached.logits[0] - bare.logits[0]).abs().max() > 1e-3


def test_masters_beside_a_16_bit_base_are_fp32_unless_told_otherwise():
    for full, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        config = BottleneckConfig(task_type="CAUSAL_LM", layer_norm_before=True, scaling="learned")
        handle = get_peft_model(tiny.make("llama").bfloat16(), config, autocast_adapter_dtype=full).eval()
        assert {p.dtype for p in handle.adapters.parameters()} == {dtype}
        inputs = tiny.inputs_for("llama")
        result = handle(**inputs, labels=inputs["input_ids"])
        assert result.logits.dtype == torch.bfloat16
        result.loss.backward()
        assert all(p.grad is not None for p in handle.adapters.parameters())


def test_compiles_whole():
    handle, inputs = adapted(tiny.make("llama"), scaling="learned", layer_norm_before=True), tiny.inputs_for("llama")
    expected = out(handle, inputs)
    compiled = torch.compile(handle, fullgraph=True, backend="eager")
    torch.testing.assert_close(out(compiled, inputs), expected)


def test_dropout_acts_in_training_only():
    handle, inputs = adapted(tiny.make("llama"), adapter_dropout=0.5), tiny.inputs_for("llama")
    assert torch.equal(out(handle, inputs), out(handle, inputs))
    handle.train()
    assert not torch.equal(out(handle, inputs), out(handle, inputs))


def test_bert_init_is_near_the_base_and_zero_init_is_the_base():
    inputs, base = tiny.inputs_for("llama"), tiny.make("llama")
    handle = get_peft_model(base, BottleneckConfig(task_type="CAUSAL_LM", init_weights="bert")).eval()
    distance = (out(handle, inputs) - out(base, inputs)).abs().max()
    assert 0 < distance < 0.01


def test_file_holds_these_tensors_and_no_others(tmp_path):
    """docs/formats.md is written from this."""
    handle = adapted(
        tiny.make("llama"), target_modules=["layers.0.mlp"], bottleneck_size=4, scaling="learned", layer_norm_before=True
    )
    handle.save_pretrained(tmp_path)
    path = "base_model.model.model.layers.0.mlp."
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        found = {key.removeprefix(path): tuple(file.get_tensor(key).shape) for key in file.keys()}  # noqa: SIM118
    assert found == {
        "down.weight": (4, 32), "down.bias": (4,), "up.weight": (32, 4), "up.bias": (32,),
        "norm.weight": (32,), "norm.bias": (32,), "scale": (1,),
    }  # fmt: skip


def test_an_adapter_is_replaced_by_one_that_computes_something_else(tmp_path):
    inputs = tiny.inputs_for("llama")
    adapted(tiny.make("llama")).save_pretrained(tmp_path / "same")
    adapted(tiny.make("llama"), scaling=2.0).save_pretrained(tmp_path / "other")
    handle = get_peft_model(tiny.make("llama"), BottleneckConfig(task_type="CAUSAL_LM")).eval()
    handle.load_adapter(tmp_path / "same", "default")
    assert torch.equal(out(handle, inputs), out(adapted(tiny.make("llama")), inputs))
    handle.load_adapter(tmp_path / "other", "default")
    assert torch.equal(out(handle, inputs), out(adapted(tiny.make("llama"), scaling=2.0), inputs))


BAD = [
    ({"bottleneck_size": 0}, "bottleneck_size=0"),
    ({"bottleneck_size": 2.5}, "bottleneck_size=2.5"),
    ({"reduction_factor": 0}, "reduction_factor=0"),
    ({"reduction_factor": float("inf")}, "reduction_factor=inf"),
    ({"bottleneck_size": 8, "reduction_factor": 2}, "give only one of them"),
    ({"adapter_dropout": 1.0}, "adapter_dropout=1.0"),
    ({"scaling": "learnt"}, 'a finite number or "learned"'),
    ({"scaling": float("nan")}, "scaling=nan"),
    ({"non_linearity": "rellu"}, "must be one of relu, gelu"),
    ({"style": "adapter"}, "houlsby, pfeiffer, parallel"),
    ({"init_weights": "random"}, "zero, bert"),
    ({"target_modules": "all-linear"}, "name the blocks"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[str(fields) for fields, _ in BAD])
def test_bad_values_are_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        BottleneckConfig(**fields)
