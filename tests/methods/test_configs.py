"""Values and targets that methods on weights must refuse, each with a sentence that says what is allowed."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import torch
from torch import nn

import tunesmith as ts
from tests import tiny
from tests.parity.oracle import quiet
from tunesmith import (
    AdaLoraConfig,
    BOFTConfig,
    ConfigError,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    VeraConfig,
)

BAD_VALUES = [
    (VeraConfig, {"r": 0}, r"r=0 must be a whole number of at least 1"),
    (VeraConfig, {"r": 2.5}, r"r=2.5 must be of type int"),
    (VeraConfig, {"vera_dropout": 1.0}, r"vera_dropout=1.0 must be at least 0 and below 1"),
    (VeraConfig, {"d_initial": float("nan")}, r"d_initial=nan must be a finite number"),
    (VeraConfig, {"bias": "lora_only"}, r'bias=\'lora_only\' must be "none", "all" or "vera_only"'),
    (LoHaConfig, {"r": -1}, r"r=-1 must be"),
    (LoHaConfig, {"rank_pattern": {"q_proj": 0}}, r'rank_pattern\["q_proj"\]=0 must be a whole number'),
    (LoHaConfig, {"alpha_pattern": {"q_proj": float("inf")}}, r'alpha_pattern\["q_proj"\]=inf must be a finite number'),
    (LoHaConfig, {"rank_dropout": -0.1, "module_dropout": 2.0}, r"rank_dropout=-0.1 .*; module_dropout=2.0 must be"),
    (LoHaConfig, {"rank_pattern": {"q_(": 2}}, r'rank_pattern: "q_\(" is not a valid regular expression'),
    (LoHaConfig, {"decompose_both": True}, r'LoHaConfig has no field "decompose_both"'),
    (LoKrConfig, {"decompose_factor": 0}, r"decompose_factor=0 must be -1 or at least 1"),
    (LoKrConfig, {"init_weights": "lycorice"}, r'init_weights=\'lycorice\' must be True, False or "lycoris"'),
    (OFTConfig, {"r": 4}, r"r=4 and oft_block_size=32: exactly one must be above 0.*set the other to 0"),
    (OFTConfig, {"r": 0, "oft_block_size": 0}, r"r=0 and oft_block_size=0: exactly one"),
    (OFTConfig, {"oft_block_size": -8}, r"oft_block_size=-8: exactly one"),
    (OFTConfig, {"eps": 0.0}, r"eps=0.0 must be above 0"),
    (OFTConfig, {"num_cayley_neumann_terms": 1}, r"num_cayley_neumann_terms=1 must be at least 2"),
    (OFTConfig, {"module_dropout": 1}, r"module_dropout=1 must be at least 0 and below 1"),
    (OFTConfig, {"bias": "boft_only"}, r'must be "none", "all" or "oft_only"'),
    (BOFTConfig, {"boft_block_num": 4}, r"boft_block_size=4 and boft_block_num=4: exactly one must be above 0"),
    (BOFTConfig, {"boft_n_butterfly_factor": 0}, r"boft_n_butterfly_factor=0 must be a whole number of at least 1"),
    (BOFTConfig, {"boft_dropout": 1.5}, r"boft_dropout=1.5 must be"),
    (HRAConfig, {"r": 0}, r"r=0 must be"),
    (HRAConfig, {"bias": "some"}, r'must be "none", "all" or "hra_only"'),
    (AdaLoraConfig, {}, r"total_step=None must be the number of optimiser steps"),
    (AdaLoraConfig, {"total_step": 10, "target_r": 13}, r"target_r=13 must be at most init_r=12"),
    (AdaLoraConfig, {"total_step": 10, "tinit": 5, "tfinal": 5}, r"tinit=5 and tfinal=5 leave no steps of total_step=10"),
    (AdaLoraConfig, {"total_step": 10, "beta1": 1.0}, r"beta1=1.0 must be above 0 and below 1"),
    (AdaLoraConfig, {"total_step": 10, "tinit": -1}, r"tinit=-1 must be at least 0"),
    (AdaLoraConfig, {"total_step": 10, "orth_reg_weight": -0.5}, r"orth_reg_weight=-0.5 must be at least 0"),
    (AdaLoraConfig, {"total_step": 10, "deltaT": 0}, r"deltaT=0 must be"),
    (AdaLoraConfig, {"total_step": 10, "use_dora": True}, r"use_dora=True is not supported"),
    (IA3Config, {"target_modules": ["k_proj"], "feedforward_modules": ["fc2"]}, r'"fc2", which is not among target_modules'),
]


@pytest.mark.parametrize(("config", "values", "message"), BAD_VALUES)
def test_bad_value_is_refused_when_the_config_is_made(config, values, message):
    with pytest.raises(ConfigError, match=message):
        config(**values)


BAD_TARGETS = [
    (VeraConfig(target_modules=["embed_tokens"]), r"embed_tokens: VeRA adapts linear modules only"),
    (LoHaConfig(target_modules=["embed_tokens"]), r"embed_tokens: LoHa adapts linear modules and convolutions, not embeddings"),
    (LoKrConfig(target_modules=["embed_tokens"]), r"LoKr adapts linear modules"),
    (HRAConfig(target_modules=["embed_tokens"]), r"HRA adapts linear modules"),
    (BOFTConfig(target_modules=["embed_tokens"]), r"BOFT adapts linear modules"),
    (IA3Config(target_modules=["embed_tokens"], feedforward_modules=[]), r"IA3 adapts linear modules"),
    (AdaLoraConfig(target_modules=["embed_tokens"], total_step=5), r"AdaLoRA adapts linear modules"),
    (BOFTConfig(target_modules=["q_proj"], boft_block_size=5), r"its input of 32 is not a multiple of 5"),
    (BOFTConfig(target_modules=["q_proj"], boft_block_size=16, boft_n_butterfly_factor=3),
     r"2 blocks of 16 cannot be shuffled 2 times.*a multiple of 4"),
    (OFTConfig(target_modules=["q_proj"], oft_block_size=1), r"its input of 32 gives blocks of size 1"),
    (HRAConfig(target_modules=["q_proj"], r=33, apply_GS=True), r"r=33 vectors cannot be orthogonal in its input of 32"),
    (LoHaConfig(target_modules=["q_proj"], rank_pattern={"k_proj": 4}), r'rank_pattern key "k_proj" matches no target'),
]  # fmt: skip


@pytest.mark.parametrize(("config", "message"), BAD_TARGETS)
def test_bad_target_is_refused_before_anything_changes(config, message):
    base = tiny.make("llama")
    with pytest.raises(ts.TargetError, match=message):
        ts.get_peft_model(base, config)
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert all("forward" not in module.__dict__ for module in base.modules())


FULL = [
    (VeraConfig(r=4, projection_prng_key=3, vera_dropout=0.1, d_initial=0.2, bias="all", init_weights=False), peft.VeraConfig),
    (LoHaConfig(r=3, alpha=2, rank_dropout=0.1, module_dropout=0.2, use_effective_conv2d=True, rank_pattern={"q_proj": 2}),
     peft.LoHaConfig),
    (LoKrConfig(r=3, decompose_both=True, decompose_factor=4, rank_dropout_scale=True, init_weights="lycoris"),
     peft.LoKrConfig),
    (OFTConfig(oft_block_size=8, module_dropout=0.1, coft=True, eps=0.1, block_share=True, use_cayley_neumann=False),
     peft.OFTConfig),
    (BOFTConfig(boft_block_size=0, boft_block_num=2, boft_n_butterfly_factor=2, boft_dropout=0.1), peft.BOFTConfig),
    (HRAConfig(r=3, apply_GS=True, init_weights=False), peft.HRAConfig),
    (ts.LNTuningConfig(target_modules=["ln_1"], exclude_modules=["ln_f"]), peft.LNTuningConfig),
    (IA3Config(target_modules=["q_proj", "fc2"], feedforward_modules=["fc2"], init_ia3_weights=False), peft.IA3Config),
    (AdaLoraConfig(total_step=9, init_r=5, target_r=3, tinit=1, tfinal=2, deltaT=3, beta1=0.5, beta2=0.6, lora_dropout=0.1,
                   rank_pattern={"q_proj.lora_E": [True, False]}), peft.AdaLoraConfig),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs"), FULL, ids=[type(ours).__name__ for ours, _ in FULL])
def test_config_files_go_both_ways(ours, theirs, tmp_path, recwarn, caplog):
    ours.save_pretrained(tmp_path / "ours")
    read = theirs.from_pretrained(str(tmp_path / "ours"))
    assert not [warning for warning in recwarn if "unexpected" in str(warning.message).lower()]
    for field in dataclasses.fields(ours):
        if field.name != "inference_mode" and hasattr(read, field.name):
            expected, found = getattr(ours, field.name), getattr(read, field.name)
            assert (set(found) if isinstance(expected, set) else found) == expected, field.name
    with quiet():
        read.save_pretrained(str(tmp_path / "theirs"))
    again = ts.PeftConfig.from_pretrained(tmp_path / "theirs")
    assert dataclasses.replace(again, inference_mode=False) == ours
    assert not caplog.records


@pytest.mark.parametrize("init_weights", [True, "lycoris"])
@pytest.mark.parametrize("r", [1, 16])
@pytest.mark.parametrize("both", [True, False])
def test_lokr_starts_as_the_base_both_ways(init_weights, r, both):
    base, inputs = tiny.make("llama"), tiny.inputs_for("llama")
    expected = base(**inputs).logits
    config = LoKrConfig(r=r, decompose_both=both, init_weights=init_weights, task_type="CAUSAL_LM")
    assert ts.get_peft_model(base, config).eval()(**inputs).logits.equal(expected)


DROPPING = [
    (LoHaConfig(init_weights=False, rank_dropout=0.5), "rows"),
    (LoHaConfig(init_weights=False, module_dropout=0.5), "all"),
    (LoKrConfig(init_weights=False, rank_dropout=0.5), "rows"),
    (LoKrConfig(init_weights=False, rank_dropout=0.5, rank_dropout_scale=True), "scaled rows"),
    (LoKrConfig(init_weights=False, module_dropout=0.5), "all"),
]


@pytest.mark.parametrize(("config", "what"), DROPPING, ids=str)
def test_dropped_rows_of_the_change_are_the_bases(config, what):
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(32, 64)), torch.randn(5, 32)
    config = dataclasses.replace(config, target_modules=["0"])
    handle = ts.get_peft_model(base, config)
    whole, plain = handle.eval()(x) - base(x), base(x)
    seen = set()
    for _ in range(20):
        change = handle.train()(x) - plain
        dropped = (change.abs() < 1e-6).all(0)
        seen.add(int(dropped.sum()))
        factor = 64 / (64 - dropped.sum()) if what == "scaled rows" else 1.0
        torch.testing.assert_close(change[:, ~dropped], (whole * factor)[:, ~dropped], rtol=1e-4, atol=1e-5)
    assert seen == {0, 64} if what == "all" else len(seen) > 3


@pytest.mark.parametrize("config", [
    OFTConfig(oft_block_size=4, module_dropout=0.5, init_weights=False),
    BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, boft_dropout=0.5, init_weights=False),
], ids=lambda config: type(config).__name__)  # fmt: skip
def test_rotations_are_left_out_at_random_while_training(config):
    base, x = nn.Sequential(nn.Linear(32, 64)), torch.randn(5, 32)
    handle = ts.get_peft_model(base, dataclasses.replace(config, target_modules=["0"]))
    outputs = [handle.train()(x) for _ in range(4)]
    assert not any(torch.equal(outputs[0], other) for other in outputs[1:])
    assert torch.equal(handle.eval()(x), handle(x))
