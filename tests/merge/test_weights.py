"""Adapters merged into weights and out of them, exactly."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests import tiny
from tests.handles import assert_same_state, lora, out, prompted, state
from tunesmith import (
    LoraConfig,
    OFTConfig,
    UsageError,
    get_peft_model,
)
from tunesmith.adapter import LinearAdapter
from tunesmith.bases.view import view_of

EXACT = {"rtol": 1e-10, "atol": 1e-10}
KINDS = {
    "linear": lambda: (nn.Linear(6, 5), torch.randn(3, 4, 6)),
    "linear without bias": lambda: (nn.Linear(6, 5, bias=False), torch.randn(3, 6)),
    "conv1d": lambda: (Conv1D(5, 6), torch.randn(3, 4, 6)),
    "embedding": lambda: (nn.Embedding(9, 5, padding_idx=0), torch.randint(0, 9, (3, 4))),
    "conv2d": lambda: (nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=1), torch.randn(2, 4, 8, 8)),
    "conv2d padded": lambda: (nn.Conv2d(4, 6, (3, 5), padding=2, padding_mode="reflect", bias=False), torch.randn(2, 4, 8, 8)),
}


def _double(kind):
    torch.manual_seed(0)
    module, x = KINDS[kind]()
    return nn.Sequential(module).double(), x.double() if x.is_floating_point() else x


def _several(base, count=3, **fields):
    """A handle with `count` active adapters of ranks 1, 2, ..."""
    handle = lora(base, 1, "a0", target_modules=["0"], r=1, **fields)
    for i in range(1, count):
        torch.manual_seed(10 + i)
        handle.add_adapter(f"a{i}", LoraConfig(target_modules=["0"], r=i + 1, init_lora_weights=False, **fields))
    handle.set_adapter([f"a{i}" for i in range(count)])
    return handle


def test_several_active_adapters_add_up():
    base, x = _double("linear")
    handle, plain = _several(base), base(x)
    together, alone = handle(x), []
    for name in ("a0", "a1", "a2"):
        handle.set_adapter(name)
        alone.append(handle(x) - plain)
    torch.testing.assert_close(together, plain + sum(alone), **EXACT)


def test_a_parameter_under_a_rotation_is_merged_first(llama, llama_inputs):
    """Merged the other way round, the change of the parameter would not be rotated."""
    handle = get_peft_model(
        llama, OFTConfig(oft_block_size=8, init_weights=False, target_modules=["q_proj"]), "rotation"
    ).eval()
    handle.add_adapter("change", LoraConfig(target_parameters=["q_proj.weight"], init_lora_weights=False, lora_alpha=64))
    handle.set_adapter(["rotation", "change"])
    expected = out(handle, llama_inputs)
    with pytest.raises(UsageError, match=r'"change" replaces .*merge it before the others: "change", "rotation"'):
        handle.merge_adapter()
    handle.merge_adapter(["change", "rotation"])
    torch.testing.assert_close(out(handle, llama_inputs), expected, rtol=1e-4, atol=1e-5)


def test_a_bias_that_has_no_place_in_the_module_is_not_lost_in_merging(llama, llama_inputs):
    class Shifted(LinearAdapter):
        def forward(self, x, base, *args, **kwargs):
            return base(x, *args, **kwargs) + 1

        def merge(self, weight, bias, base):
            return weight, torch.ones(len(weight), dtype=weight.dtype) if bias is None else bias + 1

    handle = lora(llama).eval()
    path, module = "model.layers.1.self_attn.v_proj", llama.model.layers[1].self_attn.v_proj
    handle.tree("default").node(path)._modules["_adapter"] = Shifted(view_of(module), None, {})
    handle._forget()
    before, expected = state(llama), out(handle, llama_inputs)
    with pytest.raises(UsageError, match="Shifted adds a bias to a Linear that has none"):
        handle.merge_adapter()
    assert_same_state(before, state(llama))
    assert torch.equal(out(handle, llama_inputs), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_folded_in_float64(kind):
    base, x = _double(kind)
    plain, before = base(x), state(base)
    handle = _several(base)
    folded = handle(x)
    assert not torch.allclose(folded, plain, atol=1e-3)
    handle.merge_adapter()
    torch.testing.assert_close(handle(x), folded, **EXACT)
    assert torch.equal(handle(x), base(x)), "merged, the base itself computes it"
    handle.unmerge_adapter()
    assert torch.equal(handle(x), folded) and torch.equal(base(x), plain)
    assert_same_state(before, state(base))
    merged = handle.merge_and_unload()
    assert merged is base and type(merged[0]) is type(KINDS[kind]()[0])
    torch.testing.assert_close(merged(x), folded, **EXACT)


def test_merging_some_adapters_leaves_the_others_effective():
    base, x = _double("linear")
    handle = _several(base)
    folded = handle(x)
    handle.merge_adapter(["a1"])
    torch.testing.assert_close(handle(x), folded, **EXACT)
    with handle.disable_adapter():
        assert torch.equal(handle(x), _double("linear")[0](x))
    torch.testing.assert_close(handle(x), folded, **EXACT)


def test_a_grouped_convolution_computes_but_is_refused_by_merging_before_anything_changes():
    base = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 6, 3, groups=2))
    handle = lora(base, target_modules=["0", "1"], r=2)
    before, x = state(base), torch.randn(1, 4, 5, 5)
    expected = handle(x)
    for call in (handle.merge_adapter, handle.merge_and_unload, lambda: handle.merge_and_unload(copy=True)):
        with pytest.raises(UsageError, match=r"1 cannot be merged: .*grouped convolution"):
            call()
        assert_same_state(before, state(base))
        assert torch.equal(handle(x), expected)


def test_merging_16_bit_weights_rounds_once():
    """The merged weight is the nearest bf16 value to the sum in fp32, not a sum of rounded parts."""
    base = nn.Sequential(nn.Linear(32, 32).to(torch.bfloat16))
    handle = lora(base, target_modules=["0"])
    adapter = handle.adapters["default"].node("0")._adapter
    exact = base[0].weight.double() + adapter.scale * (adapter.lora_B.double() @ adapter.lora_A.double())
    handle.merge_adapter()
    merged = base[0].weight
    assert merged.dtype == torch.bfloat16
    bound = exact.abs() * 2.0**-8 + 1e-6  # half a step of bf16's 8 significant bits, and the fp32 sum's own error
    assert ((merged.double() - exact).abs() <= bound).all()
    change = adapter.scale * (adapter.lora_B.bfloat16() @ adapter.lora_A.bfloat16())
    often = handle.merged_adapters["default"]["0", "weight"] + change
    assert not ((often.double() - exact).abs() <= bound).all(), "the case tells one rounding from several"


def test_unmerging_restores_the_same_objects_and_bits_of_every_part():
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    before, x = state(base), torch.randn(8, 4)
    buffers = {name: id(b) for name, b in base.named_buffers()}
    handle = lora(base, target_modules=["0"], bias="all", modules_to_save=["1"]).train()
    handle(x)  # moves the private copy's running mean
    handle.eval()
    expected = handle(x)
    handle.merge_adapter()
    torch.testing.assert_close(base(x), expected)
    handle.unmerge_adapter()
    assert_same_state(before, state(base))
    assert buffers == {name: id(b) for name, b in base.named_buffers()}


@pytest.mark.parametrize("safe", [False, True])
def test_a_merge_that_fails_leaves_everything_as_it_was(safe):
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    handle = lora(base, 1, target_modules=["0"])
    handle.add_adapter("second", LoraConfig(target_modules=["0", "1"], init_lora_weights=False))
    handle.set_adapter(["default", "second"])
    before, x = state(base), torch.randn(2, 4)
    bad = handle.adapters["second"].node("1")._adapter.lora_B
    with torch.no_grad():
        bad.fill_(3e38 if safe else float("nan"))  # finite values whose product is not, or a NaN
    for call in (handle.merge_adapter, handle.merge_and_unload):
        with pytest.raises(UsageError, match="non-finite"):
            call(safe_merge=safe)
        assert_same_state(before, state(base))
        assert handle.merged_adapters == {} and handle.active_adapters == ["default", "second"]
    handle.delete_adapter("second")
    assert not torch.equal(handle(x), base(x))


def test_merging_under_other_handles_is_refused_and_a_copy_is_not(llama, llama_inputs):
    handle, other = lora(llama, 1), lora(llama, 2)
    before = state(llama)
    results = [out(handle, llama_inputs), out(other, llama_inputs)]
    for call in (handle.merge_adapter, handle.merge_and_unload):
        with pytest.raises(UsageError, match="1 other handle"):
            call()
    merged = handle.merge_and_unload(copy=True)
    assert type(merged) is type(llama) and merged is not llama
    assert all(p.requires_grad for p in merged.parameters()), "a plain model, as before it was adapted"
    torch.testing.assert_close(out(merged, llama_inputs), results[0])
    assert_same_state(before, state(llama))
    assert torch.equal(out(handle, llama_inputs), results[0]) and torch.equal(out(other, llama_inputs), results[1])
    del other
    handle.merge_adapter()
    torch.testing.assert_close(out(llama, llama_inputs), results[0])


def test_attaching_to_a_base_with_merged_weights_is_refused(llama):
    handle = lora(llama, 1)
    handle.merge_adapter()
    with pytest.raises(UsageError, match="merged"):
        lora(llama, 2)
    handle.unmerge_adapter()
    lora(llama, 2)


def test_a_merged_copy_of_a_merged_handle_holds_the_adapter_once(llama, llama_inputs):
    handle = lora(llama)
    expected = out(handle, llama_inputs)
    handle.merge_adapter()
    torch.testing.assert_close(out(handle.merge_and_unload(copy=True), llama_inputs), expected)
    torch.testing.assert_close(out(llama, llama_inputs), expected)  # and stays merged
    torch.testing.assert_close(out(handle.merge_and_unload(), llama_inputs), expected)


def test_unloading_a_merged_handle_restores_the_base(llama, llama_inputs):
    plain, before = out(llama, llama_inputs), state(llama)
    handle = lora(llama)
    handle.merge_adapter()
    handle.unload()
    assert torch.equal(out(llama, llama_inputs), plain)
    assert_same_state(before, state(llama))


def test_prompts_cannot_be_merged(llama):
    with pytest.raises(UsageError, match="cannot be merged"):
        prompted(llama).merge_adapter()


TIED = {"llama": "lm_head", "gpt2": "lm_head", "bloom": "word_embeddings", "t5": "lm_head", "mt5": "lm_head"}


def _tied(name):
    if name == "llama":
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(tiny._llama_config(tie_word_embeddings=True)).eval()
    return tiny.make(name)


@pytest.mark.parametrize("name", TIED)
def test_merging_one_of_two_tied_weights_changes_only_that_one_and_survives_saving(name, tmp_path):
    base, inputs = _tied(name), tiny.inputs_for(name)
    head, words = base.get_output_embeddings(), base.get_input_embeddings()
    assert head.weight is words.weight, "this case needs tied weights"
    before, plain, config = state(base), out(base, inputs), copy.deepcopy(base.config.to_dict())
    handle = lora(base, target_modules=[TIED[name]])
    expected = out(handle, inputs)
    assert not torch.allclose(expected, plain, atol=1e-3)

    handle.merge_adapter()
    torch.testing.assert_close(out(handle, inputs), expected)
    assert head.weight is not words.weight
    handle.unmerge_adapter()
    assert head.weight is words.weight and base.config.to_dict() == config
    assert_same_state(before, state(base))
    assert torch.equal(out(base, inputs), plain)

    merged = handle.merge_and_unload()
    torch.testing.assert_close(out(merged, inputs), expected)
    assert merged.config.tie_word_embeddings is False, "other readers of the files go by the config"
    merged.save_pretrained(tmp_path)
    reloaded = type(base).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(out(reloaded, inputs), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert-classifier"])
def test_a_merged_model_saved_and_reloaded_gives_equal_outputs(name, tmp_path):
    base, inputs = tiny.make(name), tiny.inputs_for(name)
    handle = lora(base, task_type=tiny.task_of(name), bias="all")
    merged = handle.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert torch.equal(out(type(base).from_pretrained(tmp_path).eval(), inputs), out(merged, inputs))


def test_a_copied_handle_with_merged_adapters_can_be_unmerged(llama, llama_inputs):
    base = _tied("llama")
    plain = out(base, llama_inputs)
    handle = lora(base, target_modules=["lm_head", "q_proj"])
    handle.merge_adapter()
    copied = copy.deepcopy(handle)
    copied.unmerge_adapter()
    assert torch.equal(out(copied.bare_base, llama_inputs), plain)
    assert copied.bare_base.lm_head.weight is copied.bare_base.model.embed_tokens.weight
    assert not torch.equal(out(base, llama_inputs), plain)


def half(**fields):
    """A handle on a base in float16 whose merged weights or biases lie beyond 65,504."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).half()
    handle = get_peft_model(base, LoraConfig(**{"target_modules": ["0", "2"], "init_lora_weights": False, **fields}))
    return base, handle.eval()


