"""Whatever is wrong with an adapter's files: one clear error, and everything is as it was before."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
import struct

import peft
import pytest
import torch

import tunesmith as ts
from tests import tiny
from tests.bad_input import BIN, CONFIG, INPUTS, WEIGHTS, Snapshot, edit_config, edit_tensors, one_error, sites
from tests.parity.oracle import ours_on, output, tensors
from tunesmith import AdapterFileError, ConfigError, TargetError, UsageError


def damage(name):
    """Register a way to spoil an adapter's folder, with the error it must lead to."""

    def add(function):
        DAMAGES[name] = function
        return function

    return add


DAMAGES: dict = {}
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def _header(folder, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


@damage("truncated weights")
def _(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    return AdapterFileError, [WEIGHTS, "damaged", "download or save the adapter again"]


@damage("weights cut inside the header")
def _(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:40])
    return AdapterFileError, ["damaged", "again"]


@damage("empty weights")
def _(folder):
    (folder / WEIGHTS).write_bytes(b"")
    return AdapterFileError, ["damaged", "again"]


@damage("weights that are no safetensors")
def _(folder):
    (folder / WEIGHTS).write_bytes(b"<html>404 not found</html>" * 20)
    return AdapterFileError, ["damaged or not a safetensors file", "again"]


@damage("absurd header length")
def _(folder):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + b"{}")
    return AdapterFileError, ["damaged", "again"]


@damage("overlapping tensors")
def _(folder):
    entry = {"dtype": "F32", "shape": [4, 32], "data_offsets": [0, 512]}
    _header(folder, dict.fromkeys(tensors(folder), entry), bytes(512))
    return AdapterFileError, ["damaged", "again"]


@damage("tensor beyond the end")
def _(folder):
    _header(folder, {FIRST: {"dtype": "F32", "shape": [4, 32], "data_offsets": [0, 512]}}, bytes(8))
    return AdapterFileError, ["damaged", "again"]


@damage("shape that is not the data's")
def _(folder):
    _header(folder, {FIRST: {"dtype": "F32", "shape": [4, 3200000000], "data_offsets": [0, 512]}}, bytes(512))
    return AdapterFileError, ["damaged", "again"]


@damage("wrong type")
def _(folder):
    edit_tensors(folder, lambda v: v.update({FIRST: v[FIRST].to(torch.int32)}))
    return AdapterFileError, [FIRST, "holds torch.int32", "expected a dtype like torch.float32", "nothing was loaded"]


@damage("complex numbers")
def _(folder):
    edit_tensors(folder, lambda v: v.update({FIRST: v[FIRST].to(torch.complex64)}))
    return AdapterFileError, [FIRST, "holds torch.complex64"]


@damage("wrong shape")
def _(folder):
    edit_tensors(folder, lambda v: v.update({FIRST: torch.zeros(5, 32)}))
    return AdapterFileError, [FIRST, r"shape \(5, 32\), the base needs \(4, 32\)"]


@damage("transposed")
def _(folder):
    edit_tensors(folder, lambda v: v.update({FIRST: v[FIRST].T.contiguous()}))
    return AdapterFileError, [FIRST, r"shape \(32, 4\), the base needs \(4, 32\)"]


@damage("NaN")
def _(folder):
    edit_tensors(folder, lambda v: v[FIRST].view(-1)[:1].fill_(float("nan")))
    return AdapterFileError, [FIRST, r"not finite \(NaN or infinity\)"]


@damage("infinity")
def _(folder):
    edit_tensors(folder, lambda v: v[FIRST].view(-1)[-1:].fill_(float("-inf")))
    return AdapterFileError, [FIRST, "not finite"]


@damage("number that is infinite in the adapter's type")
def _(folder):
    edit_tensors(folder, lambda v: v.update({FIRST: v[FIRST].double().fill_(1e300)}))
    return AdapterFileError, [FIRST, "not finite"]


@damage("NaN in 8 bits")
def _(folder):
    edit_tensors(folder, lambda v: v.update({FIRST: torch.full((4, 32), float("nan")).to(torch.float8_e4m3fn)}))
    return AdapterFileError, [FIRST, "not finite"]


@damage("missing tensor")
def _(folder):
    edit_tensors(folder, lambda v: v.pop(FIRST))
    return AdapterFileError, [f'"{FIRST}" is missing', "again"]


