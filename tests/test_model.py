"""Several adapters of one handle: which act, which train, and what a careless list of names must not do."""

from __future__ import annotations

import pytest
import torch

from tests.bad_input import INPUTS, one_error
from tests.handles import assert_same_state, lora, out, state
from tests.parity.oracle import ours_on, output, theirs_on
from tunesmith import (
    AdapterNameError,
    LoraConfig,
    PeftModel,
    UsageError,
    get_peft_model,
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


# --- what scripts call ------------------------------------------------------------------------------------------------


def test_the_older_names_of_switching_adapters_off_and_on(handle, llama, llama_inputs):
    adapted = out(handle, llama_inputs)
    assert handle.disable_adapter_layers() is None
    assert torch.equal(out(handle, llama_inputs), out(llama, llama_inputs))
    assert handle.enable_adapter_layers() is None
    assert torch.equal(out(handle, llama_inputs), adapted)


def test_gradients_are_switched_for_the_named_adapters_alone(handle):
    handle.set_requires_grad("b")
    assert trains(handle, "a") and trains(handle, "b")
    handle.set_requires_grad(["a", "b"], requires_grad=False)
    assert not trains(handle, "a") and not trains(handle, "b")
    with one_error(AdapterNameError, 'no adapter "c"'):
        handle.set_requires_grad(["a", "c"])
    assert not trains(handle, "a") and not any(p.requires_grad for p in handle.bare_base.parameters())


def test_modules_to_save_are_those_of_all_adapters(handle):
    assert handle.modules_to_save is None
    handle.add_adapter("c", LoraConfig(modules_to_save=["lm_head"]))
    assert handle.modules_to_save == {"lm_head"}


@pytest.mark.parametrize("kind", ["prompt", "prefix", "p-tuning"])
def test_virtual_tokens_as_files_hold_them(kind, llama):
    made, theirs = ours_on(llama, kind, "CAUSAL_LM"), theirs_on(llama, kind, "CAUSAL_LM")
    tokens = made.get_prompt_embedding_to_save("default")
    assert tokens.shape == theirs.get_prompt_embedding_to_save("default").shape and not tokens.requires_grad
    assert torch.equal(tokens, made.get_adapter_state_dict()["prompt_embeddings"])


def test_an_adapter_without_virtual_tokens_says_so(handle):
    with one_error(UsageError, '"a" has no virtual tokens'):
        handle.get_prompt_embedding_to_save("a")


def test_a_card_is_written_and_one_that_is_there_keeps_its_text(handle, tmp_path):
    handle.create_or_update_model_card(str(tmp_path / "new"))
    assert "library_name: peft" in (tmp_path / "new" / "README.md").read_text()
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n# My adapter\n")
    handle.create_or_update_model_card(str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert "license: mit" in text and "- mine" in text and "- lora" in text and "library_name: peft" in text
    assert text.endswith("# My adapter\n")


def test_inputs_of_layers_require_gradients_where_reentrant_checkpointing_needs_them(handle, llama, llama_inputs):
    assert handle.prepare_model_for_gradient_checkpointing(llama) is None
    handle.train()
    llama.gradient_checkpointing_enable({"use_reentrant": True})
    handle(**llama_inputs, labels=llama_inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in handle.tree("a").parameters())


def test_the_revision_of_the_base_is_written_and_the_callers_configuration_is_not_changed(llama):
    config = LoraConfig(revision="v1")
    made = get_peft_model(llama, config, "default", False, True, "v2", True)
    assert made.peft_config["default"].revision == "v2" and config.revision == "v1"
