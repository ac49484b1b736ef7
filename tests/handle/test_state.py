"""What a handle shares between its parts, and which names it takes from its base."""

from __future__ import annotations

import pytest
from torch import nn

from tunesmith import LoraConfig, PeftModel, get_peft_model

# What other rooms, and users, may ask of a handle. A base's attribute of one of these names is at `handle.bare_base`.
OURS = {
    "adapters", "bare_base", "base_class", "classifies", "effective_frame", "entered", "for_task", "forward_within",
    "input_spec", "is_due", "labels_per_token", "merged_adapters", "pack_inputs", "plan_adapter", "prepare_inputs",
    "recomputes", "require_adapter", "take_adapter", "task_class", "tree",
}  # fmt: skip


class Own(nn.Module):
    """A base of one's own, with attributes of plain names."""

    frame, active, merged, disabled, accepts, effective, named = (
        "frame",
        "active",
        "merged",
        "disabled",
        "accepts",
        "eff",
        "named",
    )

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(self.prepare(x))

    def prepare(self, x):
        return x + 1

    def pack(self):
        return "packed"

    def settle(self):
        return "settled"


@pytest.fixture
def handle():
    return get_peft_model(Own(), LoraConfig(target_modules=["inner"]))


@pytest.mark.parametrize("name", ["frame", "active", "merged", "disabled", "accepts", "effective", "named"])
def test_attributes_of_the_base_are_the_bases(handle, name):
    assert getattr(handle, name) == getattr(handle.bare_base, name)


def test_methods_of_the_base_are_the_bases(handle):
    assert handle.pack() == "packed" and handle.settle() == "settled"
    assert handle.prepare(1) == 2


def test_a_handle_takes_few_names_from_its_base():
    """Beside those above it has the names that peft's handles and transformers' models have."""
    import peft
    from transformers import PreTrainedModel

    classes = [cls for cls in PeftModel.__mro__ if cls.__module__.startswith("tunesmith.")]
    names = {name for cls in classes for name in (*vars(cls), *vars(cls).get("__annotations__", {}))}
    theirs = {*dir(peft.PeftModel), *dir(peft.PeftModelForCausalLM), *dir(peft.LoraModel), *dir(PreTrainedModel)}
    theirs |= {"active_adapter", "peft_type", "update_and_allocate"}  # of their instances, and of their AdaLoRA
    assert {name for name in names - theirs if not name.startswith("_")} == OURS
