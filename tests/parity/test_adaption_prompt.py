"""LLaMA-Adapter against the reference library, and its own contract: zero at first, exact when off, beside others."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf

import tunesmith as ts
from tests import tiny
from tests.handles import assert_same_gradients, gradients
from tests.parity.oracle import agree, ours_on, output, own_names, read_by_peft, tensors, theirs_on, written_by_peft
from tests.parity.test_files import with_labels
from tests.parity.test_generation import NEW, WAYS, both, prompt_of, uneven
from tunesmith import AdaptionPromptConfig, ConfigError, LoraConfig, TargetError
from tunesmith.checkpoint.names import named_tensors

SIZES = {**tiny.SIZES, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0}
MAKERS = {
    "llama": lambda: tiny.make("llama"),
    "mistral": lambda: _seeded(lambda: tf.MistralForCausalLM(tf.MistralConfig(**SIZES))),
    "gpt2": lambda: tiny.make("gpt2"),
}


def _seeded(make):
    torch.manual_seed(0)
    return make().eval()


def _config(**fields) -> AdaptionPromptConfig:
    return AdaptionPromptConfig(**{"adapter_len": 4, "adapter_layers": 2, "task_type": "CAUSAL_LM", **fields})


@pytest.mark.each_value_once
@pytest.mark.parametrize("options", [{}, {"adapter_layers": 1, "adapter_len": 1}], ids=["all layers", "last layer"])
@pytest.mark.parametrize("name", MAKERS)
def test_files_go_both_ways(name, options, tmp_path):
    agree(MAKERS[name](), "adaption", "CAUSAL_LM", tiny.inputs_for("llama"), tmp_path, **options)


def test_names_are_those_of_the_format_and_the_last_layers_get_the_tokens(tmp_path):
    ours_on(tiny.make("llama"), "adaption", "CAUSAL_LM", adapter_layers=1).save_pretrained(tmp_path)
    place = "base_model.model.model.layers.1.self_attn"
    assert {key: tuple(tensor.shape) for key, tensor in tensors(tmp_path).items()} == {
        f"{place}.adaption_prompt": (1, 4, 32),
        f"{place}.adaption_gate": (1,),
    }
    config = ts.PeftConfig.from_pretrained(tmp_path)
    assert config.target_modules == {"self_attn"} and config.to_dict()["target_modules"] == "self_attn"


@pytest.mark.parametrize("name", MAKERS)
def test_every_gradient_equals_the_references(name, tmp_path):
    base = MAKERS[name]()
    theirs = theirs_on(base, "adaption", "CAUSAL_LM")
    ours = ts.PeftModel.from_pretrained(base, written_by_peft(theirs, tmp_path), is_trainable=True).eval()
    for model in (ours, theirs):
        model(**with_labels("llama")).loss.backward()
    trained = own_names(theirs)
    mine = {in_file: t for in_file, _, t in named_tensors(ours.tree("default"), ours.peft_config["default"], base)}
    assert mine.keys() == trained.keys()
    for key, tensor in mine.items():
        torch.testing.assert_close(tensor.grad, trained[key].grad, atol=1e-5, rtol=0, msg=lambda text, key=key: key + text)
        assert tensor.grad.abs().max() > 1e-6, key


@pytest.mark.each_value_once
@pytest.mark.parametrize("way", ["greedy", "beams", "sampling", "without cache"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_equals_the_references_token_for_token(name, way, tmp_path):
    made = []
    for model in both(name, "adaption", tmp_path):
        torch.manual_seed(3)
        made.append(model.generate(**prompt_of(name), max_new_tokens=NEW, **WAYS[way]))
    assert made[0].tolist() == made[1].tolist()


def test_left_padded_batch_generates_each_rows_own_text():
    ours = ours_on(tiny.make("llama"), "adaption", "CAUSAL_LM")
    rows, batch = uneven("left")
    way = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    together = ours.generate(**batch, **way)
    for i, row in enumerate(rows):
        assert together[i, -NEW:].tolist() == ours.generate(input_ids=row, **way)[0, -NEW:].tolist()


@pytest.mark.parametrize("name", MAKERS)
def test_starts_as_the_base_and_is_switched_off_exactly(name):
    base, inputs = MAKERS[name](), tiny.inputs_for("llama")
    plain = output(base, inputs)
    assert torch.equal(output(ts.get_peft_model(base, _config()).eval(), inputs), plain)
    handle = ours_on(base, "adaption", "CAUSAL_LM")
    assert (output(handle, inputs) - plain).abs().max() > 1e-3
    with handle.disable_adapter():
        assert torch.equal(output(handle, inputs), plain)
    assert torch.equal(output(base, inputs), plain)


def test_a_bias_of_the_output_projection_is_added_once(tmp_path):
    """The reference adds it once more with the tokens' share, so its model is another from the start on."""
    base = _seeded(lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, attention_bias=True)))
    torch.nn.init.normal_(base.model.layers[1].self_attn.o_proj.bias)
    inputs = tiny.inputs_for("llama")
    handle = ts.get_peft_model(base, _config()).eval()
    torch.testing.assert_close(output(handle, inputs), output(base, inputs), atol=1e-6, rtol=0)
    handle.save_pretrained(tmp_path)
    assert (output(read_by_peft(base, tmp_path), inputs) - output(base, inputs)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "make",
    [
        lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES)),
        lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, head_dim=16)),
        lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**SIZES, head_dim=16)),
    ],
    ids=["qwen2", "qwen3", "gemma"],
)
def test_kin_of_llama_that_the_reference_does_not_know(make):
    """A gate of one and tokens that are the text's own words at position 0: their keys and values are the text's."""
    base, ids = _seeded(make), torch.randint(2, tiny.VOCAB, (1, 1))
    handle = ts.get_peft_model(base, _config(adapter_len=1, adapter_layers=1)).eval()
    seen = []
    attention = base.model.layers[1].self_attn

    def note(module, args, kwargs, result):
        seen.append((kwargs["hidden_states"], result[0]))

    hook = attention.register_forward_hook(note, with_kwargs=True)
    output(base, {"input_ids": ids})
    adapter = next(adapter for _, adapter in handle.tree("default").items())
    with torch.no_grad():
        adapter.adaption_prompt.copy_(seen[0][0])
        adapter.adaption_gate.fill_(1.0)
    output(handle, {"input_ids": ids})
    hook.remove()
    torch.testing.assert_close(seen[1][1], 2 * seen[0][1], atol=1e-5, rtol=0)  # one key: attention is the value itself


