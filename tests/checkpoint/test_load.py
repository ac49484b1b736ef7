"""Whatever is wrong with a config, a name or a file: one clear error, and everything is as it was before."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
import struct
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tunesmith as ts
from tests import tiny
from tests.parity.oracle import ours_on, output, tensors
from tunesmith import AdapterFileError, AdapterNameError, ConfigError, LoraConfig, PromptTuningConfig, TargetError, UsageError
from tunesmith.runtime.site import site_of

INPUTS = tiny.inputs_for("llama")
WEIGHTS, CONFIG, BIN = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"


class Snapshot:
    """Everything of a base that a failed call must leave alone."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.modules = {path: type(module) for path, module in base.named_modules()}
        self.forwards = {path for path, module in base.named_modules() if "forward" in module.__dict__}
        self.values = {name: value.clone() for name, value in base.state_dict().items()}
        self.objects = {name: id(p) for name, p in base.named_parameters()}
        self.requires_grad = {name: p.requires_grad for name, p in base.named_parameters()}
        self.training = base.training
        self.config = base.config.to_dict() if hasattr(base, "config") else None
        self.output = self.run(base)

    def run(self, model: nn.Module) -> torch.Tensor | None:
        return output(model, INPUTS) if hasattr(self.base, "config") else None

    def check(self) -> None:
        base = self.base
        assert {path: type(module) for path, module in base.named_modules()} == self.modules
        assert {path for path, module in base.named_modules() if "forward" in module.__dict__} == self.forwards
        assert {name: id(p) for name, p in base.named_parameters()} == self.objects
        assert {name: p.requires_grad for name, p in base.named_parameters()} == self.requires_grad
        assert all(torch.equal(value, self.values[name]) for name, value in base.state_dict().items())
        assert base.training == self.training
        if self.output is not None:
            assert base.config.to_dict() == self.config
            assert torch.equal(output(base, INPUTS), self.output)


@contextmanager
def one_error(kind: type[Exception], *words: str):
    """The body raises exactly `kind`, whose text holds `words`; nothing else is warned of or logged."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("tunesmith")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            with pytest.raises(Exception) as caught:
                yield
    finally:
        logger.removeHandler(handler)
    assert type(caught.value) is kind, f"{type(caught.value).__name__}: {caught.value}"
    text = str(caught.value)
    for word in words:
        assert re.search(word, text), f"{word!r} is not in: {text}"
    own = Path(ts.__file__).parent
    assert not records and not [w for w in warned if Path(w.filename).is_relative_to(own)]


def sites(base: nn.Module) -> int:
    return sum(site_of(module) is not None for module in base.modules())


# --- configurations that do not fit the base --------------------------------------------------------------------------

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
        LoraConfig(target_modules=["q_proj"], exclude_modules=["q_proj"]), TargetError, ["exclude_modules leaves out every"],
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
        ConfigError, ['"/no/such/folder" holds no tokenizer', "check the name"],
    ),
    "tokenizer of another base": (
        PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", prompt_tuning_init="TEXT",
                           prompt_tuning_init_text="Once upon a time there was", tokenizer_name_or_path="sprout"),
        ConfigError, [r"makes token \d+, the base knows 96", "use its own"],
    ),
    "text without tokens": (
        PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", prompt_tuning_init="TEXT",
                           prompt_tuning_init_text="?", tokenizer_name_or_path="EMPTY"),
        ConfigError, ["has no tokens", "give it words"],
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
    with one_error(UsageError, "needs a model first, got str"):
        ts.get_peft_model("llama", LoraConfig())


def test_handle_in_place_of_a_base(llama):
    handle = ours_on(llama, "lora", "CAUSAL_LM")
    with one_error(UsageError, "has adapters already", "add_adapter"):
        ts.get_peft_model(handle, LoraConfig())


def test_rank_that_groups_do_not_divide():
    base = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with one_error(TargetError, "r=3 is not a multiple of its 2 groups"):
        ts.get_peft_model(base, LoraConfig(r=3, target_modules=["0"]))
    assert sites(base) == 0


def test_module_names_that_are_words_of_pythons_own_are_no_obstacle(tmp_path):
    """Trees mirror the base's names, whatever they are."""

    def make():
        torch.manual_seed(0)
        base = nn.Module()
        for name in ("items", "add", "prompt", "node", "keys"):
            setattr(base, name, nn.Linear(4, 4))
        base.forward = None
        del base.forward
        return base

    base = make()
    handle = ts.get_peft_model(
        base, LoraConfig(target_modules=["items", "add", "prompt", "node", "keys"], init_lora_weights=False)
    )
    handle.save_pretrained(tmp_path)
    again = ts.PeftModel.from_pretrained(make(), tmp_path)
    assert handle.get_nb_trainable_parameters()[0] == 5 * 64
    for mine, loaded in zip(handle.adapters.parameters(), again.adapters.parameters()):
        assert torch.equal(mine, loaded)