@damage("no tensors at all")
def _(folder):
    edit_tensors(folder, dict.clear)
    return AdapterFileError, [f'"{FIRST}" is missing']


@damage("misspelt tensor")
def _(folder):
    edit_tensors(folder, lambda v: v.update({FIRST.replace("q_proj", "q_prj"): v.pop(FIRST)}))
    return AdapterFileError, [f'"{FIRST}" is missing', "q_prj.*belongs to no part of the adapter; did you mean"]


@damage("extra tensor")
def _(folder):
    edit_tensors(folder, lambda v: v.update({"base_model.model.extra.lora_A.weight": torch.zeros(1)}))
    return AdapterFileError, [r'"base_model.model.extra.lora_A.weight" belongs to no part']


@damage("weights of the base")
def _(folder):
    edit_tensors(folder, lambda v: v.update({"base_model.model.model.norm.weight": torch.zeros(32)}))
    return AdapterFileError, [r'"base_model.model.model.norm.weight" belongs to no part']


@damage("embeddings of another vocabulary")
def _(folder):
    edit_tensors(folder, lambda v: v.update({"base_model.model.lm_head.weight": torch.zeros(97, 32)}))
    return AdapterFileError, [r'"base_model.model.lm_head.weight" has the shape \(97, 32\), the base needs']


@damage("weights of the prefix only")
def _(folder):
    edit_tensors(folder, lambda v: [v.update({k.removeprefix("base_model.model."): v.pop(k)}) for k in list(v)])
    return AdapterFileError, ["is missing", "belongs to no part"]


@damage("all faults at once")
def _(folder):
    def change(values):
        values[FIRST] = torch.zeros(5, 32)
        values.pop(FIRST.replace("lora_A", "lora_B"))
        values["extra"] = torch.zeros(1)

    edit_tensors(folder, change)
    return AdapterFileError, ["has the shape", "is missing", '"extra" belongs to no part']


@damage("config that is no JSON")
def _(folder):
    (folder / CONFIG).write_text("{'r': 8}")
    return AdapterFileError, [CONFIG, "not valid JSON", "again"]


@damage("config that is binary")
def _(folder):
    (folder / CONFIG).write_bytes(b"\xff\xfe\x00\x01")
    return AdapterFileError, [CONFIG, "not valid JSON"]


@damage("empty config")
def _(folder):
    (folder / CONFIG).write_text("")
    return AdapterFileError, [CONFIG, "not valid JSON"]


@damage("config nested without end")
def _(folder):
    (folder / CONFIG).write_text("[" * 200_000)
    return AdapterFileError, [CONFIG, "not valid JSON"]


@damage("config with an endless number")
def _(folder):
    (folder / CONFIG).write_text('{"peft_type": "LORA", "r": ' + "9" * 100_000 + "}")
    return AdapterFileError, [CONFIG, "not valid JSON"]


@damage("config that is a list")
def _(folder):
    (folder / CONFIG).write_text('["LORA"]')
    return AdapterFileError, [CONFIG, "holds a list, expected a JSON object"]


@damage("config that is null")
def _(folder):
    (folder / CONFIG).write_text("null")
    return AdapterFileError, ["holds a NoneType, expected a JSON object"]


@damage("config without a method")
def _(folder):
    edit_config(folder, peft_type=...)
    return ConfigError, [CONFIG, 'no "peft_type"']


@damage("unknown method")
def _(folder):
    edit_config(folder, peft_type="LORRA")
    return ConfigError, [CONFIG, '"LORRA" is not known', "did you mean 'LORA'"]


@damage("method that is no text")
def _(folder):
    edit_config(folder, peft_type={"a": 1})
    return ConfigError, ["is not known"]


@damage("unknown key that acts")
def _(folder):
    edit_config(folder, use_magic=True)
    return ConfigError, [CONFIG, '"use_magic"']


@damage("known feature that this version lacks")
def _(folder):
    edit_config(folder, layer_replication=[[0, 2]])
    return ConfigError, ["layer_replication=", "not supported by this version"]


@damage("value of the wrong type")
def _(folder):
    edit_config(folder, lora_alpha="16")
    return ConfigError, [CONFIG, "lora_alpha='16'"]


@damage("alpha that is not a number")
def _(folder):
    (folder / CONFIG).write_text((folder / CONFIG).read_text().replace('"lora_alpha": 8', '"lora_alpha": NaN'))
    return ConfigError, ["lora_alpha=nan must be a finite number"]


