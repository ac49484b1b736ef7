"""Merging into quantised bases: a dense model by default, the stored form only where asked for; unmerging is exact."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

from tests import quantised
from tests.bases.test_quantised import linear4bit
from tests.handles import out
from tests.methods.test_contract import MERGEABLE, make_config
from tests.methods.test_contract_quantised import INPUTS, LABELLED, ON_LINEAR, each_form, randomised
from tunesmith import LoraConfig, UsageError, get_peft_model, prepare_model_for_kbit_training
from tunesmith.bases.quantised import quantised_views
from tunesmith.bases.view import view_of

LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


@pytest.mark.each_value_once
@each_form
@pytest.mark.parametrize("method", [name for name in ON_LINEAR if name in MERGEABLE])
def test_merged_into_a_dense_model_computes_the_same(method, form, tmp_path):
    base = quantised.make(tmp_path, form)
    handle = randomised(base, make_config(method, "linear")).eval()
    expected = out(handle, INPUTS)
    merged = handle.merge_and_unload()
    assert merged is base and not any(quantised_views(base))
    assert {p.dtype for p in merged.parameters()} == {torch.float32}  # what it was quantised from
    torch.testing.assert_close(out(merged, INPUTS), expected, rtol=1e-4, atol=1e-4)


@each_form
def test_the_dense_model_is_of_16_bits_and_each_weight_is_rounded_once(form, tmp_path):
    base = quantised.make(tmp_path, form, dtype=torch.bfloat16, compute=torch.bfloat16)
    handle = randomised(base, LoraConfig(**LORA)).eval()
    handle.add_adapter("second", LoraConfig(**{**LORA, "r": 2}))
    path = "model.layers.0.self_attn.q_proj"
    views = view_of(base.get_submodule(path))
    exact = views.weight_as(torch.float32)
    for name in ("default", "second"):
        adapter = handle.tree(name).get_submodule(path)._adapter
        exact = exact + adapter.scale * adapter.lora_B @ adapter.lora_A
    merged = handle.merge_and_unload(adapter_names=["default", "second"])
    assert torch.equal(merged.get_submodule(path).weight, exact.detach().to(torch.bfloat16))
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


@each_form
def test_the_dense_model_saves_and_loads_as_any_other(form, tmp_path):
    """After prepare_model_for_kbit_training, which widened what is not quantised."""
    base = quantised.make(tmp_path, form, dtype=torch.bfloat16, compute=torch.bfloat16)
    handle = randomised(prepare_model_for_kbit_training(base), LoraConfig(**LORA, modules_to_save=["lm_head"])).train()
    handle(**LABELLED).loss.backward()
    merged = handle.eval().merge_and_unload(safe_merge=True)
    expected = out(merged, INPUTS)
    merged.save_pretrained(tmp_path / "merged")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert not getattr(again, "is_quantized", False) and not hasattr(again.config, "quantization_config")
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), merged.parameters()))
    assert torch.equal(out(again, INPUTS), expected)


def test_another_type_may_be_asked_for(tmp_path):
    handle = randomised(quantised.make(tmp_path, "nf4"), LoraConfig(**LORA)).eval()
    expected = out(handle, INPUTS)
    merged = handle.merge_and_unload(dtype=torch.float16)
    assert merged.model.layers[0].self_attn.q_proj.weight.dtype == torch.float16
    torch.testing.assert_close(out(merged.float(), INPUTS), expected, rtol=0, atol=50 * 2**-12 * expected.abs().max().item())


def test_conv1d_bases_stay_conv1d(tmp_path):
    """GPT-2's modules are quantised turned round; as `nn.Linear` the merged model would save in the wrong orientation."""
    from transformers.pytorch_utils import Conv1D

    base = quantised.make(tmp_path, "nf4", "gpt2")
    handle = randomised(base, LoraConfig(**{**LORA, "target_modules": ["c_attn", "c_proj"]})).eval()
    expected = out(handle, INPUTS)
    merged = handle.merge_and_unload()
    assert type(merged.transformer.h[0].attn.c_attn) is Conv1D
    torch.testing.assert_close(out(merged, INPUTS), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(out(again, INPUTS), expected, rtol=1e-4, atol=1e-4)


@each_form
def test_a_copy_leaves_handle_and_base_alone(form, tmp_path):
    base = quantised.make(tmp_path, form)
    before = quantised.stored(base)
    handle = randomised(base, LoraConfig(**LORA)).eval()
    expected = out(handle, INPUTS)
    merged = handle.merge_and_unload(copy=True)
    assert merged is not base and not any(quantised_views(merged)) and base.is_quantized
    torch.testing.assert_close(out(merged, INPUTS), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(out(handle, INPUTS), expected)
    quantised.assert_same_stored(quantised.stored(base), before)


@each_form
def test_in_place_only_when_asked_and_unmerged_bit_for_bit(form, tmp_path, caplog):
    base = quantised.make(tmp_path, form)
    before = quantised.stored(base)
    handle = randomised(base, LoraConfig(**LORA)).eval()
    expected = out(handle, INPUTS)
    with pytest.raises(UsageError, match=r"14 of the adapted modules are quantised .*requantize=True"):
        handle.merge_adapter()
    assert torch.equal(out(handle, INPUTS), expected)
    with caplog.at_level("WARNING"):
        handle.merge_adapter(requantize=True)
    assert "merging requantised 14 weights" in caplog.text
    merged = out(handle, INPUTS)
    with handle.disable_adapter():
        without = out(handle, INPUTS)
    assert 0 < (merged - expected).norm() < (without - expected).norm()  # rounded, and nearer than without adapters
    after = quantised.stored(base)
    assert after.keys() == before.keys() and any(not torch.equal(after[name], before[name]) for name in before)
    with handle.disable_adapter():
        quantised.assert_same_stored(quantised.stored(base), before)
    assert torch.equal(out(handle, INPUTS), merged)
    handle.unmerge_adapter()
    quantised.assert_same_stored(quantised.stored(base), before)
    assert torch.equal(out(handle, INPUTS), expected)


@each_form
def test_requantised_models_stay_quantised_and_save(form, tmp_path):
    handle = randomised(quantised.make(tmp_path, form), LoraConfig(**LORA)).eval()
    merged = handle.merge_and_unload(requantize=True)
    assert sum(1 for _ in quantised_views(merged)) == 14
    merged.save_pretrained(tmp_path / "merged")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    quantised.assert_same_stored(quantised.stored(again), quantised.stored(merged))
    merged.train(), again.train()  # where the package does not repack
    torch.testing.assert_close(again(**INPUTS).logits, merged(**INPUTS).logits, rtol=1e-5, atol=1e-5)


def test_the_rounding_that_is_reported_is_what_was_rounded(caplog):
    base = nn.Sequential(linear4bit((64, 64), dtype=torch.float32, compute=torch.float32))
    handle = get_peft_model(base, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    view, adapter = view_of(base[0]), handle.tree("default").get_submodule("0")._adapter
    before = view.weight()
    change = (adapter.scale * adapter.lora_B @ adapter.lora_A).detach()
    with caplog.at_level("WARNING"):
        handle.merge_adapter(requantize=True)
    lost = (view.weight() - before - change).norm() / change.norm()
    assert f"error {lost.item():.3g} times the size" in caplog.text


@each_form
def test_what_is_not_finite_is_refused_and_nothing_is_merged(form, tmp_path):
    base = quantised.make(tmp_path, form)
    before, modules = quantised.stored(base), {name: id(module) for name, module in base.named_modules()}
    handle = randomised(base, LoraConfig(**LORA)).eval()
    expected = out(handle, INPUTS)
    last = handle.tree("default").get_submodule("model.layers.1.mlp.down_proj")._adapter
    with torch.no_grad():
        last.lora_A.mul_(1e25), last.lora_B.mul_(1e25)
        with pytest.raises(UsageError, match=r"non-finite values in model\.layers\.1\.mlp\.down_proj\.weight"):
            handle.merge_and_unload(safe_merge=True)
        with pytest.raises(UsageError, match=r"non-finite values in model\.layers\.1\.mlp\.down_proj\.weight"):
            handle.merge_adapter(safe_merge=True, requantize=True)
        last.lora_A.div_(1e25), last.lora_B.div_(1e25)
    assert {name: id(module) for name, module in base.named_modules()} == modules
    quantised.assert_same_stored(quantised.stored(base), before)
    torch.testing.assert_close(out(handle, INPUTS), expected, rtol=1e-5, atol=1e-5)


def test_adapters_on_what_is_not_quantised_merge_in_place(tmp_path):
    base = quantised.make(tmp_path, "nf4")
    handle = randomised(base, LoraConfig(target_modules=["embed_tokens", "lm_head"], init_lora_weights=False)).eval()
    before, expected = quantised.stored(base), out(handle, INPUTS)
    handle.merge_adapter()
    torch.testing.assert_close(out(handle, INPUTS), expected, rtol=1e-5, atol=1e-5)
    handle.unmerge_adapter()
    quantised.assert_same_stored(quantised.stored(base), before)


def test_merging_is_refused_for_the_same_reasons_as_on_a_dense_base(tmp_path):
    base = quantised.make(tmp_path, "nf4")
    first, second = randomised(base, LoraConfig(**LORA)), randomised(base, LoraConfig(**LORA))
    with pytest.raises(UsageError, match="1 other handle"):
        first.merge_and_unload()
    second.unload()
    assert type(first.merge_and_unload().model.layers[0].mlp.up_proj) is nn.Linear