# --- adapter names ----------------------------------------------------------------------------------------------------

UNSAFE = [
    "",
    "../x",
    "a/b",
    "a\\b",
    "..",
    ".",
    ".hidden",
    "a.b",
    "x\n",
    "a\0b",
    "-x",
    " x",
    "x" * 129,
    "~",
    "C:x",
    "*",
    None,
    3,
]
RESERVED = ["keys", "items", "values", "pop", "training", "forward", "parameters", "_modules", "to"]


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_adapter_name(name, llama):
    before = Snapshot(llama)
    with one_error(AdapterNameError, "is not usable", "use letters, digits"):
        ts.get_peft_model(llama, LoraConfig(), adapter_name=name)
    before.check()


@pytest.mark.parametrize("name", RESERVED)
def test_adapter_name_that_pytorch_uses(name, llama):
    before = Snapshot(llama)
    with one_error(AdapterNameError, f'"{name}" is a word of PyTorch', "take another"):
        ts.get_peft_model(llama, LoraConfig(), adapter_name=name)
    before.check()


@pytest.mark.parametrize("name", ["lora", "lora_A", "base_model", "adapters", "über 2", "a-b_c 3", "0", "_x", "x" * 128])
def test_usable_adapter_name_survives_saving_and_loading(name, llama, tmp_path):
    """Also names like parts of tensor names, which the reference reloads untrained."""
    handle = ts.get_peft_model(llama, LoraConfig(r=2, init_lora_weights=False), adapter_name=name).eval()
    handle.save_pretrained(tmp_path)
    again = ts.PeftModel.from_pretrained(llama, tmp_path / name, adapter_name=name).eval()
    assert torch.equal(output(again, INPUTS), output(handle, INPUTS))
    assert not torch.equal(output(again, INPUTS), output(llama, INPUTS))


def test_taken_adapter_name(llama):
    handle = ours_on(llama, "lora", "CAUSAL_LM")
    adapted = output(handle, INPUTS)
    with one_error(AdapterNameError, '"default" is taken', "names in use: default"):
        handle.add_adapter("default", LoraConfig(r=2))
    assert handle.peft_config["default"].r == 4
    assert torch.equal(output(handle, INPUTS), adapted)


@pytest.mark.parametrize("call", ["set_adapter", "delete_adapter"])
def test_unknown_adapter_name(call, llama):
    handle = ours_on(llama, "lora", "CAUSAL_LM")
    with one_error(AdapterNameError, 'no adapter "defualt"', "did you mean 'default'", 'adapters here: "default"'):
        getattr(handle, call)("defualt")
    assert handle.active_adapters == ["default"]


def test_saving_an_unknown_adapter_writes_nothing(llama, tmp_path):
    handle = ours_on(llama, "lora", "CAUSAL_LM")
    with one_error(AdapterNameError, 'no adapter "second"'):
        handle.save_pretrained(tmp_path / "out", selected_adapters=["default", "second"])
    assert not (tmp_path / "out").exists()


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """The folder of a good LoRA adapter for the tiny Llama."""
    folder = tmp_path / "adapter"
    ours_on(tiny.make("llama"), "lora", "CAUSAL_LM").save_pretrained(folder)
    return folder


