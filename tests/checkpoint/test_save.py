"""Saving what is asked for, or one clear error and nothing written."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from torch import nn

import tunesmith as ts
from tests import tiny
from tests.bad_input import BIN, CONFIG, WEIGHTS, one_error
from tests.handles import lora, out, prefixed, prompted
from tests.parity.oracle import ours_on, quiet, tensors
from tunesmith import AdapterFileError, AdapterNameError, LoraConfig, UsageError, get_peft_model

INPUTS = tiny.inputs_for("llama")


def test_saving_an_unknown_adapter_writes_nothing(llama, tmp_path):
    handle = ours_on(llama, "lora", "CAUSAL_LM")
    with one_error(AdapterNameError, 'no adapter "second"'):
        handle.save_pretrained(tmp_path / "out", selected_adapters=["default", "second"])
    assert not (tmp_path / "out").exists()


# --- values that the caller gives -----------------------------------------------------------------------------------


def shifted(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Other values than a handle's own."""
    return {name: value + 1 if value.is_floating_point() else value for name, value in values.items()}


def in_the_middle(values: dict[str, torch.Tensor], wrapper: str) -> dict[str, torch.Tensor]:
    return {name.replace("self_attn.", f"self_attn.{wrapper}"): value for name, value in values.items()}


PREFIXES = {
    "its own names": lambda own, file: own,
    "compiled": lambda own, file: {f"_orig_mod.{name}": value for name, value in own.items()},
    "DDP": lambda own, file: {f"module.{name}": value for name, value in own.items()},
    "compiled under DDP": lambda own, file: {f"module._orig_mod.{name}": value for name, value in own.items()},
    "FSDP": lambda own, file: in_the_middle(
        {f"_fsdp_wrapped_module.{name}": value for name, value in own.items()}, "_fsdp_wrapped_module."
    ),
    "checkpointed": lambda own, file: in_the_middle(own, "_checkpoint_wrapped_module."),
    "a file's names": lambda own, file: file,
    "a file's names under DDP": lambda own, file: {f"module.{name}": value for name, value in file.items()},
    "peft's names": lambda own, file: {name.replace(".weight", ".default.weight"): value for name, value in file.items()},
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("make", [lora, prompted, prefixed])
def test_given_values_are_written_whatever_wraps_them(prefix, make, tmp_path):
    handle = make(tiny.make("llama"))
    if prefix == "peft's names" and make is not lora:
        given = {"prompt_encoder.default.embedding.weight": handle.get_adapter_state_dict()["prompt_embeddings"]}
        given = shifted(given)
    else:
        given = PREFIXES[prefix](shifted(handle.state_dict()), shifted(handle.get_adapter_state_dict()))
    handle.save_pretrained(tmp_path, state_dict=given)
    expected = shifted(handle.get_adapter_state_dict())
    found = tensors(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def without_one(values):
    name = next(name for name in values if "lora_B" in name)
    return {key: value for key, value in values.items() if key != name}


def with_one(change):
    def changed(values):
        name = next(name for name in values if "lora_B" in name)
        return {**values, name: change(values[name])}

    return changed


REFUSED = {
    "nothing": (lambda values: {}, "is missing"),
    "only the base": (lambda v: {name: value for name, value in v.items() if name.startswith("base_model")}, "is missing"),
    "one is missing": (without_one, "is missing"),
    "a placeholder of ZeRO-3": (with_one(lambda value: torch.empty(0)), "other processes hold the rest"),
    "a meta tensor": (with_one(lambda value: value.to("meta")), "on the meta device"),
    "another shape": (with_one(lambda value: value[:3]), "has the shape"),
    "a name": (with_one(lambda value: "lora"), "is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_values_that_are_not_whole_are_refused_and_nothing_is_written(case, tmp_path):
    change, words = REFUSED[case]
    handle = lora(tiny.make("llama"))
    with one_error(AdapterFileError, "nothing was written", words):
        handle.save_pretrained(tmp_path / "out", state_dict=change(handle.state_dict()))
    assert not (tmp_path / "out").exists()


def test_two_names_of_one_tensor_are_refused(tmp_path):
    handle = lora(tiny.make("llama"))
    own = handle.state_dict()
    with one_error(AdapterFileError, "both stand for"):
        handle.save_pretrained(
            tmp_path, state_dict={f"{prefix}{key}": v for key, v in own.items() for prefix in ("module.", "_orig_mod.")}
        )


def test_one_adapters_values_do_not_pass_for_anothers(tmp_path):
    handle = lora(tiny.make("llama"))
    handle.add_adapter("second", LoraConfig(init_lora_weights=False))
    given = {name: value for name, value in handle.state_dict().items() if "adapters.default" in name}
    handle.save_pretrained(tmp_path / "first", selected_adapters=["default"], state_dict=given)
    for values in (given, handle.get_adapter_state_dict()):  # which have no adapter's name
        with one_error(AdapterFileError, "adapters.second.*is missing"):
            handle.save_pretrained(tmp_path / "out", state_dict=values, selected_adapters=["second"])


def test_a_partitioned_handle_is_refused(tmp_path):
    handle = lora(tiny.make("llama"))
    factor = next(handle.adapters.parameters())
    factor.ds_shape, factor.data = factor.shape, torch.empty(0)  # as ZeRO-3 leaves it
    with one_error(AdapterFileError, "the adapter lacks values", "other processes hold the rest", "GatheredParameters"):
        handle.save_pretrained(tmp_path / "out")
    handle.save_pretrained(tmp_path / "out", is_main_process=False)  # another process reports it
    assert not (tmp_path / "out").exists()


# --- the old format -------------------------------------------------------------------------------------------------


def test_a_bin_file_is_read_by_both_and_replaces_the_other_format(tmp_path):
    lora(tiny.make("llama"), seed=2).save_pretrained(tmp_path)
    handle = lora(tiny.make("llama"))
    handle.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / BIN).is_file() and not (tmp_path / WEIGHTS).exists()
    expected = out(handle, INPUTS)
    assert torch.equal(out(ts.PeftModel.from_pretrained(tiny.make("llama"), tmp_path).eval(), INPUTS), expected)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path).eval()
    torch.testing.assert_close(out(theirs, INPUTS), expected, atol=1e-6, rtol=1e-6)
    handle.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).is_file() and not (tmp_path / BIN).exists()


def test_save_function_writes_the_bin_file(tmp_path):
    seen = []
    lora(tiny.make("llama")).save_pretrained(
        tmp_path,
        safe_serialization=False,
        save_function=lambda values, path: (seen.append(path.name), torch.save(values, path)),
    )
    assert seen == [BIN]


# --- a plain LoRA out of one that started from the weights --------------------------------------------------------------

INITS = {
    "pissa": {"init_lora_weights": "pissa"},
    "quick pissa": {"init_lora_weights": "pissa_niter_2"},
    "olora": {"init_lora_weights": "olora"},
    "rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "patterns": {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "patterns with rslora": {
        "init_lora_weights": "olora", "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3},
    },
    "plain": {"init_lora_weights": True},
}  # fmt: skip


