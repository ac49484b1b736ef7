"""Configurations: their dictionary form, their checks, their defaults."""

from __future__ import annotations

import dataclasses
import json

import peft
import pytest

import tunesmith as ts
from tests.bad_input import edit_config
from tunesmith import ConfigError, LoraConfig, PeftConfig, PeftType, PromptTuningConfig, PromptTuningInit, TaskType
from tunesmith.config import config_text

CONFIGS = {
    "lora": LoraConfig(),
    "lora full": LoraConfig(
        task_type="CAUSAL_LM", base_model_name_or_path="some/base", revision="v2", r=3, lora_alpha=1.5, lora_dropout=0.25,
        use_rslora=True, bias="lora_only", init_lora_weights="gaussian", target_modules=["v_proj", "q_proj"],
        exclude_modules={"b", "a"}, layers_to_transform=[1, 0], layers_pattern="layers", modules_to_save=["lm_head"],
        rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 0.5}, fan_in_fan_out=True,
    ),
    "prompt": PromptTuningConfig(num_virtual_tokens=4, task_type=TaskType.SEQ_2_SEQ_LM),
    "prompt from text": PromptTuningConfig(
        num_virtual_tokens=4, task_type="CAUSAL_LM", prompt_tuning_init=PromptTuningInit.TEXT,
        prompt_tuning_init_text="hello", tokenizer_name_or_path="sprout", tokenizer_kwargs={"use_fast": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_dictionary_form_makes_an_equal_config_again(name):
    config = CONFIGS[name]
    assert PeftConfig.from_dict(config.to_dict()) == config
    assert type(config).from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", CONFIGS)
def test_dictionary_form_survives_json(name):
    config = CONFIGS[name]
    values = json.loads(json.dumps(config.to_dict()))
    assert values == config.to_dict()
    assert PeftConfig.from_dict(values) == config


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_folder_makes_an_equal_config_for_inference(name, tmp_path):
    config = CONFIGS[name]
    config.save_pretrained(tmp_path)
    expected = dataclasses.replace(config, inference_mode=True)
    assert PeftConfig.from_pretrained(tmp_path) == expected
    assert type(config).from_pretrained(str(tmp_path)) == expected
    assert (tmp_path / "adapter_config.json").read_text() == config_text(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_reference_reads_the_saved_config(name, tmp_path):
    config = CONFIGS[name]
    config.save_pretrained(tmp_path)
    theirs = peft.PeftConfig.from_pretrained(str(tmp_path))
    for field in dataclasses.fields(config):
        if field.name != "inference_mode":
            expected, found = getattr(config, field.name), getattr(theirs, field.name)
            assert (set(found) if isinstance(expected, set) else found) == expected, field.name


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (LoraConfig(r=4, target_modules=["b", "a"], task_type="CAUSAL_LM"), peft.LoraConfig),
        (PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), peft.PromptTuningConfig),
    ],
    ids=["lora", "prompt"],
)
def test_config_written_by_the_reference_is_read_without_a_warning(ours, theirs, tmp_path, caplog):
    values = {k: v for k, v in ours.to_dict().items() if k not in ("peft_type", "inference_mode")}
    theirs(**values).save_pretrained(str(tmp_path))
    assert dataclasses.replace(PeftConfig.from_pretrained(tmp_path), inference_mode=False) == ours
    assert not caplog.records


def test_subfolder_is_read(tmp_path):
    CONFIGS["lora full"].save_pretrained(tmp_path / "inner")
    assert PeftConfig.from_pretrained(tmp_path, subfolder="inner").r == 3


def test_saving_a_config_keeps_the_adapters_tensors(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"tensors")
    CONFIGS["lora"].save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"tensors"


# --- forms of values ------------------------------------------------------------------------------------------------


def test_sets_are_saved_as_sorted_lists():
    values = LoraConfig(target_modules={"v", "k", "q"}, exclude_modules=["z", "y"]).to_dict()
    assert values["target_modules"] == ["k", "q", "v"]
    assert values["exclude_modules"] == ["y", "z"]


def test_list_and_set_of_targets_are_the_same_config():
    assert (
        LoraConfig(target_modules=["q", "v"]) == LoraConfig(target_modules={"v", "q"}) == LoraConfig(target_modules=("v", "q"))
    )