def damage(name):
    """Register a way to spoil an adapter's folder, with the error it must lead to."""

    def add(function):
        DAMAGES[name] = function
        return function

    return add


DAMAGES: dict = {}
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def _edit_tensors(folder, change):
    values = tensors(folder)
    change(values)
    save_file(values, folder / WEIGHTS, metadata={"format": "pt"})


def _edit_config(folder, **changes):
    values = json.loads((folder / CONFIG).read_text())
    values.update(changes)
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def _header(folder, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


@damage("truncated weights")
def _(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    return AdapterFileError, [WEIGHTS, "damaged", "download or save the adapter again"]


@damage("weights cut inside the header")
def _(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:40])
    return AdapterFileError, ["damaged", "again"]


@damage("empty weights")
def _(folder):
    (folder / WEIGHTS).write_bytes(b"")
    return AdapterFileError, ["damaged", "again"]


@damage("weights that are no safetensors")
def _(folder):
    (folder / WEIGHTS).write_bytes(b"<html>404 not found</html>" * 20)
    return AdapterFileError, ["damaged or no safetensors file", "again"]


@damage("absurd header length")
def _(folder):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + b"{}")
    return AdapterFileError, ["damaged", "again"]


@damage("overlapping tensors")
def _(folder):
    entry = {"dtype": "F32", "shape": [4, 32], "data_offsets": [0, 512]}
    _header(folder, dict.fromkeys(tensors(folder), entry), bytes(512))
    return AdapterFileError, ["damaged", "again"]


@damage("tensor beyond the end")
def _(folder):
    _header(folder, {FIRST: {"dtype": "F32", "shape": [4, 32], "data_offsets": [0, 512]}}, bytes(8))
    return AdapterFileError, ["damaged", "again"]


@damage("shape that is not the data's")
def _(folder):
    _header(folder, {FIRST: {"dtype": "F32", "shape": [4, 3200000000], "data_offsets": [0, 512]}}, bytes(512))
    return AdapterFileError, ["damaged", "again"]


@damage("wrong type")
def _(folder):
    _edit_tensors(folder, lambda v: v.update({FIRST: v[FIRST].to(torch.int32)}))
    return AdapterFileError, [FIRST, "holds torch.int32", "expected a type like torch.float32", "nothing was loaded"]


@damage("complex numbers")
def _(folder):
    _edit_tensors(folder, lambda v: v.update({FIRST: v[FIRST].to(torch.complex64)}))
    return AdapterFileError, [FIRST, "holds torch.complex64"]


@damage("wrong shape")
def _(folder):
    _edit_tensors(folder, lambda v: v.update({FIRST: torch.zeros(5, 32)}))
    return AdapterFileError, [FIRST, r"shape \(5, 32\), the base needs \(4, 32\)"]


@damage("transposed")
def _(folder):
    _edit_tensors(folder, lambda v: v.update({FIRST: v[FIRST].T.contiguous()}))
    return AdapterFileError, [FIRST, r"shape \(32, 4\), the base needs \(4, 32\)"]


@damage("NaN")
def _(folder):
    _edit_tensors(folder, lambda v: v[FIRST].view(-1)[:1].fill_(float("nan")))
    return AdapterFileError, [FIRST, r"not finite \(NaN or infinity\)"]


@damage("infinity")
def _(folder):
    _edit_tensors(folder, lambda v: v[FIRST].view(-1)[-1:].fill_(float("-inf")))
    return AdapterFileError, [FIRST, "not finite"]


@damage("number that is infinite in the adapter's type")
def _(folder):
    _edit_tensors(folder, lambda v: v.update({FIRST: v[FIRST].double().fill_(1e300)}))
    return AdapterFileError, [FIRST, "not finite"]


@damage("NaN in 8 bits")
def _(folder):
    _edit_tensors(folder, lambda v: v.update({FIRST: torch.full((4, 32), float("nan")).to(torch.float8_e4m3fn)}))
    return AdapterFileError, [FIRST, "not finite"]


