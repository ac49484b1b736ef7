"""Adapter files of an earlier release: read bit for bit, and written again byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tunesmith as ts
from tests import tiny
from tunesmith.registry import all_methods

ROOT = Path(__file__).with_name("written_before")
FOLDERS = sorted(path for path in ROOT.iterdir() if path.is_dir())
CONFIG, WEIGHTS, ENCODER = "adapter_config.json", "adapter_model.safetensors", "adapter_encoder.safetensors"


def loaded(folder: Path, **kwargs) -> ts.PeftModel:
    base = tiny.make((folder / "model.txt").read_text(encoding="utf-8").strip())
    return ts.PeftModel.from_pretrained(base, folder, **kwargs)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_tensor_is_read_bit_for_bit(folder):
    expected = load_file(folder / WEIGHTS)
    found = loaded(folder).get_adapter_state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_saved_again_the_files_are_the_same(folder, tmp_path):
    """What an encoder computes is in its own file; only a trainable adapter has one to save again."""
    encoded = (folder / ENCODER).exists()
    loaded(folder, is_trainable=encoded).save_pretrained(tmp_path)
    assert (tmp_path / ENCODER).exists() == encoded
    for name in (CONFIG, WEIGHTS, *([ENCODER] if encoded else [])):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_every_method_has_files():
    found = {ts.PeftConfig.from_pretrained(folder).peft_type.value for folder in FOLDERS}
    assert found == {name for name, method in all_methods().items() if method.adapter.__module__.startswith("tunesmith.")}