def scaled(handle, ending: str, value: float) -> None:
    with torch.no_grad():
        for name, parameter in handle.adapters.named_parameters():
            if name.endswith(ending):
                parameter.fill_(value)


BEYOND = {
    "lora": ({}, "lora_B", 3e5, "0.weight"),
    "rank-stabilised": ({"use_rslora": True}, "lora_B", 3e5, "0.weight"),
    "dora": ({"use_dora": True}, "lora_magnitude_vector", 1e6, "0.weight"),
    "bias of B": ({"lora_bias": True}, "lora_B_bias", 1e5, "0.bias"),
    "parameters": ({"target_modules": None, "target_parameters": ["0.weight"]}, "lora_B", 1e6, "0.weight"),
}


@pytest.mark.parametrize("case", BEYOND)
def test_values_beyond_half_precision_are_refused_by_name(case):
    fields, ending, value, name = BEYOND[case]
    base, handle = half(**fields)
    scaled(handle, ending, value)
    before = state(base)
    for call in (handle.merge_adapter, handle.merge_and_unload, lambda: handle.merge_and_unload(copy=True)):
        with pytest.raises(UsageError, match=rf"non-finite values in {name} \(torch.float16\).*dtype=torch.bfloat16"):
            call()
        assert_same_state(before, state(base))
        assert not handle.merged_adapters


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merging_in_a_wider_type_gives_a_model_of_that_type(dtype, copy):
    base, handle = half()
    base.register_buffer("kept", torch.zeros(2))
    scaled(handle, "lora_B", 3e5)
    factors = handle.tree("default").node("0").own
    expected = base[0].weight.float() + factors.scale * factors.lora_B @ factors.lora_A
    merged = handle.merge_and_unload(dtype=dtype, copy=copy)
    assert {p.dtype for p in merged.parameters()} == {dtype} and merged.kept.dtype == torch.float32
    assert torch.equal(merged[0].weight, expected.to(dtype))  # rounded once
    assert torch.isfinite(merged(torch.ones(1, 8, dtype=dtype))).all()
    if copy:
        assert {p.dtype for p in base.parameters()} == {torch.float16}


def test_what_was_not_finite_before_does_not_keep_from_merging():
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    base[1].register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    handle = lora(base, target_modules=["0"], modules_to_save=["1"])
    handle.merge_adapter()
    assert torch.isinf(base[1].mask).any()
