"""Adapters that bring their base, and what they cannot bring."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import tunesmith as ts
from tests import tiny
from tests.bad_input import INPUTS, edit_config, one_error
from tests.parity.oracle import ours_on, output
from tunesmith import ConfigError, UsageError


def test_adapter_that_names_no_base_cannot_bring_it(saved):
    edit_config(saved, base_model_name_or_path=None)
    with one_error(ConfigError, "names no base model", r"load the base and call PeftModel.from_pretrained"):
        ts.AutoPeftModelForCausalLM.from_pretrained(saved)


def test_auto_class_of_another_task(saved):
    with one_error(ConfigError, "was made for CAUSAL_LM; AutoPeftModelForSeq2SeqLM loads SEQ_2_SEQ_LM"):
        ts.AutoPeftModelForSeq2SeqLM.from_pretrained(saved)


@pytest.fixture
def with_base(saved, tmp_path):
    """An adapter's folder whose base is in a folder, too."""
    tiny.make("llama").save_pretrained(tmp_path / "base")
    edit_config(saved, base_model_name_or_path=str(tmp_path / "base"))
    return saved


# What scripts give, to the base or the adapter.
GIVEN = {
    "torch_dtype": torch.float32, "dtype": "float32", "device_map": "cpu", "token": None, "use_auth_token": None,
    "cache_dir": None, "force_download": False, "local_files_only": True, "trust_remote_code": False, "subfolder": "",
    "low_cpu_mem_usage": True, "ephemeral_gpu_offload": False, "torch_device": "cpu", "autocast_adapter_dtype": False,
    "attn_implementation": "eager", "is_trainable": True, "revision": "main", "import_allowlist": ["transformers"],
    "key_mapping": None, "max_memory": None,
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_what_scripts_give_reaches_the_base_or_the_adapter(name, with_base):
    expected = output(ts.PeftModel.from_pretrained(tiny.make("llama"), with_base), INPUTS)
    handle = ts.AutoPeftModelForCausalLM.from_pretrained(with_base, **{name: GIVEN[name]})
    torch.testing.assert_close(output(handle, INPUTS), expected, rtol=0, atol=1e-5)


def test_the_type_reaches_the_base(with_base):
    assert ts.AutoPeftModelForCausalLM.from_pretrained(with_base, dtype=torch.bfloat16).base_model.dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "meant"), [("device_mpa", "device_map"), ("subfoldr", "subfolder")])
def test_a_misspelt_option_is_one_error(name, meant, with_base):
    with one_error(UsageError, f'"{name}" is no option', f"did you mean '{meant}'"):
        ts.AutoPeftModelForCausalLM.from_pretrained(with_base, **{name: "auto"})


def test_a_mapping_names_the_class_of_a_base_without_a_task(tmp_path):
    config = tf.WhisperConfig(
        vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=16, max_target_positions=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    base = tf.WhisperForConditionalGeneration(config)
    base.save_pretrained(tmp_path / "base")
    ours_on(base, "lora", None).save_pretrained(tmp_path / "adapter")
    mapping = {"base_model_class": "WhisperForConditionalGeneration", "parent_library": "transformers.models.whisper"}
    edit_config(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"), auto_mapping=mapping)
    handle = ts.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert type(handle.bare_base) is tf.WhisperForConditionalGeneration


def test_a_tokenizer_with_more_tokens_than_the_base_makes_room_for_them(with_base):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"w{i}": i for i in range(100)}
    tf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0"))).save_pretrained(with_base)
    handle = ts.AutoPeftModelForCausalLM.from_pretrained(with_base)
    assert output(handle, INPUTS).shape[-1] == 100