@damage("missing tensor")
def _(folder):
    _edit_tensors(folder, lambda v: v.pop(FIRST))
    return AdapterFileError, [f'"{FIRST}" is missing', "again"]


@damage("no tensors at all")
def _(folder):
    _edit_tensors(folder, dict.clear)
    return AdapterFileError, [f'"{FIRST}" is missing']


@damage("misspelt tensor")
def _(folder):
    _edit_tensors(folder, lambda v: v.update({FIRST.replace("q_proj", "q_prj"): v.pop(FIRST)}))
    return AdapterFileError, [f'"{FIRST}" is missing', "q_prj.*belongs to no part of the adapter; did you mean"]


@damage("extra tensor")
def _(folder):
    _edit_tensors(folder, lambda v: v.update({"base_model.model.extra.lora_A.weight": torch.zeros(1)}))
    return AdapterFileError, [r'"base_model.model.extra.lora_A.weight" belongs to no part']


@damage("weights of the base")
def _(folder):
    _edit_tensors(folder, lambda v: v.update({"base_model.model.lm_head.weight": torch.zeros(96, 32)}))
    return AdapterFileError, [r'"base_model.model.lm_head.weight" belongs to no part']


@damage("weights of the prefix only")
def _(folder):
    _edit_tensors(folder, lambda v: [v.update({k.removeprefix("base_model.model."): v.pop(k)}) for k in list(v)])
    return AdapterFileError, ["is missing", "belongs to no part"]


@damage("all faults at once")
def _(folder):
    def change(values):
        values[FIRST] = torch.zeros(5, 32)
        values.pop(FIRST.replace("lora_A", "lora_B"))
        values["extra"] = torch.zeros(1)

    _edit_tensors(folder, change)
    return AdapterFileError, ["has the shape", "is missing", '"extra" belongs to no part']


@damage("config that is no JSON")
def _(folder):
    (folder / CONFIG).write_text("{'r': 8}")
    return AdapterFileError, [CONFIG, "not valid JSON", "again"]


@damage("config that is binary")
def _(folder):
    (folder / CONFIG).write_bytes(b"\xff\xfe\x00\x01")
    return AdapterFileError, [CONFIG, "not valid JSON"]


@damage("empty config")
def _(folder):
    (folder / CONFIG).write_text("")
    return AdapterFileError, [CONFIG, "not valid JSON"]


@damage("config nested without end")
def _(folder):
    (folder / CONFIG).write_text("[" * 200_000)
    return AdapterFileError, [CONFIG, "not valid JSON"]


@damage("config with an endless number")
def _(folder):
    (folder / CONFIG).write_text('{"peft_type": "LORA", "r": ' + "9" * 100_000 + "}")
    return AdapterFileError, [CONFIG, "not valid JSON"]


@damage("config that is a list")
def _(folder):
    (folder / CONFIG).write_text('["LORA"]')
    return AdapterFileError, [CONFIG, "holds a list, expected a JSON object"]


@damage("config that is null")
def _(folder):
    (folder / CONFIG).write_text("null")
    return AdapterFileError, ["holds a NoneType, expected a JSON object"]


@damage("config without a method")
def _(folder):
    _edit_config(folder, peft_type=...)
    return ConfigError, [CONFIG, 'no "peft_type"']


@damage("unknown method")
def _(folder):
    _edit_config(folder, peft_type="LORRA")
    return ConfigError, [CONFIG, '"LORRA" is not known', "did you mean 'LORA'"]


@damage("method that is no text")
def _(folder):
    _edit_config(folder, peft_type={"a": 1})
    return ConfigError, ["is not known"]


@damage("unknown key that acts")
def _(folder):
    _edit_config(folder, use_magic=True)
    return ConfigError, [CONFIG, '"use_magic"']


@damage("known feature that this version lacks")
def _(folder):
    _edit_config(folder, layer_replication=[[0, 2]])
    return ConfigError, ["layer_replication=", "not supported by this version"]


@damage("value of the wrong type")
def _(folder):
    _edit_config(folder, lora_alpha="16")
    return ConfigError, [CONFIG, "lora_alpha='16'"]


