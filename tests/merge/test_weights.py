"""Adapters merged into weights and out of them, exactly."""

from __future__ import annotations

import pytest
import torch

from tests.handles import assert_same_state, lora, out, state
from tunesmith import (
    LoraConfig,
    OFTConfig,
    UsageError,
    get_peft_model,
)
from tunesmith.adapter import LinearAdapter
from tunesmith.bases.view import view_of


def test_a_parameter_under_a_rotation_is_merged_first(llama, llama_inputs):
    """Merged the other way round, the change of the parameter would not be rotated."""
    handle = get_peft_model(
        llama, OFTConfig(oft_block_size=8, init_weights=False, target_modules=["q_proj"]), "rotation"
    ).eval()
    handle.add_adapter("change", LoraConfig(target_parameters=["q_proj.weight"], init_lora_weights=False, lora_alpha=64))
    handle.set_adapter(["rotation", "change"])
    expected = out(handle, llama_inputs)
    with pytest.raises(UsageError, match=r'"change" replaces .*merge it before the others: "change", "rotation"'):
        handle.merge_adapter()
    handle.merge_adapter(["change", "rotation"])
    torch.testing.assert_close(out(handle, llama_inputs), expected, rtol=1e-4, atol=1e-5)


def test_a_bias_that_has_no_place_in_the_module_is_not_lost_in_merging(llama, llama_inputs):
    class Shifted(LinearAdapter):
        def forward(self, x, base, *args, **kwargs):
            return base(x, *args, **kwargs) + 1

        def merge(self, weight, bias, base):
            return weight, torch.ones(len(weight), dtype=weight.dtype) if bias is None else bias + 1

    handle = lora(llama).eval()
    path, module = "model.layers.1.self_attn.v_proj", llama.model.layers[1].self_attn.v_proj
    handle.tree("default").node(path)._modules["_adapter"] = Shifted(view_of(module), None, {})
    handle._forget()
    before, expected = state(llama), out(handle, llama_inputs)
    with pytest.raises(UsageError, match="Shifted gives a bias to a Linear that has none"):
        handle.merge_adapter()
    assert_same_state(before, state(llama))
    assert torch.equal(out(handle, llama_inputs), expected)