def test_enums_are_saved_as_their_names():
    values = PromptTuningConfig(num_virtual_tokens=1, task_type=TaskType.CAUSAL_LM).to_dict()
    assert values["task_type"] == "CAUSAL_LM" and type(values["task_type"]) is str
    assert values["peft_type"] == "PROMPT_TUNING" and type(values["peft_type"]) is str
    assert values["prompt_tuning_init"] == "RANDOM" and type(values["prompt_tuning_init"]) is str


@pytest.mark.parametrize("task", list(TaskType))
def test_task_is_given_as_enum_or_name(task):
    assert LoraConfig(task_type=task) == LoraConfig(task_type=task.value)
    assert LoraConfig(task_type=task.value).task_type is task


def test_task_is_optional():
    assert LoraConfig().task_type is None
    assert LoraConfig().to_dict()["task_type"] is None


def test_unknown_task_is_an_error_that_names_the_nearest():
    with pytest.raises(ConfigError, match=r"task_type='casual_lm' is unknown.*did you mean 'CAUSAL_LM'"):
        LoraConfig(task_type="casual_lm")


SPELLINGS = {
    TaskType.CAUSAL_LM: ["causal_lm", "CAUSAL_LM ", "CAUSALLM", "CausalLM", "TaskType.CAUSAL_LM", "text-generation"],
    TaskType.SEQ_2_SEQ_LM: ["seq2seq", "SEQ2SEQ_LM", "Seq-2-Seq LM", "text2text-generation"],
    TaskType.SEQ_CLS: ["seq_cls", "SEQUENCE_CLASSIFICATION", "SequenceClassification", "text-classification"],
    TaskType.TOKEN_CLS: ["token_cls", "TOKEN_CLASSIFICATION"],
    TaskType.QUESTION_ANS: ["QUESTION_ANSWERING", "question-answering", "QA"],
    TaskType.FEATURE_EXTRACTION: ["feature-extraction", "FeatureExtraction"],
}


@pytest.mark.parametrize(("task", "written"), [(task, name) for task, names in SPELLINGS.items() for name in names])
def test_a_task_is_understood_as_people_write_it(task, written):
    assert LoraConfig(task_type=written).task_type is task
    assert PeftConfig.from_dict({"peft_type": "LORA", "task_type": written}).task_type is task


def test_a_task_of_the_reference_is_one_of_ours():
    for task in peft.TaskType:
        assert LoraConfig(task_type=task).task_type == LoraConfig(task_type=task.value).task_type == task.value


def test_what_is_no_task_is_none_in_a_file_with_one_warning(caplog):
    assert PeftConfig.from_dict({"peft_type": "LORA", "task_type": "CHATTING"}) == LoraConfig()
    (record,) = caplog.records
    assert "task_type='CHATTING'" in record.getMessage()


def test_method_decides_peft_type_whatever_is_given():
    assert LoraConfig(peft_type="IA3").peft_type is PeftType.LORA
    assert PromptTuningConfig(num_virtual_tokens=1).peft_type is PeftType.PROMPT_TUNING


def test_enums_equal_their_names_and_the_references():
    assert TaskType.CAUSAL_LM == "CAUSAL_LM" == peft.TaskType.CAUSAL_LM.value
    assert PeftType.LORA == "LORA" == peft.PeftType.LORA.value
    assert {task.value for task in TaskType} == {task.value for task in peft.TaskType}
    for member in ("LORA", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "ADALORA", "IA3", "LOHA", "LOKR", "VERA", "OFT"):
        assert PeftType[member].value == peft.PeftType[member].value


def test_empty_patterns_and_layers_mean_none():
    assert LoraConfig(rank_pattern=None, alpha_pattern=None) == LoraConfig(rank_pattern={}, alpha_pattern={})
    assert LoraConfig(layers_to_transform=[]) == LoraConfig()


def test_attaching_changes_the_callers_config_in_nothing(llama):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    before = config.to_dict()
    handle = ts.get_peft_model(llama, config)
    assert config.to_dict() == before
    assert handle.peft_config["default"] is not config


