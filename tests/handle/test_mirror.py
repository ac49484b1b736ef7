"""A handle looks to the ecosystem like its base, and whatever is obtained from it acts with its adapters (rules 1, 2, 8)."""

from __future__ import annotations

import asyncio
import inspect
import types

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils.generic import find_labels

from tests import tiny
from tests.handles import lora, out, prompted
from tunesmith import LoraConfig, PeftModel, UsageError, get_peft_model
from tunesmith.runtime.frame import current_frame

# Class data in which a handle differs from its base on purpose.
DIFFERENT = {
    "_hf_peft_config_loaded",  # a handle has adapters: passes the Trainer's gate for quantised bases
    "base_model",  # the base itself, not its inner model
}

CLASSES = {
    "CAUSAL_LM": "PeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "PeftModelForSeq2SeqLM",
    "SEQ_CLS": "PeftModelForSequenceClassification",
    "TOKEN_CLS": "PeftModelForTokenClassification",
    "QUESTION_ANS": "PeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "PeftModelForFeatureExtraction",
}


def _handle(name):
    return lora(tiny.make(name), task_type=tiny.task_of(name))


def _data(cls):
    """`{name: value}` of what a class holds that is neither a method nor Python's own."""
    functions = (types.FunctionType, types.MethodType, classmethod, staticmethod, property)
    names = {name for name in dir(cls) if not name.startswith("__") and not hasattr(nn.Module, name)}
    found = {name: inspect.getattr_static(cls, name) for name in names}
    return {name: getattr(cls, name) for name, value in found.items() if not isinstance(value, functions)}


@pytest.mark.parametrize("name", tiny.MODELS)
def test_class_data_is_the_bases(name):
    handle = _handle(name)
    base_data = _data(type(handle.bare_base))
    handle_class = type(handle)
    wrong = {}
    for key, value in base_data.items():
        if key not in DIFFERENT and key in _data(PreTrainedModel) | {"config_class": 0, "base_model_prefix": 0}:
            found = getattr(handle_class, key, "absent")
            if found is not value and found != value:
                wrong[key] = (found, value)
    assert not wrong


@pytest.mark.parametrize("name", tiny.MODELS)
def test_instance_data_is_the_bases(name):
    handle = _handle(name)
    base = handle.bare_base
    wrong = {}
    for key in _data(type(base)).keys() | {
        "config",
        "device",
        "dtype",
        "name_or_path",
        "is_gradient_checkpointing",
        "loss_function",
    }:
        if key in DIFFERENT:
            continue
        found, value = getattr(handle, key, "absent"), getattr(base, key)
        if found is not value and found != value:
            wrong[key] = (found, value)
    assert not wrong


@pytest.mark.parametrize("name", tiny.MODELS)
def test_names_types_signature_and_labels(name):
    handle = _handle(name)
    base = handle.bare_base
    assert isinstance(handle, PeftModel) and isinstance(handle, PreTrainedModel)
    assert type(handle).__name__ == CLASSES[tiny.task_of(name)]
    assert isinstance(handle, getattr(__import__("tunesmith"), CLASSES[tiny.task_of(name)]))
    assert inspect.signature(handle.forward) == inspect.signature(base.forward)
    assert find_labels(type(handle)) == find_labels(type(base))
    assert handle.can_generate() == base.can_generate()


def test_one_class_per_task_and_base_class():
    assert type(_handle("llama")) is type(_handle("llama"))
    assert type(_handle("llama")) is not type(_handle("gpt2"))


def test_a_base_that_is_no_pretrained_model_gets_a_plain_handle():
    handle = lora(nn.Sequential(nn.Linear(3, 3)), target_modules=["0"])
    assert isinstance(handle, PeftModel) and not isinstance(handle, PreTrainedModel)
    assert inspect.signature(handle.forward) == inspect.signature(nn.Sequential.forward).replace(
        parameters=list(inspect.signature(nn.Sequential.forward).parameters.values())[1:]
    )


def test_configurations_that_a_client_writes_to_are_the_handles_own(llama, llama_inputs):
    handle = lora(llama)
    assert handle.config is handle.config is handle.model.config and handle.config == llama.config
    handle.generation_config.max_new_tokens = 3
    handle.config.output_hidden_states = True
    assert llama.generation_config.max_new_tokens != 3 and not llama.config.output_hidden_states
    assert handle.generate(llama_inputs["input_ids"]).shape[1] == llama_inputs["input_ids"].shape[1] + 3
    assert handle(**llama_inputs).hidden_states is not None and llama(**llama_inputs).hidden_states is None
    handle.some_flag = 1
    assert not hasattr(llama, "some_flag")