@damage("rank of the config alone")
def _(folder):
    edit_config(folder, r=8)
    return AdapterFileError, [FIRST, r"shape \(4, 32\), the base needs \(8, 32\)"]


@damage("rank that no machine holds")
def _(folder):
    edit_config(folder, r=10**15)
    return AdapterFileError, ["cannot be built here"]


@damage("targets of another base")
def _(folder):
    edit_config(folder, target_modules=["c_attn"], base_model_name_or_path="openai/gpt2")
    return TargetError, [r'adapter" \(made for "openai/gpt2"\)', 'no module matches "c_attn"', '"q_proj"']


@damage("other widths than the base's")
def _(folder):
    base = tiny.tf.LlamaForCausalLM(tiny._llama_config(hidden_size=64))
    shutil.rmtree(folder)
    ours_on(base, "lora", "CAUSAL_LM").save_pretrained(folder)
    edit_config(folder, base_model_name_or_path="some/llama")
    return AdapterFileError, [
        r'made for "some/llama"',
        r"shape \(4, 64\), the base needs \(4, 32\)",
        "use the base it was made for",
    ]


@damage("more layers than the base's")
def _(folder):
    base = tiny.tf.LlamaForCausalLM(tiny._llama_config(num_hidden_layers=3))
    shutil.rmtree(folder)
    ours_on(base, "lora", "CAUSAL_LM").save_pretrained(folder)
    return AdapterFileError, [r"layers.2.self_attn.q_proj.lora_A.weight\" belongs to no part"]


@damage("no config")
def _(folder):
    (folder / CONFIG).unlink()
    return AdapterFileError, [f"holds no {CONFIG}, so it is not an adapter"]


@damage("adapters only in folders inside")
def _(folder):
    (folder / "second").mkdir()
    (folder / CONFIG).rename(folder / "second" / CONFIG)
    return AdapterFileError, [f"holds no {CONFIG}", "adapters inside it: second"]


@damage("no weights")
def _(folder):
    (folder / WEIGHTS).unlink()
    return AdapterFileError, [f"has a {CONFIG} but no {WEIGHTS}", "again"]


@damage("folder in place of the config")
def _(folder):
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()
    return AdapterFileError, [f"holds no {CONFIG}"]


@damage("folder in place of the weights")
def _(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    return AdapterFileError, [f"no {WEIGHTS}"]


@damage("config that links to nothing")
def _(folder):
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to(folder / "nowhere")
    return AdapterFileError, [f"holds no {CONFIG}"]


@damage("config that links to itself")
def _(folder):
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to(folder / CONFIG)
    return AdapterFileError, [f"holds no {CONFIG}"]


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, place) -> None:
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


@damage("pickle that runs code")
def _(folder):
    (folder / WEIGHTS).unlink()
    torch.save({FIRST: Payload(folder.parent / "pwned")}, folder / BIN)
    return AdapterFileError, [BIN, "runs no code from pickles", f"ask its author for {WEIGHTS}"]


@damage("bare pickle that runs code")
def _(folder):
    (folder / WEIGHTS).unlink()
    (folder / BIN).write_bytes(pickle.dumps(Payload(folder.parent / "pwned")))
    return AdapterFileError, [BIN, "runs no code from pickles"]


@damage("pickle of something else")
def _(folder):
    (folder / WEIGHTS).unlink()
    torch.save([torch.zeros(3)], folder / BIN)
    return AdapterFileError, [BIN, "something other than named tensors"]


@damage("pickle with more than tensors")
def _(folder):
    values = tensors(folder)
    (folder / WEIGHTS).unlink()
    torch.save({**values, "epoch": 3}, folder / BIN)
    return AdapterFileError, [BIN, "something other than named tensors"]


@damage("truncated pickle")
def _(folder):
    values = tensors(folder)
    (folder / WEIGHTS).unlink()
    torch.save(values, folder / BIN)
    (folder / BIN).write_bytes((folder / BIN).read_bytes()[:500])
    return AdapterFileError, [BIN, "cannot be read as plain tensors"]


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_adapter_on_a_fresh_base(case, llama, saved):
    kind, words = DAMAGES[case](saved)
    before = Snapshot(llama)
    with one_error(kind, *words):
        ts.PeftModel.from_pretrained(llama, saved)
    before.check()
    assert sites(llama) == 0
    assert not (saved.parent / "pwned").exists()


