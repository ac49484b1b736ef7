"""Names of transformers 4 reach what they reached there, or are refused, or one warning says what they leave out."""

from __future__ import annotations

import logging

import peft
import pytest
import torch
from torch import nn

import tunesmith as ts
from tests import experts, tiny
from tests.bad_input import Snapshot, one_error
from tests.parity.oracle import agree, quiet
from tunesmith import LoraConfig, TargetError, UsageError, get_peft_model
from tunesmith.attach.former import former_places

INPUTS = tiny.inputs_for("llama")
NAMES = {"mixtral": ["w1", "w2", "w3"], "phi-moe": ["w1", "w2", "w3"]}
GATED = ["gate_proj", "up_proj", "down_proj"]


def handle(name: str, config: ts.PeftConfig | None = None, **fields) -> ts.PeftModel:
    return get_peft_model(experts.make(name), config or LoraConfig(r=4, **fields))


def told(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("tunesmith"))


@pytest.mark.parametrize(
    "name, targets",
    [
        *((name, "all-linear") for name in ("mixtral", "qwen3-moe", "olmoe")),
        *((name, NAMES.get(name, GATED)) for name in ("mixtral", "qwen3-moe", "olmoe", "deepseek-v3", "glm4-moe")),
        ("mixtral", r".*\.(q_proj|w[123])"),
        ("qwen3-moe", r".*_proj"),
        ("qwen3-moe", ["q_proj", "gate", *GATED]),
    ],
)
def test_as_many_parameters_train_as_in_the_reference(name, targets):
    with quiet():
        theirs = peft.get_peft_model(experts.make(name), peft.LoraConfig(r=4, target_modules=targets))
    assert handle(name, target_modules=targets).get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize(
    "name, options",
    [("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}), ("qwen3-moe", {"target_modules": "all-linear"})],
)
def test_means_the_same_in_both_and_in_files(name, options, tmp_path):
    agree(experts.make(name), "lora", "CAUSAL_LM", INPUTS, tmp_path, **options)


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "deepseek-v3", "phi-moe"])
def test_all_linear_reaches_every_matrix_of_a_layer(name):
    model = handle(name, target_modules="all-linear")
    adapted = {path for path, _ in model.tree("default").items()}
    holders = {
        path
        for path, module in model.bare_base.model.layers.named_modules(prefix="model.layers")
        if any(p.dim() > 1 for p in module.parameters(recurse=False))
    }
    assert adapted == holders
    y = model(**INPUTS, labels=INPUTS["input_ids"])
    y.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "deepseek-v3", "phi-moe"])
def test_former_names_are_of_views_of_todays_weights(name):
    base = experts.make(name)
    places = former_places(base, dict(base.named_modules()))
    names = NAMES.get(name, GATED)
    order = (names[0], names[2], names[1]) if names != GATED else GATED
    maps = experts.expert_maps(base, tuple(order), "block_sparse_moe" if names != GATED else "mlp")
    assert set(maps) == {path for path, place in places.items() if place.expert is not None}
    for path, place in places.items():
        if place.expert is not None:
            stack = base.get_submodule(place.path)._parameters[place.parameter]
            assert maps[path].data_ptr() in {part.data_ptr() for part in stack[place.expert].chunk(2)}