@damage("alpha that is not a number")
def _(folder):
    (folder / CONFIG).write_text((folder / CONFIG).read_text().replace('"lora_alpha": 8', '"lora_alpha": NaN'))
    return ConfigError, ["lora_alpha=nan must be a finite number"]


@damage("rank of the config alone")
def _(folder):
    _edit_config(folder, r=8)
    return AdapterFileError, [FIRST, r"shape \(4, 32\), the base needs \(8, 32\)"]


@damage("rank that no machine holds")
def _(folder):
    _edit_config(folder, r=10**15)
    return AdapterFileError, ["cannot be built here"]


@damage("targets of another base")
def _(folder):
    _edit_config(folder, target_modules=["c_attn"], base_model_name_or_path="openai/gpt2")
    return TargetError, [r'adapter" \(made for "openai/gpt2"\)', 'no module matches "c_attn"', '"q_proj"']


@damage("other widths than the base's")
def _(folder):
    base = tiny.tf.LlamaForCausalLM(tiny._llama_config(hidden_size=64))
    shutil.rmtree(folder)
    ours_on(base, "lora", "CAUSAL_LM").save_pretrained(folder)
    _edit_config(folder, base_model_name_or_path="some/llama")
    return AdapterFileError, [
        r'made for "some/llama"',
        r"shape \(4, 64\), the base needs \(4, 32\)",
        "take the base it was made for",
    ]


@damage("more layers than the base's")
def _(folder):
    base = tiny.tf.LlamaForCausalLM(tiny._llama_config(num_hidden_layers=3))
    shutil.rmtree(folder)
    ours_on(base, "lora", "CAUSAL_LM").save_pretrained(folder)
    return AdapterFileError, [r"layers.2.self_attn.q_proj.lora_A.weight\" belongs to no part"]


@damage("task of another base")
def _(folder):
    _edit_config(folder, task_type="SEQ_2_SEQ_LM")
    return ConfigError, ["needs an encoder-decoder"]


@damage("no config")
def _(folder):
    (folder / CONFIG).unlink()
    return AdapterFileError, [f"holds no {CONFIG}, so it is not an adapter"]


@damage("adapters only in folders inside")
def _(folder):
    (folder / "second").mkdir()
    (folder / CONFIG).rename(folder / "second" / CONFIG)
    return AdapterFileError, [f"holds no {CONFIG}", "adapters inside it: second"]


@damage("no weights")
def _(folder):
    (folder / WEIGHTS).unlink()
    return AdapterFileError, [f"has a {CONFIG} but no {WEIGHTS}", "again"]


@damage("folder in place of the config")
def _(folder):
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()
    return AdapterFileError, [f"holds no {CONFIG}"]


@damage("folder in place of the weights")
def _(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    return AdapterFileError, [f"no {WEIGHTS}"]


@damage("config that links to nothing")
def _(folder):
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to(folder / "nowhere")
    return AdapterFileError, [f"holds no {CONFIG}"]


@damage("config that links to itself")
def _(folder):
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to(folder / CONFIG)
    return AdapterFileError, [f"holds no {CONFIG}"]


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, place) -> None:
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


@damage("pickle that runs code")
def _(folder):
    (folder / WEIGHTS).unlink()
    torch.save({FIRST: Payload(folder.parent / "pwned")}, folder / BIN)
    return AdapterFileError, [BIN, "runs no code from pickles", f"ask its author for {WEIGHTS}"]


@damage("bare pickle that runs code")
def _(folder):
    (folder / WEIGHTS).unlink()
    (folder / BIN).write_bytes(pickle.dumps(Payload(folder.parent / "pwned")))
    return AdapterFileError, [BIN, "runs no code from pickles"]


@damage("pickle of something else")
def _(folder):
    (folder / WEIGHTS).unlink()
    torch.save([torch.zeros(3)], folder / BIN)
    return AdapterFileError, [BIN, "something else than named tensors"]


@damage("pickle with more than tensors")
def _(folder):
    values = tensors(folder)
    (folder / WEIGHTS).unlink()
    torch.save({**values, "epoch": 3}, folder / BIN)
    return AdapterFileError, [BIN, "something else than named tensors"]


