"""What a handle says of itself: values of the reference where they mean the same, and the short text."""

from __future__ import annotations

import dataclasses

import peft
import pytest

import tunesmith as ts
from tests import tiny
from tests.parity.oracle import quiet
from tunesmith.handle.describe import collapsed

LORA = {"target_modules": ["q_proj", "v_proj"]}
NOT_ALIKE = ("adapter_model_type",)  # the class of their tuner; ours is the handle


def lora_handle() -> ts.PeftModel:
    return ts.get_peft_model(tiny.make("llama"), ts.LoraConfig(task_type="CAUSAL_LM", **LORA))


def same_steps(ours, theirs) -> None:
    """Every kind of state, in both."""
    yield "new"
    ours.add_adapter("other", ts.LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"]))
    theirs.add_adapter("other", peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"]))
    yield "a second one"
    ours.set_adapter("other")
    theirs.set_adapter("other")
    yield "switched"
    ours.merge_adapter()
    theirs.merge_adapter()
    yield "merged"
    ours.unmerge_adapter()
    theirs.unmerge_adapter()
    ours.disable_adapters()
    theirs.base_model.disable_adapter_layers()
    yield "disabled"


def test_status_of_lora_is_the_references():
    ours = lora_handle()
    theirs = peft.get_peft_model(tiny.make("llama"), peft.LoraConfig(task_type="CAUSAL_LM", **LORA))
    states = []
    for state in same_steps(ours, theirs):
        with quiet():
            expected = [dataclasses.asdict(layer) for layer in theirs.get_layer_status()]
            whole = dataclasses.asdict(theirs.get_model_status())
        found = [dataclasses.asdict(layer) for layer in ours.get_layer_status()]
        mine = dataclasses.asdict(ours.get_model_status())
        if state == "disabled":  # the reference's disabled layers stop training, ours keep what `set_adapter` said
            for layer in (*expected, whole, *found, mine):
                layer.pop("requires_grad")
            whole.pop("trainable_params"), mine.pop("trainable_params")
        for layer in expected:
            layer["name"] = layer["name"].removeprefix("model.")
        assert found == expected, state
        assert {k: v for k, v in mine.items() if k not in NOT_ALIKE} == {
            k: v for k, v in whole.items() if k not in NOT_ALIKE
        }, state
        assert mine["adapter_model_type"] == "PeftModelForCausalLM"
        states.append(state)
    assert len(states) == 5


def test_functions_and_methods_are_the_same():
    ours = lora_handle()
    assert ts.get_layer_status(ours) == ours.get_layer_status()
    assert ts.get_model_status(ours) == ours.get_model_status()
    assert isinstance(ours.get_model_status(), ts.TunerModelStatus)
    assert isinstance(ours.get_layer_status()[0], ts.TunerLayerStatus)


def test_fields_are_the_references():
    for name in ("TunerLayerStatus", "TunerModelStatus"):
        mine, reference = (dataclasses.fields(cls) for cls in (getattr(ts, name), getattr(peft.peft_model, name)))
        assert [f.name for f in mine] == [f.name for f in reference]


def test_prompt_adapters_sit_at_the_inputs():
    """The reference raises here."""
    ours = ts.get_peft_model(tiny.make("llama"), ts.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    (layer,) = ours.get_layer_status()
    assert (layer.name, layer.module_type, layer.requires_grad) == ("inputs", "prompt_tuning.PromptTuning", {"default": True})
    status = ours.get_model_status()
    assert (status.peft_types, status.num_adapter_layers, status.trainable_params) == ({"default": "PROMPT_TUNING"}, 1, 96)


def test_parts_that_do_not_train_alike_are_irregular():
    ours = ts.get_peft_model(tiny.make("llama"), ts.LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"], **LORA))
    assert {layer.module_type for layer in ours.get_layer_status()} == {"lora.Linear", "modules_to_save.Linear"}
    adapter = ours.tree("default").node("model.layers.0.self_attn.q_proj")._adapter
    adapter.lora_A.requires_grad_(False)
    assert ours.get_layer_status()[0].requires_grad == {"default": "irregular"}
    assert ours.get_model_status().requires_grad == {"default": "irregular"}


def test_a_base_and_an_empty_handle_say_what_is_missing():
    ours = lora_handle()
    with pytest.raises(ts.UsageError, match=r"LlamaForCausalLM holds no adapters; 1 handle\(s\) share this base"):
        ts.get_layer_status(ours.bare_base)
    with pytest.raises(ts.UsageError, match=r"Linear holds no adapters$"):
        ts.get_model_status(ours.bare_base.lm_head)
    ours.delete_adapter("default")
    with pytest.raises(ts.UsageError, match="no adapters; add one"):
        ours.get_model_status()
    assert repr(ours).endswith("no adapters")


# --- the short text -------------------------------------------------------------------------------------------------


def test_the_text_of_a_handle():
    ours = ts.get_peft_model(
        tiny.make("llama"), ts.LoraConfig(task_type="CAUSAL_LM", lora_alpha=16, modules_to_save=["lm_head"], **LORA), "polite"
    )
    ours.add_adapter("brief", ts.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert repr(ours) == str(ours) == (
        "PeftModelForCausalLM on LlamaForCausalLM (24,736 parameters, frozen)\n"
        "  * polite  LORA r=8 lora_alpha=16, CAUSAL_LM, 4,864 parameters, active, trains\n"
        "      lm_head  1 x copy of Linear\n"
        "      model.layers.{0-1}.self_attn.{q_proj,v_proj}  4 x Linear\n"
        "  - brief   PROMPT_TUNING num_virtual_tokens=4, CAUSAL_LM, 128 parameters, not active\n"
        "      inputs  4 virtual tokens"
    )  # fmt: skip


def test_the_text_follows_the_state():
    ours = lora_handle()
    ours.merge_adapter()
    assert ", merged into the base, trains" in repr(ours)
    ours.unmerge_adapter()
    with ours.disable_adapter():
        assert ", active, switched off, trains" in repr(ours)
    ours.add_adapter("next", ts.LoraConfig(**LORA))
    ours.set_adapter("next")
    first, second = (line for line in repr(ours).splitlines() if "LORA" in line)
    assert first.startswith("  - default") and first.endswith("not active")
    assert second.startswith("  * next") and second.endswith("active, trains")


@pytest.mark.parametrize(
    ("paths", "patterns"),
    [
        (["a.0.q", "a.1.q", "a.0.v", "a.1.v"], {"a.{0-1}.{q,v}": 4}),
        (["a.0.q", "a.1.q", "a.1.v"], {"a.{0-1}.q": 2, "a.1.v": 1}),
        (["a.0.q", "a.2.q", "a.3.q"], {"a.{0,2-3}.q": 3}),
        (["a.0.b.0", "a.0.b.1", "a.1.b.1"], {"a.0.b.{0-1}": 2, "a.1.b.1": 1}),
        (["layers.0", "layers.1", "head"], {"layers.{0-1}": 2, "head": 1}),
        (["a.0.0", "a.0.1", "a.1.0", "a.1.1", "a.0.x", "a.1.x"], {"a.{0-1}.{0-1}": 4, "a.{0-1}.x": 2}),
        ([], {}),
    ],
)
def test_paths_become_patterns(paths, patterns):
    found = collapsed(paths)
    assert {pattern: len(members) for pattern, members in found.items()} == patterns
    assert sorted(path for members in found.values() for path in members) == sorted(paths)
