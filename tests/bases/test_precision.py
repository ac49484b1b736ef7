"""The type a base computes in by default, and what is said of it."""

from __future__ import annotations

import pytest
import torch

from tunesmith import ConfigError
from tunesmith.bases import precision
from tunesmith.jobs.settings import Settings


@pytest.mark.parametrize("instructions", [(False, False), (True, False), (False, True)])
def test_bfloat16_where_the_cpu_multiplies_it(instructions, monkeypatch):
    for name, there in zip(("_is_avx512_bf16_supported", "_is_amx_tile_supported"), instructions):
        monkeypatch.setattr(torch.cpu, name, lambda there=there: there, raising=False)
    expected = torch.bfloat16 if any(instructions) else None
    assert precision.fast_dtype(torch.device("cpu")) is expected
    monkeypatch.setattr(precision, "_usual_device", lambda: "cpu")
    assert precision.dtype_named("auto") is expected


def test_a_large_base_in_float32_is_worth_a_word_where_16_bits_are_fast(monkeypatch):
    cpu, base = torch.device("cpu"), torch.nn.Linear(30, 20)
    monkeypatch.setattr(precision, "fast_dtype", lambda device: torch.bfloat16)
    assert precision.slower_than_need_be(base, cpu) is None
    monkeypatch.setattr(precision, "MIN_SIZE_FOR_ADVICE", 600)
    assert "load it with dtype=torch.bfloat16" in str(precision.slower_than_need_be(base, cpu))
    assert precision.slower_than_need_be(base.to(torch.bfloat16), cpu) is None
    monkeypatch.setattr(precision, "fast_dtype", lambda device: None)
    assert precision.slower_than_need_be(base.float(), cpu) is None


def test_named_types_and_others():
    assert precision.dtype_named("float32") is torch.float32
    assert precision.fast_dtype(torch.device("meta")) is None
    with pytest.raises(ConfigError, match=r'dtype "fp32" is unknown.*use auto, float32, bfloat16, float16'):
        Settings(dtype="fp32")