@damage("truncated pickle")
def _(folder):
    values = tensors(folder)
    (folder / WEIGHTS).unlink()
    torch.save(values, folder / BIN)
    (folder / BIN).write_bytes((folder / BIN).read_bytes()[:500])
    return AdapterFileError, [BIN, "cannot be read as plain tensors"]


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_adapter_on_a_fresh_base(case, llama, saved):
    kind, words = DAMAGES[case](saved)
    before = Snapshot(llama)
    with one_error(kind, *words):
        ts.PeftModel.from_pretrained(llama, saved)
    before.check()
    assert sites(llama) == 0
    assert not (saved.parent / "pwned").exists()


@pytest.mark.parametrize("name", ["second", "default"])
@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_adapter_on_a_handle(case, name, llama, saved):
    """Under a new name and in place of a good adapter, which stays good."""
    handle = ours_on(llama, "lora", "CAUSAL_LM", r=4)
    kind, words = DAMAGES[case](saved)
    before, adapted, count = Snapshot(llama), output(handle, INPUTS), sites(llama)
    trained = {key: p.requires_grad for key, p in handle.named_parameters()}
    if name == "default" and case.startswith("rank"):  # seen sooner, in comparison with the adapter here
        kind, words = AdapterFileError, ["cannot take the place", r"'r': \d+.* there, .*'r': 4.* here"]
    with one_error(kind, *words):
        handle.load_adapter(saved, name)
    before.check()
    assert sites(llama) == count
    assert list(handle.peft_config) == list(handle.adapters) == handle.active_adapters == ["default"]
    assert {key: p.requires_grad for key, p in handle.named_parameters()} == trained
    assert torch.equal(output(handle, INPUTS), adapted)
    assert not (saved.parent / "pwned").exists()


@pytest.mark.parametrize("case", ["truncated weights", "config that is no JSON", "targets of another base", "NaN"])
def test_damaged_adapter_does_not_disturb_another_handle_of_the_base(case, llama, saved):
    other = ours_on(llama, "prompt", "CAUSAL_LM")
    kind, words = DAMAGES[case](saved)
    before, adapted = Snapshot(llama), output(other, INPUTS)
    with one_error(kind, *words):
        ts.PeftModel.from_pretrained(llama, saved)
    before.check()
    assert not any(p.requires_grad for p in llama.parameters())
    assert torch.equal(output(other, INPUTS), adapted)


def test_damaged_virtual_tokens(llama, tmp_path):
    ours_on(llama, "prompt", "CAUSAL_LM").save_pretrained(tmp_path)
    _edit_tensors(tmp_path, lambda v: v.update(prompt_embeddings=torch.zeros(5, 32)))
    base = tiny.make("llama")
    before = Snapshot(base)
    with one_error(AdapterFileError, r'"prompt_embeddings" has the shape \(5, 32\), the base needs \(4, 32\)'):
        ts.PeftModel.from_pretrained(base, tmp_path)
    before.check()


def test_unknown_key_that_is_off_is_one_warning(llama, saved, caplog):
    _edit_config(saved, from_the_future=None, another=False)
    with caplog.at_level(logging.WARNING, "tunesmith"):
        ts.PeftModel.from_pretrained(llama, saved)
    assert [r.getMessage() for r in caplog.records] == ["ignoring unknown keys that are switched off: another, from_the_future"]


@pytest.mark.parametrize(
    ("change", "word"),
    [({"lora_alpha": 64}, "'scale': 16.0"), ({"use_rslora": True}, "scale"), ({"peft_type": "PROMPT_TUNING"}, "")],
)
def test_adapter_of_other_settings_cannot_replace_values(change, word, llama, saved):
    """Its tensors would fit, but compute something else under the settings of the adapter here."""
    handle = ours_on(llama, "lora", "CAUSAL_LM")
    adapted = output(handle, INPUTS)
    if "peft_type" in change:
        shutil.rmtree(saved)
        ours_on(tiny.make("llama"), "prompt", "CAUSAL_LM").save_pretrained(saved)
    else:
        _edit_config(saved, **change)
    with one_error(AdapterFileError, "cannot take the place", "load it under another name", word):
        handle.load_adapter(saved, "default")
    assert torch.equal(output(handle, INPUTS), adapted)