@pytest.mark.parametrize("name", ["second", "default"])
@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_adapter_on_a_handle(case, name, llama, saved):
    """Under a new name and in place of a good adapter, which stays good."""
    handle = ours_on(llama, "lora", "CAUSAL_LM", r=4)
    kind, words = DAMAGES[case](saved)
    before, adapted, count = Snapshot(llama), output(handle, INPUTS), sites(llama)
    trained = {key: p.requires_grad for key, p in handle.named_parameters()}
    with one_error(kind, *words):
        handle.load_adapter(saved, name)
    before.check()
    assert sites(llama) == count
    assert list(handle.peft_config) == list(handle.adapters) == handle.active_adapters == ["default"]
    assert {key: p.requires_grad for key, p in handle.named_parameters()} == trained
    assert torch.equal(output(handle, INPUTS), adapted)
    assert not (saved.parent / "pwned").exists()


@pytest.mark.parametrize("case", ["truncated weights", "config that is no JSON", "targets of another base", "NaN"])
def test_damaged_adapter_does_not_disturb_another_handle_of_the_base(case, llama, saved):
    other = ours_on(llama, "prompt", "CAUSAL_LM")
    kind, words = DAMAGES[case](saved)
    before, adapted = Snapshot(llama), output(other, INPUTS)
    with one_error(kind, *words):
        ts.PeftModel.from_pretrained(llama, saved)
    before.check()
    assert not any(p.requires_grad for p in llama.parameters())
    assert torch.equal(output(other, INPUTS), adapted)


def test_damaged_virtual_tokens(llama, tmp_path):
    ours_on(llama, "prompt", "CAUSAL_LM").save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda v: v.update(prompt_embeddings=torch.zeros(5, 32)))
    base = tiny.make("llama")
    before = Snapshot(base)
    with one_error(AdapterFileError, r'"prompt_embeddings" has the shape \(5, 32\), the base needs \(4, 32\)'):
        ts.PeftModel.from_pretrained(base, tmp_path)
    before.check()


def test_unknown_key_that_is_off_is_one_warning(llama, saved, caplog):
    edit_config(saved, from_the_future=None, another=False)
    with caplog.at_level(logging.WARNING, "tunesmith"):
        ts.PeftModel.from_pretrained(llama, saved)
    (record,) = caplog.records
    assert "another=False, from_the_future=None" in record.getMessage()


# --- the tensors decide ----------------------------------------------------------------------------------------------

SAYS_MORE = {
    "targets of other models": (
        {"target_modules": ["q_proj", "v_proj", "c_attn", "query_key_value"]},
        ['"c_attn"', '"query_key'],
    ),
    "a target that carries no adapter": ({"target_modules": ["q_proj", "v_proj", "input_layernorm"]}, ["0.input_layernorm"]),
    "targets that were not trained": ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, ["no adapter: .*0.self_attn.k_proj"]),
    "all linear modules": ({"target_modules": "all-linear"}, ["no adapter: .*mlp.down_proj"]),
    "an expression": ({"target_modules": r".*\.(q|v|o)_proj"}, ["no adapter: .*o_proj"]),
    "layers that are not here": ({"layers_to_transform": [0, 1, 2, 3]}, ["no target in layer 2, 3"]),
    "patterns of other models": ({"rank_pattern": {"c_attn": 2}, "alpha_pattern": {"fc1": 2}}, ['"c_attn"', '"fc1"']),
    "a module to save": ({"modules_to_save": ["score"]}, ['modules_to_save: no module matches "score"']),
    "another task": ({"task_type": "SEQ_2_SEQ_LM"}, ["SEQ_2_SEQ_LM, which LlamaForCausalLM is not for"]),
    "a task with a head": ({"task_type": "TOKEN_CLS"}, ["TOKEN_CLS, which LlamaForCausalLM is not for"]),
    "all of it": ({"target_modules": ["q_proj", "v_proj", "fc1"], "task_type": "SEQ_CLS"}, ['"fc1"', "SEQ_CLS"]),
}