# --- the adapter mixin of transformers ---------------------------------------------------------------------------

MIXIN = sorted(
    name for name in vars(PeftAdapterMixin) if not name.startswith("_") and callable(getattr(PeftAdapterMixin, name))
)


def test_the_mixins_public_names_are_known():
    """When transformers adds one, this test asks for a decision."""
    assert MIXIN == [
        "active_adapters", "add_adapter", "delete_adapter", "disable_adapters", "enable_adapters", "enable_peft_hotswap",
        "get_adapter_state_dict", "load_adapter", "set_adapter",
    ]  # fmt: skip


@pytest.mark.parametrize("name", MIXIN)
def test_every_public_name_of_the_mixin_is_the_handles_own(llama, name):
    own = inspect.getattr_static(PeftModel, name)
    assert inspect.getattr_static(type(lora(llama)), name) is own is not inspect.getattr_static(PeftAdapterMixin, name)


def test_the_mixins_names_do_what_they_say(llama, llama_inputs, tmp_path):
    handle = lora(llama)
    expected, plain = out(handle, llama_inputs), out(llama, llama_inputs)
    handle.add_adapter(LoraConfig(init_lora_weights=False), "second")  # the mixin's order of arguments
    assert handle.active_adapters == ["default"]
    handle.set_adapter(["default", "second"])
    assert handle.active_adapters == ["default", "second"]
    handle.disable_adapters()
    assert torch.equal(out(handle, llama_inputs), plain)
    handle.enable_adapters()
    handle.delete_adapter("second")
    assert torch.equal(out(handle, llama_inputs), expected)
    tensors = handle.get_adapter_state_dict()
    assert tensors.keys() == handle.get_adapter_state_dict("default").keys()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    with pytest.raises(UsageError):
        handle.enable_peft_hotswap(target_rank=16)
    handle.save_pretrained(tmp_path)
    handle.load_adapter(str(tmp_path), adapter_name="third")
    handle.load_adapter(str(tmp_path), adapter_name="fourth")
    handle.set_adapter("fourth")
    assert torch.equal(out(handle, llama_inputs), expected)
    handle.delete_adapter(["third", "fourth"])
    assert list(handle.peft_config) == ["default"]


# --- what a handle passes on --------------------------------------------------------------------------------------


def test_embeddings_obtained_from_a_handle_act_and_cannot_be_replaced(llama, llama_inputs):
    ids = llama_inputs["input_ids"]
    handle = lora(llama, target_modules=["embed_tokens", "lm_head"])
    embeds = handle.get_input_embeddings()(ids)
    assert torch.equal(out(handle, {"inputs_embeds": embeds}), out(handle, {"input_ids": ids}))
    assert not torch.equal(embeds, llama.get_input_embeddings()(ids))
    assert isinstance(handle.get_output_embeddings(), nn.Linear)
    with pytest.raises(UsageError, match="embed_tokens of model cannot be changed"):
        handle.set_input_embeddings(nn.Embedding(tiny.VOCAB, 32))


def test_resizing_through_a_handle_resizes_the_base(llama):
    handle = lora(llama)
    handle.base_model.resize_token_embeddings(tiny.VOCAB + 4)
    assert llama.config.vocab_size == handle.config.vocab_size == tiny.VOCAB + 4
    assert handle.get_input_embeddings().num_embeddings == tiny.VOCAB + 4


def test_an_encoder_obtained_from_a_handle_runs_with_its_adapters():
    handle, inputs = _handle("t5"), tiny.inputs_for("t5")
    base, ids = handle.bare_base, inputs["input_ids"]
    encoder = handle.get_encoder()
    with torch.no_grad():
        states = handle(**inputs, output_hidden_states=True).encoder_last_hidden_state
        assert torch.equal(encoder(ids).last_hidden_state, states)
        assert not torch.allclose(base.get_encoder()(ids).last_hidden_state, states, atol=1e-3)
        with handle.disable_adapter():
            assert torch.equal(encoder(ids).last_hidden_state, base.get_encoder()(ids).last_hidden_state)
    assert current_frame() is None
    assert encoder.config == base.get_encoder().config, "and looks like itself"