WRONG = {
    "one map of two that are one parameter": (
        "mixtral",
        {"target_modules": ["w1", "w2"]},
        ["w1.*is a target.*w3.*is not", "name all"],
    ),
    "one expert": (
        "mixtral",
        {"target_modules": ["experts.0.w2"]},
        ["experts.0.w2 is a target", r"experts.1.w2 \(and 2 more\) is not"],
    ),
    "half of them excluded": (
        "qwen3-moe",
        {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
        ["up_proj", "is not"],
    ),
    "dropout": ("mixtral", {"target_modules": "all-linear", "lora_dropout": 0.1}, ["lora_dropout", "exclude_modules"]),
    "dora": ("qwen3-moe", {"target_modules": GATED, "use_dora": True}, ["use_dora", "experts"]),
    "ranks by expert": (
        "mixtral",
        {"target_modules": ["w2"], "rank_pattern": {r"experts\.0\.w2": 2}},
        ["one rank", "down_proj"],
    ),
    "scales by name": ("mixtral", {"target_modules": ["w1", "w3"], "rank_pattern": {"w1": 2}}, ["one alpha / r"]),
    "rank of what is no target": (
        "mixtral",
        {"target_modules": ["q_proj"], "rank_pattern": {"w1": 2}},
        ['"w1" matches no target'],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_refused(case):
    name, fields, words = WRONG[case]
    base = experts.make(name)
    before = Snapshot(base)
    with one_error(TargetError, *words):
        get_peft_model(base, LoraConfig(r=4, **fields))
    before.check()


@pytest.mark.parametrize(
    "config, words",
    [
        (ts.LoHaConfig(target_modules=["q_proj", "w1"]), ['"w1" names experts', "LOHA cannot"]),
        (ts.IA3Config(target_modules=r".*w2", feedforward_modules=[]), ["names experts", "IA3 cannot"]),
        (ts.LoKrConfig(target_modules=["gate_up_proj"]), ["names experts", "LOKR cannot"]),
    ],
)
def test_other_methods_cannot_adapt_experts(config, words):
    with one_error(TargetError, *words):
        handle("mixtral", config)


LEFT_OUT = {
    "modules that share experts' names": (
        "deepseek-v3",
        LoraConfig(target_modules=GATED),
        ["layers.0.mlp.gate_proj", "longer"],
    ),
    "experts that were never modules": (
        "llama4",
        LoraConfig(target_modules="all-linear"),
        ["experts.down_proj", "target_parameters"],
    ),
    "experts that share modules' names": (
        "llama4",
        LoraConfig(target_modules=["down_proj"]),
        ["experts.down_proj (and 1 more)"],
    ),
    "experts, by a method that cannot": (
        "mixtral",
        ts.LoHaConfig(target_modules="all-linear"),
        ["mlp.gate", "experts", "LOHA"],
    ),
    "a router, by a method that cannot": (
        "llama4",
        LoraConfig(target_modules="all-linear", lora_dropout=0.1),
        ["router", "lora_dropout"],
    ),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_one_warning_says_what_is_left_out(case, caplog):
    name, config, words = LEFT_OUT[case]
    with caplog.at_level(logging.WARNING):
        model = handle(name, config)
    assert all(word in told(caplog) for word in words), told(caplog)
    assert len([record for record in caplog.records if "left out" in record.getMessage()]) == 1
    model(**INPUTS)


def test_nothing_is_told_where_nothing_is_left_out(caplog):
    with caplog.at_level(logging.WARNING):
        handle("qwen3-moe", target_modules="all-linear")
        handle("mixtral", target_modules="all-linear", exclude_modules=["experts"])
        handle("mixtral", target_modules="all-linear", exclude_modules=["w1", "w3"])
        handle("mixtral")
    assert told(caplog) == ""


def test_a_handle_shows_parameters_and_its_configuration_attaches_again():
    config = LoraConfig(r=4, target_modules="all-linear", layers_to_transform=[1], rank_pattern={"gate_proj": 2, "up_proj": 2},
                        alpha_pattern={"gate_proj": 4, "up_proj": 4})  # fmt: skip
    model = handle("deepseek-v3", config)
    assert "model.layers.1.mlp.experts.{gate_up_proj,down_proj}  2 x parameter" in repr(model)
    assert "model.layers.1.mlp.shared_experts.{gate_proj,up_proj,down_proj}  3 x Linear" in repr(model)
    change = model.tree("default").get_submodule("model.layers.1.mlp.experts._parameters_changed").gate_up_proj
    assert (change.r, change.scale) == (4, 2.0)
    model.add_adapter("again", model.peft_config["default"])
    shapes = [{name: p.shape for name, p in model.tree(adapter).named_parameters()} for adapter in ("default", "again")]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    "name, target", [("llama4", "router"), ("phi-moe", "router"), ("phi-moe", "gate"), ("gpt-oss", "router")]
)
def test_a_router_is_adapted_by_its_weight(name, target):
    base = experts.make(name)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=[target], init_lora_weights=False)).eval()
    y = model(**INPUTS).logits
    assert not torch.equal(y, base(**INPUTS).logits)
    assert torch.allclose(y, model.merge_and_unload(copy=True)(**INPUTS).logits, atol=1e-5)


def test_a_router_is_refused_by_other_methods():
    with one_error(TargetError, "layers.0.feed_forward.router: it is a router"):
        handle("llama4", ts.LoHaConfig(target_modules=["router"]))


class TwoAnswers(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y, y.argmax(-1)


def test_a_linear_module_that_answers_a_tuple_is_named_at_its_first_call():
    model = get_peft_model(nn.Sequential(TwoAnswers(4, 3)), LoraConfig(target_modules=["0"]))
    with one_error(UsageError, "TwoAnswers answers a tuple", "leave it out of target_modules"):
        model(torch.ones(2, 4))


@pytest.mark.parametrize("targets", [["gate_up_proj", "down_proj"], r".*experts\.(gate_up|down)_proj"])
def test_names_of_parameters_are_target_parameters(targets):
    model = handle("gpt-oss", target_modules=targets)
    assert model.peft_config["default"].target_parameters == ["experts.down_proj", "experts.gate_up_proj"]
    assert not model.peft_config["default"].target_modules
