"""Quantised bases in files, looked into before they are loaded."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import quantised, tiny
from tests.handles import out
from tunesmith import AutoPeftModelForCausalLM, LoraConfig, UsageError, get_peft_model, load_base
from tunesmith.bases.quantise import quantise_folder

INPUTS = tiny.inputs_for("llama")


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
    "state of another kind": (state_with(quant_type="fp4"), "quant_state says fp4, its name nf4"),
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


def test_8_bit_files_are_checked_too(dense, tmp_path):
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
