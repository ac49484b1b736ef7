"""Adapters that would hide each other."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.handles import out
from tunesmith import (
    BitFitConfig,
    BottleneckConfig,
    LNTuningConfig,
    LoraConfig,
    TrainableTokensConfig,
    UsageError,
    get_peft_model,
)

CLASSIFIER = {"task_type": "SEQ_CLS", "init_lora_weights": False}
CONFLICTS = {
    "two heads": ("bert-classifier", LoraConfig(**CLASSIFIER), LoraConfig(**CLASSIFIER), "trains a private copy of classifier"),
    "a copy of what another adapts": (
        "llama",
        LoraConfig(modules_to_save=["mlp"]),
        LoraConfig(target_modules=["down_proj"]),
        r'"a" trains a private copy of model\.layers\.0\.mlp.*adapter of "b" at model\.layers\.0\.mlp\.down_proj',
    ),
    "a block beside a copy of it": (
        "llama",
        BottleneckConfig(target_modules=["mlp"]),
        LoraConfig(modules_to_save=["mlp"]),
        r'"b" trains a private copy of model\.layers\.0\.mlp.*adapter of "a"',
    ),
    "the same norms": ("llama", LNTuningConfig(), LNTuningConfig(), r'"a" and "b" both train .*weight'),
    "the same biases": ("gpt2", LoraConfig(bias="all"), BitFitConfig(), r'"a" and "b" both train .*bias'),
    "the same tokens": (
        "llama",
        LoraConfig(trainable_token_indices=[3, 4]),
        TrainableTokensConfig(token_indices=[4, 5]),
        r"both train model\.embed_tokens\.weight\[4\]",
    ),
}


@pytest.mark.parametrize("pair", CONFLICTS)
def test_adapters_that_would_hide_each_other_are_refused_by_name(pair):
    """Whether one of them is merged or both are active; alone, and in rows of one batch, each of them acts."""
    name, first, second, message = CONFLICTS[pair]
    handle, inputs = get_peft_model(tiny.make(name), first, "a").eval(), tiny.inputs_for(name)
    handle.add_adapter("b", second)
    alone = out(handle, inputs)
    handle.set_adapter(["a", "b"])
    for _ in range(2):
        with pytest.raises(UsageError, match=message):
            handle(**inputs)
    if hasattr(handle.bare_base, "generate"):
        with pytest.raises(UsageError, match=message):
            handle.generate(**inputs, max_new_tokens=2)
    if not isinstance(first, BottleneckConfig):
        with pytest.raises(UsageError, match=message):
            handle.merge_adapter()
        handle.merge_adapter(["a"])
        with pytest.raises(UsageError, match=message):
            handle(**inputs)
        handle.unmerge_adapter()
    assert handle(**inputs, adapter_names=["a", "b"])
    handle.set_adapter("a")
    assert torch.equal(out(handle, inputs), alone)


def test_trained_tokens_and_biases_that_do_not_meet_act_together(llama, llama_inputs):
    handle = get_peft_model(llama, TrainableTokensConfig(token_indices=[3]), "a").eval()
    handle.add_adapter("b", TrainableTokensConfig(token_indices=[4]))
    handle.set_adapter(["a", "b"])
    assert out(handle, llama_inputs).isfinite().all()