@pytest.mark.parametrize("case", INITS)
def test_any_reader_of_plain_lora_computes_the_same(case, tmp_path):
    torch.manual_seed(1)
    handle = get_peft_model(
        tiny.make("llama"), LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], **INITS[case])
    )
    handle.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for parameter in handle.adapters.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    expected = out(handle.eval(), INPUTS)
    handle.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    settings = json.loads((tmp_path / "plain" / CONFIG).read_text())
    assert settings["init_lora_weights"] is True and settings["r"] == 8
    with quiet():
        readers = [
            kind.from_pretrained(tiny.make("llama"), tmp_path / "plain").eval() for kind in (peft.PeftModel, ts.PeftModel)
        ]
    for reader in readers:
        torch.testing.assert_close(out(reader, INPUTS), expected, atol=1e-5, rtol=1e-4)
    assert handle.peft_config["default"].r == 4  # the handle stays what it is


def test_what_cannot_be_a_plain_lora_says_so(tmp_path):
    for fields, words in (
        ({"init_lora_weights": "loftq"}, "LoftQ"),
        ({"use_dora": True}, "use_dora"),
        ({"target_modules": ["q_proj"], "target_parameters": ["self_attn.k_proj.weight"]}, "target_parameters"),
    ):
        handle = lora(tiny.make("llama"), **{"init_lora_weights": True, **fields})
        handle.save_pretrained(tmp_path / "start")
        with one_error(UsageError, "path_initial_model_for_weight_conversion", words):
            handle.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    with one_error(UsageError, "PREFIX_TUNING"):
        prefixed(tiny.make("llama")).save_pretrained(
            tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
    assert not (tmp_path / "out").exists()


def test_another_start_is_refused(tmp_path):
    fields = {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}
    lora(tiny.make("llama", seed=1), **fields).save_pretrained(tmp_path / "start")
    with one_error(AdapterFileError, "is not what this adapter started as"):
        lora(tiny.make("llama"), **fields).save_pretrained(
            tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )


# --- load_state_dict ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", PREFIXES)
def test_values_are_loaded_under_any_of_the_names(prefix):
    handle = lora(tiny.make("llama"))
    source = lora(tiny.make("llama"), seed=2)
    result = handle.load_state_dict(PREFIXES[prefix](source.state_dict(), source.get_adapter_state_dict()), strict=False)
    assert not result.unexpected_keys
    assert torch.equal(out(handle.eval(), INPUTS), out(source.eval(), INPUTS))


def test_pefts_own_state_dict_is_loaded_and_what_is_left_is_reported():
    with quiet():
        torch.manual_seed(1)
        theirs = peft.get_peft_model(
            tiny.make("bert-classifier"), peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)
        )
    handle = lora(tiny.make("bert-classifier"), seed=2, task_type="SEQ_CLS", lora_alpha=8)
    held = theirs.state_dict()
    result = handle.load_state_dict(held, strict=False)
    assert all("lora" not in key and "modules_to_save" not in key for key in result.unexpected_keys)
    inputs = tiny.inputs_for("bert-classifier")
    torch.testing.assert_close(out(handle.eval(), inputs), out(theirs.eval(), inputs), atol=1e-6, rtol=1e-6)
    with pytest.raises(RuntimeError, match="Missing key"):  # torch's own
        handle.load_state_dict(held)


def test_values_of_which_none_fits_are_an_error():
    handle = lora(tiny.make("llama"))
    with one_error(AdapterFileError, "none of this handle's tensors", "so nothing was loaded"):
        handle.load_state_dict({"lora_Q": torch.zeros(1)}, strict=False)
    handle.load_state_dict({}, strict=False)


def test_a_module_of_ones_own_is_saved_and_loaded_by_name():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    handle, other = lora(net, target_modules=["0"]), lora(net, seed=2, target_modules=["0"])
    other.load_state_dict({f"module.{name}": value for name, value in handle.state_dict().items()})
    assert torch.equal(other(torch.ones(1, 4)), handle(torch.ones(1, 4)))
