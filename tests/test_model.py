"""Several adapters of one handle: which act, which train, and what a careless list of names must not do."""

from __future__ import annotations

import pytest
import torch

from tests.bad_input import INPUTS, one_error
from tests.handles import assert_same_state, lora, out, state
from tests.parity.oracle import ours_on, output
from tunesmith import (
    AdapterNameError,
    LoraConfig,
    PeftModel,
    UsageError,
)


@pytest.fixture
def handle(llama):
    """Adapters "a" (active) and "b", both of which change the output."""
    made = lora(llama, adapter_name="a").eval()
    made.add_adapter("b", LoraConfig(init_lora_weights=False, lora_alpha=32))
    return made


def trains(handle: PeftModel, name: str) -> bool:
    return any(p.requires_grad for p in handle.tree(name).parameters())


def test_a_name_given_twice_acts_once(handle, llama_inputs):
    expected = out(handle, llama_inputs)
    handle.set_adapter(["a", "a"])
    assert handle.active_adapters == ["a"] and torch.equal(out(handle, llama_inputs), expected)


def test_a_name_given_twice_is_merged_once(handle, llama, llama_inputs):
    before, expected = state(llama), out(handle, llama_inputs)
    handle.merge_adapter(["a", "a"])
    torch.testing.assert_close(out(handle, llama_inputs), expected, rtol=1e-5, atol=1e-5)
    handle.unmerge_adapter()
    assert_same_state(before, state(llama))
    merged = handle.merge_and_unload(adapter_names=["a", "a"])
    torch.testing.assert_close(out(merged, llama_inputs), expected, rtol=1e-5, atol=1e-5)


def test_one_name_may_be_given_without_a_list(handle, tmp_path):
    handle.add_adapter("long name", LoraConfig())
    handle.save_pretrained(tmp_path, selected_adapters="long name")
    assert [path.name for path in tmp_path.iterdir()] == ["long name"]
    handle.merge_adapter("long name")
    assert handle.get_model_status().merged_adapters == ["long name"]
    handle.unmerge_adapter()
    handle.delete_adapter("long name")
    assert list(handle.peft_config) == ["a", "b"]


def test_a_name_given_twice_is_deleted_once_and_an_unknown_one_deletes_nothing(handle):
    with pytest.raises(AdapterNameError, match='no adapter "c"'):
        handle.delete_adapter(["b", "c"])
    handle.delete_adapter(["b", "b"])
    assert list(handle.peft_config) == ["a"] == handle.active_adapters


@pytest.mark.parametrize("names", [3, None, ["a", None]])
def test_what_is_no_name_is_told_as_an_unknown_one(handle, names):
    with pytest.raises(AdapterNameError, match='adapters here: "a", "b"'):
        handle.set_adapter(names)
    assert handle.active_adapters == ["a"]


def test_adding_loading_and_deleting_leave_what_trains_as_it_was(handle, tmp_path):
    handle.save_pretrained(tmp_path)
    handle.set_adapter("a", inference_mode=True)
    handle.add_adapter("c", LoraConfig())
    handle.load_adapter(tmp_path / "b", "d", is_trainable=True)
    handle.delete_adapter("b")
    assert not any(trains(handle, name) for name in "acd")
    handle.set_adapter(["a", "d"])
    assert trains(handle, "a") and trains(handle, "d") and not trains(handle, "c")
    handle.delete_adapter("a")
    assert handle.active_adapters == ["d"] and trains(handle, "d")


def test_nothing_is_merged_while_adapters_are_switched_off(handle, llama_inputs):
    with handle.disable_adapter():
        plain = out(handle, llama_inputs)
        with pytest.raises(UsageError, match="enable_adapters"):
            handle.merge_adapter()
        assert torch.equal(out(handle, llama_inputs), plain)


def test_a_merged_adapter_may_be_deleted_while_adapters_are_switched_off(handle, llama_inputs):
    handle.merge_adapter(["a", "b"])
    with handle.disable_adapter():
        handle.delete_adapter("a")
    assert handle.get_model_status().merged_adapters == ["b"]


def test_the_word_for_rows_without_an_adapter_is_no_name(handle):
    with pytest.raises(AdapterNameError, match="rows without an adapter"):
        handle.add_adapter("__base__", LoraConfig())


def test_names_for_rows_come_in_a_list(handle, llama_inputs):
    with pytest.raises(UsageError, match="must be a list"):
        handle(**llama_inputs, adapter_names="ab")
    with pytest.raises(AdapterNameError, match='no adapter "None"'):
        handle(**llama_inputs, adapter_names=["a", None])


def test_a_number_before_the_inputs_is_not_taken_for_rows(handle, llama_inputs):
    """Trainer passes `num_items_in_batch`, a tensor without rows."""
    inputs = {"num_items_in_batch": torch.tensor(3), "labels": llama_inputs["input_ids"], **llama_inputs}
    assert handle(**inputs, adapter_names=["a", "b"]).loss.isfinite()


def test_an_error_about_names_stays_short(handle):
    for i in range(30):
        handle.add_adapter(f"n{i}", LoraConfig(r=1, target_modules=["down_proj"]))
    with pytest.raises(AdapterNameError, match="and 12 more") as caught:
        handle.set_adapter("zz")
    assert len(str(caught.value)) < 300


def test_taken_adapter_name(llama):
    handle = ours_on(llama, "lora", "CAUSAL_LM")
    adapted = output(handle, INPUTS)
    with one_error(AdapterNameError, '"default" is taken', "names in use: default"):
        handle.add_adapter("default", LoraConfig(r=2))
    assert handle.peft_config["default"].r == 4
    assert torch.equal(output(handle, INPUTS), adapted)


@pytest.mark.parametrize("call", ["set_adapter", "delete_adapter"])
def test_unknown_adapter_name(call, llama):
    handle = ours_on(llama, "lora", "CAUSAL_LM")
    with one_error(AdapterNameError, 'no adapter "defualt"', "did you mean 'default'", 'adapters here: "default"'):
        getattr(handle, call)("defualt")
    assert handle.active_adapters == ["default"]
