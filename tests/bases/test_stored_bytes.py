"""The bytes of each stored form, against bitsandbytes' own tensors."""

from __future__ import annotations

import pytest
import torch

from tests.bases.test_quantised import SHAPES, linear4bit, linear8bit
from tunesmith.bases.stored_bytes import FORMS, stored_bytes

each_shape = pytest.mark.parametrize("shape", [*SHAPES, (300, 200), (512, 1024)], ids=str)


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@each_shape
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_of_4_bits(kind, nested, shape):
    weight = linear4bit(shape, kind, nested).weight
    state = weight.quant_state
    held = [weight.data, state.absmax, state.code]
    if nested:
        held += [state.state2.absmax, state.state2.code, state.offset]
    assert stored_bytes(f"{kind} nested" if nested else kind, *shape) == bytes_of(*held)


@each_shape
def test_of_8_bits_and_of_plain_numbers(shape):
    weight = linear8bit(shape).weight
    assert stored_bytes("int8", *shape) == bytes_of(weight.data, weight.SCB)
    for name in ("float32", "bfloat16", "float16"):
        assert stored_bytes(name, *shape) == bytes_of(torch.empty(shape, dtype=getattr(torch, name)))


def test_bits_per_weight_of_a_large_matrix():
    """What QLoRA's paper counts: 0.5 bits per weight for scales, 0.127 with double quantisation."""
    bits = {form: 8 * stored_bytes(form, 4096, 4096) / 4096**2 for form in FORMS}
    assert bits["nf4"] == pytest.approx(4.5, abs=1e-4)
    assert bits["nf4 nested"] == pytest.approx(4.127, abs=1e-3)
    assert bits["int8"] == pytest.approx(8.008, abs=1e-3)
