"""Quantised bases in files: written tensor by tensor, and looked into before they are loaded."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from tests import quantised, tiny
from tests.handles import out
from tunesmith import AutoPeftModelForCausalLM, LoraConfig, UsageError, get_peft_model, load_base, resolve
from tunesmith.bases.quantise import quantise_folder
from tunesmith.cli.app import main

INPUTS = tiny.inputs_for("llama")


@pytest.fixture
def dense(tmp_path):
    quantised.wide().to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def by_transformers(source, quant_type="nf4", nested=True, **kwargs):
    config = tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype="bfloat16"
    )
    return tf.AutoModelForCausalLM.from_pretrained(source, quantization_config=config, **kwargs)


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
    with pytest.raises(UsageError, match="quantised already"):
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


Q = "model.layers.0.self_attn.q_proj"
STATE = f"{Q}.weight.quant_state.bitsandbytes__nf4"


def state_with(**changes):
    def change(tensors):
        state = {**json.loads(bytes(tensors[STATE].tolist())), **changes}
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


DAMAGES = {
    "codes too short": (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:-8]}), "weight has 2,040 bytes, 2,048 expected"),
    "scales too short": (lambda t: t.update({f"{Q}.weight.absmax": t[f"{Q}.weight.absmax"][1:]}), "absmax has 63 values, 64"),
    "scales of another type": (
        lambda t: t.update({f"{Q}.weight.absmax": t[f"{Q}.weight.absmax"].float()}), "absmax is stored as torch.float32"),
    "no levels": (lambda t: t.pop(f"{Q}.weight.quant_map"), "weight.quant_map is missing"),
    "nested scales not finite": (lambda t: t[f"{Q}.weight.nested_absmax"].fill_(float("nan")), "nested_absmax holds values"),
    "no state": (lambda t: t.pop(STATE), "its quant_state is missing"),
    "state is no text": (lambda t: t[STATE].fill_(255), r"quant_state cannot be read \(UnicodeDecodeError\)"),
    "state is cut off": (lambda t: t.update({STATE: t[STATE][:-20]}), r"quant_state cannot be read \(JSONDecodeError\)"),
    "state is a list": (lambda t: t.update({STATE: torch.tensor([91, 93], dtype=torch.uint8)}), "quant_state cannot be read"),
    "state of another kind": (state_with(quant_type="fp4"), "quant_state is of fp4, its name says nf4"),
    "absurd shape": (state_with(shape=[10**9, 64]), "bytes, 32,000,000,000 expected"),
    "no shape": (state_with(shape=None), "no usable shape"),
    "block size of seven": (state_with(blocksize=7), "no usable blocksize"),
    "type of nothing": (state_with(dtype="int8"), "no usable dtype"),
    "offset of nothing": (state_with(nested_offset=float("nan")), "no usable nested_offset"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_one_clear_error(damage, dense, tmp_path):
    quantise_folder(dense, tmp_path / "base")
    get_peft_model(load_base(str(tmp_path / "base")), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    change, message = DAMAGES[damage]
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    for load in (
        lambda: load_base(str(tmp_path / "base")),
        lambda: AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            load()
        assert "its files are damaged" in str(caught.value) and Q in str(caught.value)


def test_truncated_and_missing_files(dense, tmp_path):
    quantise_folder(dense, tmp_path / "base", shard_bytes=20_000)
    shard = sorted((tmp_path / "base").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:4], b""):
        shard.write_bytes(content)
        with pytest.raises(UsageError, match=rf"damaged.*\n.*{shard.name}"):
            load_base(str(tmp_path / "base"))
    shard.unlink()
    with pytest.raises(UsageError, match=rf"damaged.*\n.*{shard.name}"):
        load_base(str(tmp_path / "base"))
    (tmp_path / "base" / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UsageError, match=r"index\.json is damaged"):
        load_base(str(tmp_path / "base"))


def test_8_bit_files_are_looked_into_too(dense, tmp_path):
    quantised.load(dense, "int8").save_pretrained(tmp_path / "base")
    expected = load_file(tmp_path / "base" / "model.safetensors")
    for change, message in (
        (lambda t: t.update({f"{Q}.SCB": t[f"{Q}.SCB"][1:]}), r"SCB has shape \[63\], \[64\] expected"),
        (lambda t: t[f"{Q}.SCB"].fill_(float("inf")), "SCB holds values that are not finite"),
        (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].float()}), "a matrix of I8 expected"),
        (lambda t: t.pop(f"{Q}.weight"), "weight is missing"),
    ):
        tensors = {name: value.clone() for name, value in expected.items()}
        change(tensors)
        save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UsageError, match=message):
            load_base(str(tmp_path / "base"))


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_whole_files_of_another_model_do_not_fit_and_say_so(form, dense, tmp_path):
    """Each file is sound, but one weight is of another shape than the configuration's."""
    quantised.load(dense, form).save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    other = Q.replace("q_proj", "k_proj")
    for name in [name for name in tensors if name.startswith(f"{Q}.")]:
        tensors[name] = tensors[name.replace(Q, other)].clone()
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((UsageError, RuntimeError), match=r"shape|size"):
        load_base(str(tmp_path / "base"))


def test_sound_folders_load_and_dense_ones_are_none_of_its_business(dense, tmp_path):
    quantise_folder(dense, tmp_path / "base")
    assert out(load_base(str(tmp_path / "base")).train(), INPUTS).isfinite().all()
    assert load_base(str(dense)).dtype == torch.bfloat16