def test_values_of_a_merged_adapter_cannot_be_replaced(llama, saved):
    handle = ours_on(llama, "lora", "CAUSAL_LM")
    handle.merge_adapter()
    with one_error(UsageError, '"default" is merged', "unmerge_adapter"):
        handle.load_adapter(saved, "default")


def test_text_start_needs_no_tokenizer_when_values_are_loaded(llama, tmp_path):
    ours_on(llama, "prompt", "CAUSAL_LM").save_pretrained(tmp_path)
    _edit_config(tmp_path, prompt_tuning_init="TEXT", prompt_tuning_init_text="x", tokenizer_name_or_path="/gone")
    ts.PeftModel.from_pretrained(llama, tmp_path)


# --- places that hold no adapter --------------------------------------------------------------------------------------

NOWHERE = {
    "absolute path": ("/no/such/folder", ["there is no folder /no/such/folder", "check the path"]),
    "relative path": ("./no/such", ["there is no folder no/such"]),
    "parent's path": ("../../no-such-folder-here", ["there is no folder"]),
    "deep path": ("a/b/c", ["there is no folder a/b/c"]),
    "hub id": ("nobody/nothing", ['"nobody/nothing" is no folder here', "hub cannot be reached", "HF_HUB_OFFLINE"]),
    "hub id that is none": ("no body/nothing?", ["neither a folder here nor a repository"]),
    "endless name": ("x" * 5000, ["there is no folder", "owner/name"]),
    "name with a zero byte": ("a\0b", ["there is no folder", "owner/name"]),
    "empty name": ("", ["'' names no adapter"]),
    "None": (None, ["None names no adapter", "give a folder or the id"]),
    "number": (3, ["3 names no adapter"]),
}