def test_attaching_fills_in_what_follows_from_the_base(llama):
    handle = ts.get_peft_model(llama, PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    config = handle.peft_config["default"]
    assert (config.token_dim, config.num_layers, config.num_attention_heads) == (32, 2, 4)
    assert config.num_transformer_submodules == 1


# --- defaults -------------------------------------------------------------------------------------------------------

SHARED = [
    (LoraConfig(), peft.LoraConfig()),
    (PromptTuningConfig(num_virtual_tokens=4), peft.PromptTuningConfig(num_virtual_tokens=4)),
]


@pytest.mark.parametrize(("ours", "theirs"), SHARED, ids=["lora", "prompt"])
def test_defaults_are_the_references(ours, theirs):
    for field in dataclasses.fields(ours):
        assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


@pytest.mark.parametrize(("ours", "theirs"), SHARED, ids=["lora", "prompt"])
def test_every_field_of_the_reference_is_a_field_or_known_as_not_supported(ours, theirs):
    known = {field.name for field in dataclasses.fields(ours)} | set(ours.not_supported) | {"peft_version"}
    assert set(theirs.to_dict()) <= known


@pytest.mark.parametrize(("ours", "theirs"), SHARED, ids=["lora", "prompt"])
def test_defaults_of_fields_that_are_not_supported_count_as_off(ours, theirs):
    values = {key: value for key, value in theirs.to_dict().items() if key != "peft_version"}
    assert type(PeftConfig.from_dict(values)) is type(ours)


# --- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"), [("lora_aplha", "lora_alpha"), ("target_module", "target_modules"), ("rslora", "use_rslora")]
)
def test_misspelt_keyword_is_an_error_that_names_the_nearest(key, nearest):
    with pytest.raises(ConfigError, match=f'LoraConfig has no field "{key}"; did you mean .*{nearest}'):
        LoraConfig(**{key: 1})


def test_all_misspelt_keywords_are_named_at_once():
    with pytest.raises(ConfigError, match=r'"lora_aplha".*"lora_droput"'):
        LoraConfig(lora_aplha=1, lora_droput=0.1)


def test_known_feature_that_is_not_supported_is_named():
    with pytest.raises(ConfigError, match=r"layer_replication=.*not supported"):
        LoraConfig(layer_replication=[[0, 1]])


@pytest.mark.parametrize("value", [None, False, "", 0, [], {}, True, "default", 16, 0.5, [1], {"a": 1}])
def test_unknown_keys_are_kept_and_told_of_in_one_warning_that_names_the_writer(value, caplog):
    values = {**LoraConfig(r=4).to_dict(), "from_the_future": value, "also": None, "peft_version": "0.30.0.dev0@abc"}
    config = PeftConfig.from_dict(values)
    (record,) = caplog.records
    assert f"also=None, from_the_future={value!r} (the file was written by peft 0.30.0.dev0@abc)" in record.getMessage()
    assert config == LoraConfig(r=4)
    assert {key: config.to_dict()[key] for key in ("also", "from_the_future")} == {"also": None, "from_the_future": value}


def test_unknown_keys_are_written_again_by_a_handle_that_loaded_them(llama, saved, tmp_path):
    edit_config(saved, from_the_future={"a": [1]})
    ts.PeftModel.from_pretrained(llama, saved).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["from_the_future"] == {"a": [1]}


@pytest.mark.parametrize("value", [True, "fast", 2, {"a": 1}])
def test_an_unknown_switch_that_is_on_is_an_error(value):
    with pytest.raises(ConfigError, match='no field "use_magic"'):
        PeftConfig.from_dict({**LoraConfig().to_dict(), "use_magic": value})


FOUND = {
    "peft 0.2": {"enable_lora": None, "merge_weights": True, "fan_in_fan_out": False, "bias": "none", "modules_to_save": None},
    "peft 0.6": {
        "auto_mapping": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "rank_pattern": {},
        "revision": None,
    },
    "a pattern of all layers": {"layers_pattern": "layers", "layers_to_transform": []},
    "a pattern of no list": {"layers_pattern": ["h"], "layers_to_transform": None},
    "an init that was not chosen": {"loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 2.0}, "init_lora_weights": True},
    "of the running process": {"runtime_config": {"ephemeral_gpu_offload": True}},
    "Unsloth": {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}, "peft_version": "0.18.0rc1"},
    "names given twice": {"target_modules": ["q_proj", "v_proj", "q_proj"]},
}


@pytest.mark.parametrize("case", FOUND)
def test_what_files_hold_without_meaning_it_is_read_without_a_warning(case, caplog):
    config = PeftConfig.from_dict({"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"], **FOUND[case]})
    mapping = FOUND[case].get("auto_mapping")
    assert config == LoraConfig(target_modules=["q_proj", "v_proj"], auto_mapping=mapping)
    assert not caplog.records


