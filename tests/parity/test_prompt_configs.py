"""Configuration files of the methods at the model's entrance: no key that the reference does not know, none lost."""

from __future__ import annotations

import json

import pytest

import tunesmith as ts
from tests import tiny
from tests.parity.oracle import CONFIGS, ours_on, theirs_on, written_by_peft

KINDS = ["p-tuning", "prefix", "multitask", "adaption"]


@pytest.mark.parametrize("kind", KINDS)
def test_files_have_the_references_keys_and_values(kind, tmp_path):
    base = tiny.make("llama")
    ours_on(base, kind, "CAUSAL_LM").save_pretrained(tmp_path / "ours")
    written_by_peft(theirs_on(base, kind, "CAUSAL_LM"), tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "theirs"))
    assert ours.keys() <= theirs.keys()
    differing = {key for key in ours if ours[key] != theirs[key]} - {"base_model_name_or_path"}
    assert not differing, {key: (ours[key], theirs[key]) for key in differing}


@pytest.mark.parametrize("kind", KINDS)
def test_configs_survive_their_file(kind, tmp_path):
    handle = ours_on(tiny.make("llama"), kind, "CAUSAL_LM")
    handle.save_pretrained(tmp_path)
    config = ts.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, CONFIGS[kind][0])
    assert config.to_dict() == {**handle.peft_config["default"].to_dict(), "inference_mode": True}