@pytest.mark.parametrize("case", SAYS_MORE)
def test_where_all_tensors_fit_the_rest_is_one_warning(case, llama, saved, caplog):
    changes, words = SAYS_MORE[case]
    expected = output(ts.PeftModel.from_pretrained(tiny.make("llama"), saved), INPUTS)
    edit_config(saved, **changes)
    handle = ts.PeftModel.from_pretrained(llama, saved)
    (record,) = caplog.records
    for word in words:
        assert re.search(word, record.getMessage()), record.getMessage()
    assert torch.equal(output(handle, INPUTS), expected)
    assert handle.peft_config["default"].task_type in (None, "CAUSAL_LM")


def test_no_task_or_one_written_otherwise_is_no_news(llama, saved, caplog):
    for task in (None, "causal_lm", "TaskType.CAUSAL_LM"):
        edit_config(saved, task_type=task)
        ts.PeftModel.from_pretrained(llama, saved)
    assert not caplog.records


@pytest.mark.parametrize("task", [None, "SEQ_2_SEQ_LM", "UNKNOWN"])
def test_virtual_tokens_take_the_task_that_the_base_is_for(task, llama, tmp_path):
    expected = ours_on(llama, "prompt", "CAUSAL_LM")
    expected.save_pretrained(tmp_path)
    edit_config(tmp_path, task_type=task)
    handle = ts.PeftModel.from_pretrained(tiny.make("llama"), tmp_path)
    assert isinstance(handle, ts.PeftModelForCausalLM)
    labelled = {**INPUTS, "labels": INPUTS["input_ids"]}
    with torch.no_grad():
        assert torch.equal(handle(**labelled).loss, expected(**labelled).loss)


def test_targets_that_the_file_does_not_hold_carry_no_adapter(llama, saved):
    """As in the reference, where they keep initial values, which change nothing."""
    edit_config(saved, init_lora_weights=True)
    edit_tensors(saved, lambda v: [v.pop(key) for key in list(v) if "layers.1" in key])
    handle = ts.PeftModel.from_pretrained(llama, saved)
    assert {path.split(".")[2] for path, _ in handle.tree("default").items()} == {"0"}
    with pytest.warns(UserWarning, match="missing adapter keys"):
        theirs = peft.PeftModel.from_pretrained(tiny.make("llama"), str(saved))
    torch.testing.assert_close(output(handle, INPUTS), output(theirs, INPUTS), rtol=0, atol=1e-5)
    result = handle.load_adapter(saved, "second")
    assert result.missing_keys == [f"model.layers.1.self_attn.{name}_proj" for name in "qv"] and not result.unexpected_keys


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_names_out_of_a_wrapped_model_are_understood(wrapper, llama, saved):
    expected = output(ts.PeftModel.from_pretrained(llama, saved), INPUTS)
    edit_tensors(saved, lambda v: [v.update({key.replace("layers.0.", f"layers.0.{wrapper}"): v.pop(key)}) for key in list(v)])
    assert torch.equal(output(ts.PeftModel.from_pretrained(llama, saved), INPUTS), expected)


def test_a_file_that_lacks_a_part_of_a_module_is_an_error_even_so(llama, saved):
    edit_config(saved, target_modules=["q_proj", "v_proj", "c_attn"])
    edit_tensors(saved, lambda v: v.pop(FIRST))
    with one_error(AdapterFileError, f'"{FIRST}" is missing', 'no module matches "c_attn"'):
        ts.PeftModel.from_pretrained(llama, saved)


def test_a_head_that_was_trained_and_is_not_in_the_file_is_an_error(llama, saved):
    edit_config(saved, modules_to_save=["lm_head"])
    with one_error(AdapterFileError, '"base_model.model.lm_head.weight" is missing'):
        ts.PeftModel.from_pretrained(llama, saved)


def test_values_of_a_merged_adapter_cannot_be_replaced(llama, saved):
    handle = ours_on(llama, "lora", "CAUSAL_LM")
    handle.merge_adapter()
    with one_error(UsageError, '"default" is merged', "unmerge_adapter"):
        handle.load_adapter(saved, "default")


def test_text_init_needs_no_tokenizer_when_values_are_loaded(llama, tmp_path):
    ours_on(llama, "prompt", "CAUSAL_LM").save_pretrained(tmp_path)
    edit_config(tmp_path, prompt_tuning_init="TEXT", prompt_tuning_init_text="x", tokenizer_name_or_path="/gone")
    ts.PeftModel.from_pretrained(llama, tmp_path)
