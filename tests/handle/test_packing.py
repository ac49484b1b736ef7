"""Whether a model takes packed rows, however it is wrapped."""

from __future__ import annotations

import torch

from tests import handles, tiny
from tunesmith import can_pack


def test_a_compiled_handle_takes_packed_rows_as_the_handle_does():
    handle = handles.lora(tiny.make("llama"))
    assert can_pack(handle) and can_pack(torch.compile(handle, backend="eager")) and can_pack(tiny.make("llama"))


def test_a_compiled_handle_on_a_base_that_cannot_pack_is_refused():
    assert not can_pack(torch.compile(handles.lora(tiny.make("bloom")), backend="eager"))
