"""Saving what cannot be saved, or where it cannot be: one clear error, and nothing is written."""

from __future__ import annotations

from tests.bad_input import one_error
from tests.parity.oracle import ours_on
from tunesmith import AdapterNameError


def test_saving_an_unknown_adapter_writes_nothing(llama, tmp_path):
    handle = ours_on(llama, "lora", "CAUSAL_LM")
    with one_error(AdapterNameError, 'no adapter "second"'):
        handle.save_pretrained(tmp_path / "out", selected_adapters=["default", "second"])
    assert not (tmp_path / "out").exists()
