"""LN tuning: private copies of the norms' parameters."""

from __future__ import annotations

import pytest
import torch

import tunesmith as ts
from tests import tiny


def test_ln_tuning_finds_the_norms_of_an_architecture_without_usual_ones():
    base = tiny.make("opt")
    handle = ts.get_peft_model(base, ts.LNTuningConfig(task_type="CAUSAL_LM"))
    norms = [path for path, module in base.named_modules() if isinstance(module, torch.nn.LayerNorm)]
    assert sorted(path for path, _ in handle.tree("default").items()) == sorted(norms) and len(norms) == 5


def test_ln_tuning_refuses_what_is_no_norm():
    for targets, message in ((["q_proj"], "it is a Linear, not a norm"), (["mlp"], "LlamaMLP without parameters of its own")):
        with pytest.raises(ts.TargetError, match=message):
            ts.get_peft_model(tiny.make("llama"), ts.LNTuningConfig(task_type="CAUSAL_LM", target_modules=targets))
