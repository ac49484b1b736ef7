"""docs/add-a-method.md, run as it stands, and what else a method from outside the package needs."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from tests import tiny
from tests.handles import out
from tunesmith import (
    ConfigError,
    IA3Config,
    LinearAdapter,
    LoraConfig,
    PeftConfig,
    PeftModel,
    TargetedConfig,
    config_class,
    get_peft_model,
    register,
    registry,
)

GUIDE = (Path(__file__).parents[2] / "docs" / "add-a-method.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"<!-- test: snippet -->\n```python\n(.*?)```", GUIDE, flags=re.DOTALL)


@pytest.fixture
def methods_restored(monkeypatch):
    """What a test registers is known to that test only."""
    registry.all_methods()
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))


@pytest.fixture
def guide(methods_restored, tmp_path, monkeypatch):
    """The guide's first file, imported as a user's module."""
    (tmp_path / "row_gain.py").write_text(SNIPPETS[0], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("row_gain")
    del sys.modules["row_gain"]


def test_the_guide_runs_from_top_to_bottom(methods_restored, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(SNIPPETS) == 3
    names: dict = {"__name__": "__main__"}
    for snippet in SNIPPETS:
        exec(compile(snippet, "add-a-method.md", "exec", dont_inherit=True), names)
    assert "ROW_GAIN" in capsys.readouterr().out


def test_the_guides_method_starts_as_the_base_merges_and_folds(guide):
    for name, targets in (("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn"]), ("bloom", ["query_key_value"])):
        base, inputs = tiny.make(name).double(), tiny.inputs_for(name)
        handle = get_peft_model(base, guide.RowGainConfig(task_type="CAUSAL_LM", target_modules=targets)).eval()
        assert torch.equal(out(handle, inputs), out(base, inputs))
        handle.add_adapter("lora", LoraConfig(target_modules=targets, init_lora_weights=False))
        with torch.no_grad():
            for parameter in handle.tree("default").parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        for active in (["default"], ["default", "lora"], ["lora", "default"]):
            handle.set_adapter(active)
            expected = out(handle, inputs)
            assert (expected - out(base, inputs)).abs().max() > 1e-3
            handle.merge_adapter()
            torch.testing.assert_close(out(handle, inputs), expected, rtol=1e-10, atol=1e-10)
            handle.unmerge_adapter()


def test_the_guides_config_is_checked_as_any(guide):
    with pytest.raises(ConfigError, match=r"dropout=1\.5"):
        guide.RowGainConfig(dropout=1.5)
    with pytest.raises(ConfigError, match="did you mean 'dropout'"):
        guide.RowGainConfig(dropuot=0.5)


def test_loading_without_the_module_says_to_import_it(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "ROW_GAIN_OF_MINE"}))
    with pytest.raises(ConfigError, match=r"ROW_GAIN_OF_MINE.*import the module that registers it first"):
        PeftConfig.from_pretrained(tmp_path)
    with pytest.raises(Exception, match="import the module that registers it first"):
        PeftModel.from_pretrained(tiny.make("llama"), tmp_path)


def test_a_name_belongs_to_one_method(methods_restored):
    @config_class
    class OtherConfig(TargetedConfig):
        method: ClassVar[str] = "LORA"

    with pytest.raises(ConfigError, match=r'"LORA" is already the name of tunesmith.methods.lora.Lora; choose another'):
        register(OtherConfig)(type("Other", (LinearAdapter,), {}))
    assert registry.method_named("LORA").config is LoraConfig


def test_the_same_file_may_be_run_twice(guide):
    """As in a notebook; the later definition counts."""
    first = guide.RowGain
    again = importlib.reload(guide)
    assert again.RowGain is not first and registry.method_named("ROW_GAIN").adapter is again.RowGain


def test_what_is_forgotten_is_named(methods_restored):
    class Undecorated(TargetedConfig):
        method: ClassVar[str] = "MINE"

    @config_class
    class Nameless(TargetedConfig):
        own: int = 1

    with pytest.raises(ConfigError, match=r"Undecorated is not a configuration yet; decorate it with @config_class"):
        register(Undecorated)
    with pytest.raises(ConfigError, match=r'Nameless does not name its method; add `method: ClassVar\[str\] = "..."`'):
        register(Nameless)
    with pytest.raises(ConfigError, match=r"Linear is not an adapter class; derive it from LinearAdapter"):
        register(IA3Config)(nn.Linear)
