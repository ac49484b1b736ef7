"""Values of LoRA's configuration that are refused, with what the message says."""

from __future__ import annotations

import pytest
from accelerate import cpu_offload
from torch import nn

import tunesmith as ts
from tests import tiny

BAD = {
    "unknown init": ({"init_lora_weights": "pisa"}, '"pissa"'),
    "init without rounds": ({"init_lora_weights": "pissa_niter_"}, "pissa_niter_<rounds>"),
    "odd orthogonal rank": ({"init_lora_weights": "orthogonal", "r": 5}, "even ranks, got 5"),
    "odd orthogonal rank in a pattern": ({"init_lora_weights": "orthogonal", "rank_pattern": {"q_proj": 3}}, "got 3"),
    "dora from the weight": ({"init_lora_weights": "pissa", "use_dora": True}, "cannot be combined"),
    "dora and a bias": ({"lora_bias": True, "use_dora": True}, "without use_dora"),
    "bias and an init": ({"lora_bias": True, "init_lora_weights": "gaussian"}, "True or False"),
    "dora of no type": ({"use_dora": "yes"}, "must be of type bool"),
    "loftq bits": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 5}}, "must be 2, 3, 4 or 8"),
    "loftq rounds": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 0}}, "at least 1"),
    "loftq field": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bit": 4}}, "did you mean 'loftq_bits'"),
    "loftq options alone": ({"loftq_config": {"loftq_bits": 4}}, 'has an effect only with init_lora_weights="loftq"'),
    "loftq options of no type": ({"init_lora_weights": "loftq", "loftq_config": [4]}, "must be of type"),
    "eva rho": ({"init_lora_weights": "eva", "eva_config": {"rho": 0.5}}, "rho=0.5 must be"),
    "eva rho of no type": ({"init_lora_weights": "eva", "eva_config": {"rho": "2"}}, "rho='2' must be"),
    "eva tau": ({"init_lora_weights": "eva", "eva_config": {"tau": 1.5}}, "tau=1.5 must be"),
    "eva options alone": ({"eva_config": {"rho": 2.0}}, 'has an effect only with init_lora_weights="eva"'),
}


@pytest.mark.parametrize("case", BAD)
def test_value_is_refused_with_the_reason(case):
    fields, message = BAD[case]
    with pytest.raises(ts.ConfigError) as found:
        ts.LoraConfig(**fields)
    assert message in str(found.value)


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.linear = nn.Linear(8, 6)


UNFIT = {
    "bias on an embedding": ({"lora_bias": True, "target_modules": ["words"]}, "leave embeddings out"),
    "dora on a grouped convolution": ({"use_dora": True, "target_modules": ["grouped"]}, "grouped convolution"),
    "pissa on an embedding": (
        {"init_lora_weights": "pissa", "target_modules": ["words"]},
        "leave this module out of target_modules",
    ),
    "olora on a convolution": ({"init_lora_weights": "olora", "target_modules": ["grouped"]}, "the weight of a linear module"),
    "orthogonal on an embedding": ({"init_lora_weights": "orthogonal", "target_modules": ["words"]}, "linear modules only"),
    "pissa of more parts than there are": (
        {"init_lora_weights": "pissa", "target_modules": ["linear"], "r": 7},
        "allows at most r=6 for its weight, got r=7",
    ),
    "pissa scaled by nothing": (
        {"init_lora_weights": "pissa", "target_modules": ["linear"], "r": 2, "lora_alpha": 0},
        "positive lora_alpha",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_module_that_cannot_carry_it_is_named(case):
    fields, message = UNFIT[case]
    with pytest.raises(ts.TargetError) as found:
        ts.get_peft_model(Zoo(), ts.LoraConfig(**fields))
    assert message in str(found.value) and fields["target_modules"][0] in str(found.value)


def test_dora_on_weights_that_are_not_here_says_so():
    base = cpu_offload(tiny.make("llama"), execution_device="cpu")
    with pytest.raises(ts.TargetError, match="offloaded"):
        ts.get_peft_model(base, ts.LoraConfig(use_dora=True))
