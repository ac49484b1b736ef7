"""LoRA on parameters, above all on the fused weights of experts, against the reference library."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from torch import nn

import tunesmith as ts
from tests import tiny
from tests.parity.oracle import agree, ours_on, output, own_names, read_by_peft, tensors, theirs_on, written_by_peft
from tunesmith.checkpoint.names import named_tensors

SIZES = {**tiny.SIZES, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0}
MODELS = {
    "llama4": lambda: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(**SIZES, intermediate_size_mlp=64, num_local_experts=4, num_experts_per_tok=1)
    ),
    "qwen3-moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**SIZES, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2)
    ),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_local_experts=4)),
    "gpt-oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, rope_parameters={"rope_type": "default"})
    ),
}
BOTH = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
INPUTS = tiny.inputs_for("llama")


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


OPTIONS = {
    **{f"both of {name}": (name, BOTH) for name in MODELS},
    **{f"one of {name}": (name, {**BOTH, "target_parameters": ["down_proj"]}) for name in ("qwen3-moe", "gpt-oss")},
    "a router's matrix": ("mixtral", {**BOTH, "target_parameters": ["mlp.gate.weight", "experts.down_proj"]}),
    "with modules": ("mixtral", {**BOTH, "target_modules": ["q_proj"]}),
    "with no modules named": ("mixtral", {**BOTH, "target_modules": None}),
    "with patterns": ("gpt-oss", {**BOTH, "rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"gate_up_proj": 3}}),
    "rslora": ("qwen3-moe", {**BOTH, "use_rslora": True}),
    "zero init": ("qwen3-moe", {**BOTH, "init_lora_weights": True}),
    "matrices of a Linear": ("mixtral", {**BOTH, "target_parameters": ["q_proj.weight", "lm_head.weight"]}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_option_means_the_same_in_both(case, tmp_path):
    name, options = OPTIONS[case]
    base = make(name)
    agree(base, "lora", "CAUSAL_LM", INPUTS, tmp_path, **options)
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), make(name).parameters()))


def test_names_nest_as_the_references_do(tmp_path):
    ours_on(make("mixtral"), "lora", "CAUSAL_LM", **BOTH).save_pretrained(tmp_path)
    first = {
        k.removeprefix("base_model.model.model.layers.0.mlp."): tuple(t.shape)
        for k, t in tensors(tmp_path).items()
        if "s.0." in k
    }
    assert first == {
        "experts.base_layer.lora_A.weight": (16, 32), "experts.base_layer.lora_B.weight": (128, 16),
        "experts.lora_A.weight": (16, 64), "experts.lora_B.weight": (32, 16),
    }  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_gradient_equals_the_references(name, tmp_path):
    base, batch = make(name), {**INPUTS, "labels": INPUTS["input_ids"]}
    theirs = theirs_on(base, "lora", "CAUSAL_LM", **BOTH)
    ours = ts.PeftModel.from_pretrained(base, written_by_peft(theirs, tmp_path), is_trainable=True).eval()
    for model in (ours, theirs):
        model(**batch).loss.backward()
    expected = {key: tensor.grad for key, tensor in own_names(theirs).items()}
    found = {key: t.grad for key, _, t in named_tensors(ours.adapters.default, ours.peft_config["default"], base)}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    assert any(gradient.abs().max() > 1e-4 for gradient in found.values())
    assert all(p.grad is None for p in base.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_starts_as_the_base_merges_and_comes_back(name, tmp_path):
    base = make(name)
    plain = output(base, INPUTS)
    fresh = ts.get_peft_model(base, ts.LoraConfig(task_type="CAUSAL_LM", **BOTH)).eval()
    assert torch.equal(output(fresh, INPUTS), plain)
    fresh.unload()
    handle = ours_on(base, "lora", "CAUSAL_LM", **BOTH)
    adapted = output(handle, INPUTS)
    assert (adapted - plain).abs().max() > 1e-3
    with handle.disable_adapter():
        assert torch.equal(output(handle, INPUTS), plain)
    handle.merge_adapter()
    torch.testing.assert_close(output(handle, INPUTS), adapted, atol=1e-5, rtol=0)
    handle.unmerge_adapter()
    assert torch.equal(output(handle, INPUTS), adapted)
    handle.save_pretrained(tmp_path)
    assert torch.equal(output(ts.PeftModel.from_pretrained(make(name), tmp_path).eval(), INPUTS), adapted)
    merged = handle.merge_and_unload(copy=True)
    theirs = read_by_peft(base, tmp_path).merge_and_unload().state_dict()
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(value, theirs[key], atol=1e-6, rtol=0)


def test_two_adapters_of_other_parameters_act_together():
    """The reference allows only adapters of the same parameters side by side."""
    base = make("qwen3-moe")
    handle = ours_on(base, "lora", "CAUSAL_LM", **BOTH)
    handle.add_adapter(
        "second", ts.LoraConfig(r=2, init_lora_weights=False, target_modules=[], target_parameters=["down_proj"])
    )
    handle.set_adapter(["default", "second"])
    adapted = output(handle.eval(), INPUTS)
    merged_base = copy.deepcopy(base)
    for name in ("default", "second"):
        for path, adapter in handle.tree(name).items():
            for parameter, value in adapter.replaced(merged_base.get_submodule(path)).items():
                getattr(merged_base.get_submodule(path), parameter).data = value.detach()
    torch.testing.assert_close(output(merged_base, INPUTS), adapted, atol=1e-5, rtol=0)


def test_masters_are_fp32_beside_bf16_experts_unless_told_otherwise():
    for full, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        base = make("mixtral").to(torch.bfloat16)
        handle = ts.get_peft_model(base, ts.LoraConfig(**BOTH), autocast_adapter_dtype=full)
        assert all(parameter.dtype == dtype for parameter in handle.adapters.parameters())
        assert torch.equal(output(handle.eval(), INPUTS), output(base, INPUTS))


def test_a_file_with_another_scale_takes_its_place(tmp_path):
    trained = ours_on(make("mixtral"), "lora", "CAUSAL_LM", **BOTH, lora_alpha=2)
    trained.save_pretrained(tmp_path)
    handle = ours_on(make("mixtral"), "lora", "CAUSAL_LM", **BOTH)
    handle.load_adapter(tmp_path)
    assert torch.equal(output(handle, INPUTS), output(trained, INPUTS))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 4))
        self.inner = nn.Linear(4, 4)


BAD = {
    "dropout": ({**BOTH, "lora_dropout": 0.1}, ts.ConfigError, "lora_dropout cannot be combined"),
    "dora": ({**BOTH, "use_dora": True}, ts.ConfigError, "use_dora cannot be combined"),
    "bias": ({**BOTH, "lora_bias": True}, ts.ConfigError, "lora_bias cannot be combined"),
    "init": ({**BOTH, "init_lora_weights": "pissa"}, ts.ConfigError, "got 'pissa'"),
    "expression": ({"target_parameters": "experts.*"}, ts.ConfigError, "must be of type list"),
    "nothing": ({"target_modules": []}, ts.ConfigError, "target_modules is empty"),
    "no parameter": ({"target_parameters": ["inner.weigth"]}, ts.TargetError, "did you mean 'inner.weight'"),
    "the model's own": ({"target_parameters": ["table"]}, ts.TargetError, "belongs to the model itself"),
    "a bias": ({"target_parameters": ["inner.bias"]}, ts.TargetError, "has the shape (4,)"),
    "target, too": ({"target_parameters": ["inner.weight"], "target_modules": ["inner"]}, ts.TargetError, "cannot be a target"),
    "pattern": ({"target_parameters": ["inner.weight"], "rank_pattern": {"outer": 2}}, ts.TargetError, '"outer" matches no'),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_parameters_are_refused_with_the_reason(case):
    fields, error, message = BAD[case]
    with pytest.raises(error) as found:
        ts.get_peft_model(Own(), ts.LoraConfig(**fields))
    assert message in str(found.value)
