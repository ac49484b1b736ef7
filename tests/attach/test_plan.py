"""Configurations that do not fit the base: one clear error, and everything is as it was before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tunesmith as ts
from tests import tiny
from tests.bad_input import INPUTS, Snapshot, one_error, sites
from tests.handles import lora
from tests.parity.oracle import ours_on, output
from tunesmith import ConfigError, LoraConfig, PromptTuningConfig, TargetError, UsageError, get_peft_model
from tunesmith.runtime.site import site_of

UNFIT = {
    "unknown target": (
        LoraConfig(target_modules=["q_prj", "v_proj"]), TargetError,
        [r'no module matches "q_prj"', r'nearest: "q_proj" \(2 modules\)'],
    ),
    "all faults at once": (
        LoraConfig(target_modules=["q_prj", "v_prj"], modules_to_save=["lm_haed"]), TargetError, ["q_prj", "v_prj", "lm_haed"],
    ),
    "expression that matches nothing": (
        LoraConfig(target_modules=r"decoder\..*"), TargetError, [r"no module matches the regular expression", '"q_proj"'],
    ),
    "target that cannot carry an adapter": (
        LoraConfig(target_modules=["input_layernorm"]), TargetError,
        [r"layers.0.input_layernorm \(and 1 more\) is a LlamaRMSNorm, which cannot carry Lora", "name Linear"],
    ),
    "target that is a whole block": (LoraConfig(target_modules=["mlp"]), TargetError, ["is a LlamaMLP"]),
    "rank pattern that matches nothing": (
        LoraConfig(target_modules=["q_proj"], rank_pattern={"q_prj": 4}), TargetError,
        [r'rank_pattern key "q_prj" matches no target', "did you mean 'q_proj'"],
    ),
    "alpha pattern of a module that is no target": (
        LoraConfig(target_modules=["q_proj"], alpha_pattern={"k_proj": 4}), TargetError, ['alpha_pattern key "k_proj"'],
    ),
    "pattern key that is only a part of a name": (
        LoraConfig(target_modules=["q_proj"], rank_pattern={"proj": 4}), TargetError, ['rank_pattern key "proj"'],
    ),
    "layer that is not there": (
        LoraConfig(target_modules=["q_proj"], layers_to_transform=[1, 7]), TargetError,
        ["no target in layer 7", "layers with targets: 0 to 1"],
    ),
    "everything excluded": (
        LoraConfig(target_modules=["q_proj"], exclude_modules=["q_proj"]), TargetError, ["exclude_modules excludes every"],
    ),
    "saved module that is not there": (
        LoraConfig(modules_to_save=["lm_haed"]), TargetError, ['modules_to_save: no module matches "lm_haed"', "lm_head"],
    ),
    "module both adapted and trained whole": (
        LoraConfig(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"]), TargetError,
        ['"lm_head" is a target, but its modules are trained whole', "leave it out"],
    ),
    "task of an encoder-decoder": (LoraConfig(task_type="SEQ_2_SEQ_LM"), ConfigError, ["needs an encoder-decoder", "CAUSAL"]),
    "task of a classifier": (
        LoraConfig(task_type="SEQ_CLS"), ConfigError, ["needs a model with a task head", "AutoModelForSequenceClassification"],
    ),
    "virtual tokens without a task": (PromptTuningConfig(num_virtual_tokens=4), ConfigError, ["need a task_type"]),
    "virtual tokens of another width": (
        PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", token_dim=64), ConfigError, ["token_dim=64", "in 32"],
    ),
    "tokenizer that is not there": (
        PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", prompt_tuning_init="TEXT", prompt_tuning_init_text="x",
                           tokenizer_name_or_path="/no/such/folder"),
        ConfigError, ['"/no/such/folder" has no tokenizer', "check the name"],
    ),
    "tokenizer of another base": (
        PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", prompt_tuning_init="TEXT",
                           prompt_tuning_init_text="Once upon a time there was", tokenizer_name_or_path="sprout"),
        ConfigError, [r"gives token id \d+, but the base has 96 tokens", "use the tokenizer of the base"],
    ),
    "text without tokens": (
        PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", prompt_tuning_init="TEXT",
                           prompt_tuning_init_text="?", tokenizer_name_or_path="EMPTY"),
        ConfigError, ["has no tokens", "give it some text"],
    ),
    "no config": ({"r": 8}, ConfigError, [r"peft_config must be a configuration such as LoraConfig\(...\), got dict"]),
}  # fmt: skip


@pytest.fixture
def empty_tokenizer(monkeypatch):
    """The tokenizer "EMPTY" makes no tokens of anything."""
    import transformers

    load = transformers.AutoTokenizer.from_pretrained
    silent = staticmethod(lambda name, **kwargs: (lambda text: {"input_ids": []}) if name == "EMPTY" else load(name, **kwargs))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", silent)


@pytest.mark.parametrize("case", UNFIT)
def test_config_that_does_not_fit_a_fresh_base(case, llama, empty_tokenizer):
    config, kind, words = UNFIT[case]
    before = Snapshot(llama)
    with one_error(kind, *words):
        ts.get_peft_model(llama, config)
    before.check()
    assert sites(llama) == 0


@pytest.mark.parametrize("case", UNFIT)
def test_config_that_does_not_fit_a_handle_with_an_adapter(case, llama, empty_tokenizer):
    config, kind, words = UNFIT[case]
    handle = ours_on(llama, "lora", "CAUSAL_LM")
    before, adapted, count = Snapshot(llama), output(handle, INPUTS), sites(llama)
    with one_error(kind, *words):
        handle.add_adapter("second", config)
    before.check()
    assert sites(llama) == count
    assert list(handle.peft_config) == list(handle.adapters) == handle.active_adapters == ["default"]
    assert torch.equal(output(handle, INPUTS), adapted)


def test_decoder_task_on_an_encoder_decoder():
    base = tiny.make("t5")
    with one_error(ConfigError, "needs a decoder-only model", "use SEQ_2_SEQ_LM"):
        ts.get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"))
    assert all(p.requires_grad for p in base.parameters()) and sites(base) == 0


def test_generation_task_on_a_base_without_a_head():
    base = tiny.make("bert-features")
    with one_error(ConfigError, "needs a model that generates", "LM head"):
        ts.get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"))
    assert all(p.requires_grad for p in base.parameters()) and sites(base) == 0


def test_base_that_is_no_model():
    with one_error(UsageError, "needs a model as its first argument, got str"):
        ts.get_peft_model("llama", LoraConfig())


def test_handle_in_place_of_a_base(llama):
    handle = ours_on(llama, "lora", "CAUSAL_LM")
    with one_error(UsageError, "already has adapters", "add_adapter"):
        ts.get_peft_model(handle, LoraConfig())


def test_rank_that_groups_do_not_divide():
    base = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with one_error(TargetError, "r=3 is not a multiple of its 2 groups"):
        ts.get_peft_model(base, LoraConfig(r=3, target_modules=["0"]))
    assert sites(base) == 0


def test_data_parallel_and_wrapped_bases_are_refused(llama):
    with pytest.raises(TargetError, match="DataParallel"):
        get_peft_model(nn.DataParallel(llama), LoraConfig(target_modules=["q_proj"]))


def test_tensor_parallel_bases_are_refused(llama):
    llama._tp_size = 2
    with pytest.raises(TargetError, match="tensor parallelism"):
        lora(llama)
    assert not any(site_of(module) for module in llama.modules())