def test_parts_of_fused_weights_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"enable_lora=\[True, False, True\] is not supported"):
        PeftConfig.from_dict({"peft_type": "LORA", "enable_lora": [True, False, True]})


def test_known_feature_that_acts_is_named_when_read():
    with pytest.raises(ConfigError, match="megatron_core='mine'"):
        PeftConfig.from_dict({**LoraConfig().to_dict(), "megatron_core": "mine"})


def test_versions_in_files_are_no_business_of_ours(caplog):
    assert PeftConfig.from_dict({**LoraConfig().to_dict(), "peft_version": "99.0"}) == LoraConfig()
    assert not caplog.records


def test_overrides_win():
    assert PeftConfig.from_dict(LoraConfig().to_dict(), r=3).r == 3


@pytest.mark.parametrize("values", [{}, {"peft_type": None}, {"r": 8}])
def test_config_without_a_method_is_an_error(values):
    with pytest.raises(ConfigError, match="peft_type"):
        PeftConfig.from_dict(values)


@pytest.mark.parametrize(
    ("values", "whose"),
    [
        ({"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 8}}, "mlx-lm"),
        ({"config": {}, "hidden_size": 768, "model_class": "BertModelWithHeads", "model_type": "bert"}, "AdapterHub"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "a whole model's"),
    ],
)
def test_a_file_of_something_else_is_told_as_what_it_is(values, whose):
    with pytest.raises(ConfigError, match=f'no "peft_type".*it looks like .*{whose}'):
        PeftConfig.from_dict(values)


def test_unknown_method_is_an_error_that_names_the_nearest():
    with pytest.raises(ConfigError, match=r'"LORAX" is not known.*did you mean \'LORA\''):
        PeftConfig.from_dict({"peft_type": "LORAX"})


def test_config_of_another_method_is_an_error():
    with pytest.raises(ConfigError, match="LORA configuration, not a PromptTuningConfig"):
        PromptTuningConfig.from_dict(LoraConfig().to_dict())


# --- values ---------------------------------------------------------------------------------------------------------

WRONG = {
    "r is 0": (LoraConfig, {"r": 0}, "r=0 must be a whole number of at least 1"),
    "r is negative": (LoraConfig, {"r": -4}, "r=-4 must be a whole number"),
    "r is a text": (LoraConfig, {"r": "8"}, "r='8' must be of type int"),
    "r is a fraction": (LoraConfig, {"r": 8.0}, "r=8.0 must be of type int"),
    "r is a bool": (LoraConfig, {"r": True}, "r=True must be of type int"),
    "alpha is a text": (LoraConfig, {"lora_alpha": "16"}, "lora_alpha='16' must be of type int or float"),
    "alpha is NaN": (LoraConfig, {"lora_alpha": float("nan")}, "lora_alpha=nan must be a finite number"),
    "alpha is infinite": (LoraConfig, {"alpha_pattern": {"q": float("inf")}}, 'alpha_pattern["q"]=inf must be a finite'),
    "dropout is 1": (LoraConfig, {"lora_dropout": 1.0}, "lora_dropout=1.0 must be at least 0 and below 1"),
    "dropout is negative": (LoraConfig, {"lora_dropout": -0.1}, "lora_dropout=-0.1 must be at least 0"),
    "dropout is NaN": (LoraConfig, {"lora_dropout": float("nan")}, "lora_dropout=nan must be at least 0"),
    "dropout is a text": (LoraConfig, {"lora_dropout": "0.1"}, "lora_dropout='0.1' must be of type float"),
    "bias is unknown": (LoraConfig, {"bias": "some"}, 'bias=\'some\' must be "none", "all" or "lora_only"'),
    "bias is a bool": (LoraConfig, {"bias": True}, "bias=True must be of type str"),
    "init is unknown": (LoraConfig, {"init_lora_weights": "magic"}, "init_lora_weights='magic' must be True"),
    "rank pattern holds 0": (LoraConfig, {"rank_pattern": {"q": 0}}, 'rank_pattern["q"]=0 must be a whole number'),
    "rank pattern is a list": (LoraConfig, {"rank_pattern": ["q"]}, "rank_pattern=['q'] must be of type dict"),
    "rank pattern's key is no expression": (LoraConfig, {"rank_pattern": {"q(": 2}}, '"q(" is not a valid regular'),
    "targets are empty": (LoraConfig, {"target_modules": []}, "target_modules is empty; name at least one"),
    "targets are an empty text": (LoraConfig, {"target_modules": ""}, "target_modules is empty"),
    "targets are a number": (LoraConfig, {"target_modules": 5}, "target_modules=5 must be of type list"),
    "targets hold a number": (LoraConfig, {"target_modules": ["q", 5]}, "must be of type list[str]"),
    "targets hold a list": (LoraConfig, {"target_modules": [["q"]]}, "must be of type list[str]"),
    "targets are no expression": (LoraConfig, {"target_modules": "q("}, '"q(" is not a valid regular expression'),
    "exclusions are no expression": (LoraConfig, {"exclude_modules": "*q"}, 'exclude_modules: "*q" is not a valid regular'),
    "saved modules are one text": (LoraConfig, {"modules_to_save": "lm_head"}, "modules_to_save='lm_head' must be of type"),
    "layers are a text": (LoraConfig, {"layers_to_transform": "3"}, "layers_to_transform='3' must be of type list[int]"),
    "layers with an expression": (
        LoraConfig, {"layers_to_transform": 1, "target_modules": ".*q"}, "layers_to_transform needs target_modules as a list",
    ),
    "inference mode is a text": (LoraConfig, {"inference_mode": "no"}, "inference_mode='no' must be of type bool"),
    "base is a number": (LoraConfig, {"base_model_name_or_path": 5}, "base_model_name_or_path=5 must be of type str"),
    "no virtual tokens": (PromptTuningConfig, {}, "num_virtual_tokens=None must be a whole number of at least 1"),
    "0 virtual tokens": (PromptTuningConfig, {"num_virtual_tokens": 0}, "num_virtual_tokens=0 must be a whole number"),
    "half a virtual token": (PromptTuningConfig, {"num_virtual_tokens": 0.5}, "num_virtual_tokens=0.5 must be of type int"),
    "init of prompt is unknown": (
        PromptTuningConfig, {"num_virtual_tokens": 1, "prompt_tuning_init": "WORDS"}, "one of RANDOM, SAMPLE_VOCAB, TEXT",
    ),
    "text init without text": (
        PromptTuningConfig, {"num_virtual_tokens": 1, "prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "x"},
        "needs prompt_tuning_init_text",
    ),
    "text init without tokenizer": (
        PromptTuningConfig, {"num_virtual_tokens": 1, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x"},
        "needs tokenizer_name_or_path",
    ),
    "tokenizer arguments without text init": (
        PromptTuningConfig, {"num_virtual_tokens": 1, "tokenizer_kwargs": {"use_fast": True}}, "used only with",
    ),
    "tokenizer that runs code": (
        PromptTuningConfig,
        {"num_virtual_tokens": 1, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "x",
         "tokenizer_kwargs": {"trust_remote_code": True}},
        "may not set trust_remote_code",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_value_is_an_error_when_made_and_when_read(case):
    cls, values, message = WRONG[case]
    with pytest.raises(ConfigError) as made:
        cls(**values)
    assert message in str(made.value) and cls.__name__ in str(made.value)
    with pytest.raises(ConfigError) as read:
        PeftConfig.from_dict({"peft_type": cls.method, **values})
    assert str(read.value) == str(made.value)


def test_a_layer_pattern_alone_is_an_error_when_made():
    with pytest.raises(ConfigError, match="layers_pattern needs layers_to_transform"):
        LoraConfig(layers_pattern="h")


def test_all_wrong_values_are_named_at_once():
    with pytest.raises(ConfigError, match=r"r=0.*lora_dropout=2.*bias='x'"):
        LoraConfig(r=0, lora_dropout=2.0, bias="x")


@pytest.mark.parametrize("rank", [1, 3, 4096])
def test_scale_is_alpha_over_rank_or_its_root(rank):
    assert LoraConfig(r=rank, lora_alpha=6).settings("any").scale == 6 / rank
    assert LoraConfig(r=rank, lora_alpha=6, use_rslora=True).settings("any").scale == 6 / rank**0.5


def test_unsupported_features_may_be_named_to_say_that_they_are_off():
    assert LoraConfig(r=4, use_dora=False, layer_replication=None, megatron_core="megatron.core") == LoraConfig(r=4)
    with pytest.raises(ConfigError, match="use_qalora=True is not supported"):
        LoraConfig(use_qalora=True)
