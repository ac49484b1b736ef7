"""Facts about architectures, as releases of transformers tell them differently."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import transformers as tf
from torch import nn

from tests import tiny
from tunesmith.bases import architecture


def described(**fields) -> SimpleNamespace:
    """A configuration of an older release."""
    return SimpleNamespace(**{"num_attention_heads": 4, "hidden_size": 32, **fields})


@pytest.mark.parametrize(
    "fields, shapes",
    [
        ({}, {(4, 8)}),
        ({"num_key_value_heads": 2, "head_dim": 16}, {(2, 16)}),
        ({"d_kv": 5}, {(4, 5)}),
        ({"multi_query": True}, {(1, 8)}),
        ({"multi_query": True, "new_decoder_architecture": True, "num_key_value_heads": 2}, {(2, 8)}),
        ({"head_dim": 8, "global_head_dim": 16}, {(4, 8), (4, 16)}),
        ({"head_dim": 8, "global_head_dim": 8}, {(4, 8)}),
    ],
)
def test_shapes_of_keys_where_one_configuration_describes_all_layers(fields, shapes):
    assert architecture.key_shapes(described(**fields), 2) == shapes


def test_shapes_of_keys_where_each_layer_has_its_own_configuration():
    layers = [described(head_dim=8), described(head_dim=16, num_key_value_heads=1)]
    assert architecture.key_shapes(described(per_layer_config=layers), 2) == {(4, 8), (1, 16)}


@pytest.mark.parametrize("name, shapes", [("llama", {(2, 8)}), ("gpt2", {(4, 8)}), ("t5", {(4, 8)}), ("bloom", {(4, 8)})])
def test_shapes_of_keys_of_the_installed_release(name, shapes):
    assert architecture.key_shapes(tiny.make(name).config, 2) == shapes


@pytest.mark.parametrize("name", tiny.MODELS)
def test_sizes_of_every_family(name):
    config = tiny.make(name).config
    assert (architecture.layers_in(config), architecture.heads_in(config)) == (2, 4)
    assert (architecture.hidden_size(config), architecture.vocabulary(config)) == (32, tiny.VOCAB)
    assert architecture.is_encoder_decoder(config) == (tiny.task_of(name) == "SEQ_2_SEQ_LM")
    assert architecture.is_decoder_only(config) == (tiny.task_of(name) != "SEQ_2_SEQ_LM")


def test_plain_modules_have_no_facts():
    config = architecture.config_of(nn.Linear(2, 2))
    assert config is None and architecture.model_type(config) is None and architecture.longest_input(config) is None
    assert not architecture.is_encoder_decoder(config) and not architecture.is_decoder_only(config)
    assert not architecture.caps_logits(config) and not architecture.ties_embeddings(config)
    assert architecture.layers_in(config) is None and architecture.output_head(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_table_of_positions_is_found_by_its_names(name):
    has_table = name.startswith(("gpt2", "opt", "bert"))
    assert (architecture.position_table(tiny.make(name)) is not None) is has_table


@pytest.mark.parametrize("config, caps", [(tf.Gemma2Config(), True), (tf.Gemma3TextConfig(), False), (tf.LlamaConfig(), False)])
def test_capped_logits(config, caps):
    assert architecture.caps_logits(config) is caps


@pytest.mark.parametrize("adds", [True, False])
def test_loss_of_routers(adds):
    assert architecture.adds_router_loss(tf.MixtralConfig(output_router_logits=adds)) is adds
    assert not architecture.adds_router_loss(None)


@pytest.mark.parametrize("kind, turns", [("default", False), ("dynamic", True), ("longrope", True)])
def test_rotary_positions_that_depend_on_the_longest_text(kind, turns):
    assert architecture.rope_depends_on_length(SimpleNamespace(rope_parameters={"rope_type": kind})) is turns


def test_another_attention_is_named_in_a_copy():
    config = tiny.make("llama").config
    before = config._attn_implementation
    assert architecture.with_attention(config, "other")._attn_implementation == "other"
    assert config._attn_implementation == before != "other"


def test_attentions_and_the_stacks_around_them():
    found = {type(module).__name__ for _, module in architecture.attention_modules(tiny.make("llama"))}
    assert found == {"LlamaModel", "LlamaAttention"}


def test_attentions_that_do_not_ask_transformers_for_their_function():
    class Own(nn.Module):  # its home, this module, has no table
        is_causal, config = True, SimpleNamespace()

    reason = architecture.attention_fault(nn.Sequential(Own()).named_modules())
    assert reason is not None and "0 has its own attention implementation" in reason


@pytest.mark.parametrize("kind, faulty", [("eager", False), ("sdpa", True)])
def test_capped_scores_that_sdpa_would_leave_uncapped(kind, faulty):
    model = tf.LlamaModel(tf.LlamaConfig(**tiny.SIZES, attn_implementation=kind))
    assert architecture.attention_fault(model.named_modules()) is None
    model.config.attn_logit_softcapping = 2.0
    assert bool(architecture.attention_fault(model.named_modules())) is faulty


class Newer:
    def activation_checkpointing_enable(self, settings=None):
        self.called = "new", settings

    def gradient_checkpointing_enable(self, settings=None):
        raise AssertionError("warns")


class Older:
    def gradient_checkpointing_enable(self, settings=None):
        self.called = "old", settings


@pytest.mark.parametrize("kind, name", [(Newer, "new"), (Older, "old")])
def test_gradient_checkpointing_under_either_name(kind, name):
    model = kind()
    architecture.enable_recomputing(model, {"use_reentrant": False})
    assert model.called == (name, {"use_reentrant": False})


def test_recomputing_of_the_installed_release():
    model = tiny.make("llama")
    assert not any(map(architecture.recomputes, model.modules()))
    architecture.enable_recomputing(model)
    assert any(map(architecture.recomputes, model.modules()))
