"""Quantised bases written to files, tensor by tensor."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from tests import quantised
from tunesmith import LoraConfig, UsageError, get_peft_model, load_base, resolve
from tunesmith.bases.quantise import quantise_folder
from tunesmith.cli.app import main


def by_transformers(source, quant_type="nf4", nested=True, **kwargs):
    config = tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype="bfloat16"
    )
    return tf.AutoModelForCausalLM.from_pretrained(source, quantization_config=config, **kwargs)


@pytest.mark.each_value_once
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom"])
def test_the_files_are_what_transformers_would_quantise_bit_for_bit(name, quant_type, nested, tmp_path):
    quantised.wide(name).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    quantise_folder(tmp_path / "dense", tmp_path / "ours", quant_type=quant_type, double_quant=nested)
    expected = by_transformers(tmp_path / "dense", quant_type, nested)
    found = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    quantised.assert_same_stored(quantised.stored(found), quantised.stored(expected))
    assert found.config.quantization_config.bnb_4bit_compute_dtype == torch.bfloat16 and found.dtype == expected.dtype


def test_many_shards_in_and_out(dense, tmp_path):
    tf.AutoModelForCausalLM.from_pretrained(dense).save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    done = quantise_folder(tmp_path / "shards", tmp_path / "ours", shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2 and done["modules"] == 14
    assert done["after"] < done["before"]
    found = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    quantised.assert_same_stored(quantised.stored(found), quantised.stored(by_transformers(dense)))


def test_the_command_line_quantises_sprout_with_its_tokenizer(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["quantize", "sprout", str(tmp_path / "sprout-4bit")])
    assert not stopped.value.code and "42 modules in 4 bits" in capsys.readouterr().out
    base = load_base(str(tmp_path / "sprout-4bit"))
    quantised.assert_same_stored(quantised.stored(base), quantised.stored(by_transformers(resolve("sprout"))))
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "sprout-4bit")
    handle = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    assert handle.generate(**tokenizer("I want you to act as", return_tensors="pt"), max_new_tokens=3).shape[1] > 5


def test_folders_in_use_are_left_alone(dense, tmp_path):
    for target in (dense, tmp_path / "a-file"):
        (tmp_path / "a-file").write_text("mine")
        with pytest.raises(UsageError, match="is not empty"):
            quantise_folder(dense, target)
    assert (tmp_path / "a-file").read_text() == "mine"
    quantise_folder(dense, tmp_path / "ours")
    with pytest.raises(UsageError, match="already quantised"):
        quantise_folder(tmp_path / "ours", tmp_path / "twice")


def test_a_damaged_source_leaves_nothing_behind(dense, tmp_path):
    path = dense / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UsageError, match=r"model\.safetensors is missing, damaged"):
        quantise_folder(dense, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    for command in (
        ["quantize", str(dense), str(tmp_path / "ours")],
        ["quantize", str(tmp_path / "none"), str(tmp_path / "ours")],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 1
    assert not (tmp_path / "ours").exists()


def test_a_run_that_dies_leaves_nothing_behind(dense, tmp_path, monkeypatch):
    import bitsandbytes.functional as functional

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(functional, "quantize_4bit", fail)
    with pytest.raises(MemoryError):
        quantise_folder(dense, tmp_path / "ours")
    assert not list((tmp_path / "ours").iterdir())


def test_files_with_other_names_than_the_models_are_refused(dense, tmp_path):
    tensors = {name.replace("q_proj", "query"): value for name, value in load_file(dense / "model.safetensors").items()}
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"do not hold model\.layers\.0\.self_attn\.q_proj\.weight \(2 of 14"):
        quantise_folder(dense, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