def test_adapters_on_the_attentions_projections_act_on_its_tokens():
    """Merged into the weights they give the same."""
    base, inputs = tiny.make("llama"), tiny.inputs_for("llama")
    handle = ours_on(base, "adaption", "CAUSAL_LM")
    alone = output(handle, inputs)
    handle.add_adapter("lora", LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False))
    handle.set_adapter(["default", "lora"])
    folded = output(handle, inputs)
    assert (folded - alone).abs().max() > 1e-3
    handle.merge_adapter(["lora"])
    torch.testing.assert_close(output(handle, inputs), folded, atol=1e-5, rtol=0)


@pytest.mark.each_value_once
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant):
    found = []
    for checkpointing in (False, True):
        base = MAKERS[name]().double()
        for module in base.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        handle = ours_on(base, "adaption", "CAUSAL_LM").train()
        if checkpointing:
            tiny.enable_recomputing(handle, {"use_reentrant": reentrant})
        handle(**with_labels("llama")).loss.backward()
        found.append(gradients(handle))
    assert_same_gradients(found[1], found[0], rtol=1e-9, atol=1e-14)


def test_handles_on_one_base_copies_and_bf16():
    base, inputs = tiny.make("llama").to(torch.bfloat16), tiny.inputs_for("llama")
    first, second = ours_on(base, "adaption", "CAUSAL_LM"), ours_on(base, "adaption", "CAUSAL_LM", adapter_len=2)
    assert all(p.dtype == torch.float32 for p in first.adapters.parameters())
    results = [output(first, inputs), output(second, inputs)]
    assert results[0].dtype == torch.bfloat16 and not torch.equal(*results)
    assert torch.equal(output(copy.deepcopy(first), inputs), results[0])
    assert torch.equal(output(second, inputs), results[1])


def test_the_head_of_a_classifier_is_trained_beside_it(tmp_path):
    base = tiny.make("llama-classifier")
    handle = ours_on(base, "adaption", "SEQ_CLS")
    handle(**with_labels("llama-classifier")).loss.backward()
    assert {name.split(".")[-1] for name, p in handle.adapters.named_parameters() if p.grad.abs().max() > 0} == {
        "adaption_prompt", "adaption_gate", "weight",
    }  # fmt: skip
    handle.save_pretrained(tmp_path)
    again = ts.PeftModel.from_pretrained(base, tmp_path).eval()
    inputs = tiny.inputs_for("llama-classifier")
    assert torch.equal(output(again, inputs), output(handle, inputs))


def test_it_cannot_be_merged():
    with pytest.raises(ts.UsageError, match="cannot be merged"):
        ours_on(tiny.make("llama"), "adaption", "CAUSAL_LM").merge_adapter()


BAD = {
    "adapter_len=None must be a whole number": {"adapter_len": None},
    "adapter_layers=0 must be a whole number": {"adapter_layers": 0},
    "must be a single name, that of the attention modules": {"target_modules": ["self_attn", "attn"]},
    "adapter_len='4' must be of type": {"adapter_len": "4"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_values_are_refused(message):
    with pytest.raises(ConfigError, match=message):
        _config(**BAD[message])


@pytest.mark.parametrize(
    ("name", "fields", "error", "message"),
    [
        ("llama", {"adapter_layers": 3}, ConfigError, "adapter_layers=3, but there are 2 attention modules"),
        ("llama", {"target_modules": "attention"}, TargetError, 'no module matches "attention"'),
        ("llama", {"target_modules": "mlp"}, TargetError, "LlamaMLP is not an attention module that LLaMA-Adapter supports"),
        ("opt", {}, TargetError, "OPTAttention is not an attention module that LLaMA-Adapter supports"),
    ],
)
def test_what_does_not_fit_the_base_is_refused(name, fields, error, message):
    with pytest.raises(error, match=message):
        ts.get_peft_model(tiny.make(name), _config(**fields))