def test_a_decoder_obtained_from_a_handle_runs_with_its_adapters(llama, llama_inputs):
    handle = lora(llama)
    with torch.no_grad():
        states = handle.get_decoder()(**llama_inputs).last_hidden_state
        assert torch.equal(llama.lm_head(states), out(handle, llama_inputs))
    with pytest.raises(UsageError, match="virtual tokens"):
        prompted(llama).get_decoder()(**llama_inputs)


@pytest.mark.parametrize("name", ["t5", "mt5"])
def test_encoder_decoder_generation_acts_on_the_encoder(name):
    """`generate` calls the encoder past the model's forward."""
    torch.manual_seed(1)
    base, ids = tiny.make(name).double(), tiny.inputs_for(name)["input_ids"]
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM", target_modules=r"encoder.*\.(q|v|o|wo)", init_lora_weights=False, lora_alpha=64
    )
    handle = get_peft_model(base, config)
    acted = set()
    for path, adapter in handle.adapters["default"].items():
        adapter.register_forward_hook(lambda *_, path=path: acted.add(path))
    settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = handle.generate(ids, **settings)
    assert len(acted) == len(dict(handle.adapters["default"].items()))
    merged = handle.merge_and_unload(copy=True).generate(ids, **settings)
    plain = base.generate(ids, **settings)
    torch.testing.assert_close(found.logits[0], merged.logits[0], rtol=1.3e-6, atol=1e-6)
    assert torch.equal(found.sequences, merged.sequences)
    assert not torch.allclose(found.logits[0], plain.logits[0], atol=1e-3)


@pytest.mark.each_value_once
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}], ids=["greedy", "beams", "sample"])
@pytest.mark.parametrize("name", tiny.GENERATING)
def test_generation_equals_that_of_the_merged_model(name, how):
    handle, ids = _handle(name), tiny.inputs_for(name)["input_ids"]
    merged = handle.merge_and_unload(copy=True)
    results = []
    for model in (handle, merged):
        torch.manual_seed(0)
        results.append(model.generate(ids, max_new_tokens=5, **how))
    assert torch.equal(*results)


class Custom(tiny.tf.LlamaForCausalLM):
    """A base with methods of its own."""

    def embed(self, ids):
        return self.model(ids).last_hidden_state

    def stream(self, ids):
        yield self.embed(ids)

    def lazily(self, ids):
        return (self.embed(ids) for _ in range(2))

    async def later(self, ids):
        return self.embed(ids)

    @property
    def answer(self):
        return 42

    @torch.no_grad()
    def wrapped_stream(self, ids):
        yield self.embed(ids)


@pytest.fixture
def custom():
    return Custom(tiny._llama_config()).eval()


def test_custom_methods_of_the_base_run_with_the_adapters(custom, llama_inputs):
    handle, ids = lora(custom), llama_inputs["input_ids"]
    with torch.no_grad():
        assert torch.equal(handle.embed(ids), handle.get_decoder()(ids).last_hidden_state)
        assert not torch.allclose(handle.embed(ids), custom.embed(ids), atol=1e-3)
    assert current_frame() is None
    assert handle.answer == 42
    assert inspect.signature(handle.embed) == inspect.signature(custom.embed)


@pytest.mark.parametrize("method", ["stream", "lazily", "later", "wrapped_stream"])
def test_what_runs_after_the_call_runs_with_the_adapters_and_holds_no_frame(custom, llama_inputs, method):
    """A frame must not be held across a `yield`: the caller's steps in between would run in it."""
    handle, ids = lora(custom), llama_inputs["input_ids"]
    running = getattr(handle, method)(ids)
    with torch.no_grad():
        found = asyncio.run(running) if inspect.iscoroutine(running) else next(running)
        assert current_frame() is None
        assert torch.equal(found, handle.embed(ids))
        assert not torch.allclose(found, custom.embed(ids), atol=1e-3)


def test_unknown_names_are_unknown(llama):
    handle = lora(llama)
    assert not hasattr(handle, "no_such_thing")
    with pytest.raises(AttributeError, match="no_such_thing"):
        handle.no_such_thing  # noqa: B018


def test_a_pipeline_takes_a_handle(llama):
    """Pipelines look at class names and configs."""
    handle = lora(llama, task_type="CAUSAL_LM")
    assert type(handle).__name__ in ("PeftModelForCausalLM",)
    assert transformers.AutoModelForCausalLM._model_mapping[type(handle.config)] is type(llama)