@pytest.mark.parametrize("case", NOWHERE)
def test_place_that_is_none(case, llama, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    place, words = NOWHERE[case]
    before = Snapshot(llama)
    for call in (
        ts.PeftConfig.from_pretrained,
        lambda p: ts.PeftModel.from_pretrained(llama, p),
        ts.AutoPeftModel.from_pretrained,
    ):
        with one_error(AdapterFileError, *words):
            call(place)
    before.check()


def test_file_in_place_of_a_folder(llama, saved):
    with one_error(AdapterFileError, f"{WEIGHTS} is a file; give the folder that holds {CONFIG}"):
        ts.PeftModel.from_pretrained(llama, saved / WEIGHTS)


@pytest.mark.parametrize("subfolder", ["../adapter", "inner/../../x", "/etc", ".."])
def test_subfolder_that_leads_out(subfolder, llama, saved):
    for place in (saved, "nobody/nothing"):
        with one_error(AdapterFileError, "leads out of the adapter's folder", "inside it"):
            ts.PeftModel.from_pretrained(llama, place, subfolder=subfolder)


def test_subfolder_that_is_not_there(llama, saved):
    with one_error(AdapterFileError, "there is no folder .*adapter/inner"):
        ts.PeftModel.from_pretrained(llama, saved, subfolder="inner")


def test_linked_files_are_read_as_in_the_hubs_cache(llama, saved, tmp_path):
    links = tmp_path / "links"
    links.mkdir()
    for name in (CONFIG, WEIGHTS):
        (links / name).symlink_to(saved / name)
    linked = ts.PeftModel.from_pretrained(llama, links).eval()
    plain = ts.PeftModel.from_pretrained(llama, saved).eval()
    assert torch.equal(output(linked, INPUTS), output(plain, INPUTS))


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX")
def test_config_that_may_not_be_read(llama, saved):
    with _as_nobody(saved), one_error(AdapterFileError, CONFIG, "cannot be read", "permissions"):
        (saved / CONFIG).chmod(0)
        ts.PeftModel.from_pretrained(llama, saved)


# --- places that cannot be written ------------------------------------------------------------------------------------


@contextmanager
def _as_nobody(folder):
    """Root may do anything, so tests of permissions are run as nobody, who owns `folder`."""
    if os.geteuid() != 0:
        yield
        return
    paths = [folder, *folder.rglob("*")]
    for path in paths:
        os.chown(path, 65534, 65534)
    parents = [parent for parent in folder.parents if parent.stat().st_uid == 0 and parent.stat().st_mode & 0o777 == 0o700]
    for parent in parents:
        parent.chmod(0o711)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        for parent in parents:
            parent.chmod(0o700)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX")
def test_saving_into_a_read_only_folder(llama, saved):
    handle = ours_on(llama, "lora", "CAUSAL_LM", r=2)
    before, adapted = {p.name: p.read_bytes() for p in saved.iterdir()}, output(handle, INPUTS)
    with _as_nobody(saved), one_error(AdapterFileError, "cannot save into", "Permission denied", "give another folder"):
        saved.chmod(0o555)
        handle.save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert torch.equal(output(handle, INPUTS), adapted)


def test_saving_onto_a_file(llama, tmp_path):
    (tmp_path / "file").write_text("mine")
    with one_error(AdapterFileError, "file is a file; give a folder to save into"):
        ours_on(llama, "lora", "CAUSAL_LM").save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_saving_below_a_file(llama, tmp_path):
    (tmp_path / "file").write_text("mine")
    with one_error(AdapterFileError, "cannot save into .*file/inner"):
        ours_on(llama, "lora", "CAUSAL_LM").save_pretrained(tmp_path / "file" / "inner")
    assert (tmp_path / "file").read_text() == "mine"


def test_saving_where_a_folder_bears_a_files_name(llama, tmp_path):
    (tmp_path / WEIGHTS).mkdir()
    with one_error(AdapterFileError, "cannot save into"):
        ours_on(llama, "lora", "CAUSAL_LM").save_pretrained(tmp_path)


def test_saving_onto_a_linked_file_replaces_the_link_only(llama, tmp_path):
    (tmp_path / "precious").write_text("mine")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / CONFIG).symlink_to(tmp_path / "precious")
    ours_on(llama, "lora", "CAUSAL_LM").save_pretrained(folder)
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (folder / CONFIG).is_symlink()


def test_linked_working_folder_is_neither_read_nor_emptied(llama, saved, tmp_path):
    """Someone else's adapter folder may hold a link by our working folder's name."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / CONFIG).write_text("mine")
    (saved / ".adapter-commit").symlink_to(precious)
    ts.PeftModel.from_pretrained(llama, saved)
    with one_error(AdapterFileError, "cannot save into"):
        ours_on(llama, "lora", "CAUSAL_LM").save_pretrained(saved)
    assert (precious / CONFIG).read_text() == "mine"
    ts.PeftModel.from_pretrained(llama, saved)


# --- adapters that bring their base -----------------------------------------------------------------------------------


def test_adapter_that_names_no_base_cannot_bring_it(saved):
    _edit_config(saved, base_model_name_or_path=None)
    with one_error(ConfigError, "names no base model", r"load the base and call PeftModel.from_pretrained"):
        ts.AutoPeftModelForCausalLM.from_pretrained(saved)


def test_auto_class_of_another_task(saved):
    with one_error(ConfigError, "was made for CAUSAL_LM; AutoPeftModelForSeq2SeqLM loads SEQ_2_SEQ_LM"):
        ts.AutoPeftModelForSeq2SeqLM.from_pretrained(saved)


def test_an_unknown_loading_option_is_an_error_and_the_ecosystems_placement_options_are_not(tmp_path):
    ts.get_peft_model(tiny.make("llama"), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"revison.*revision"):
        ts.PeftModel.from_pretrained(tiny.make("llama"), tmp_path, revison="main")
    ts.PeftModel.from_pretrained(tiny.make("llama"), tmp_path, device_map="auto", low_cpu_mem_usage=True)
