"""Weights decoded into memory that is used again: the same numbers, and never where something would keep them."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from tests.bases.test_quantised import FLOATS, linear4bit
from tunesmith.bases import scratch
from tunesmith.bases.view import view_of
from tunesmith.kernels.decoded_linear import decoded_linear

bnb = pytest.importorskip("bitsandbytes")
has_function = pytest.mark.skipif(scratch._function("nf4", torch.bfloat16) is None, reason="the library has no such function")


@has_function
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_equals_what_bitsandbytes_decodes_bit_for_bit(kind, nested):
    for shape, blocksize in (((48, 100), 64), ((33, 66), 64), ((64, 64), 32), ((7, 2048), 1024), ((300, 200), 128)):
        module = linear4bit(shape, kind, nested, blocksize)
        for dtype in FLOATS:
            found = scratch.decoded(module.weight.data, module.weight.quant_state, dtype)
            assert torch.equal(found, view_of(module).weight_as(dtype))


@pytest.mark.parametrize(("shape", "blocksize"), [((5, 7), 64), ((4, 4096), 4096)], ids=str)
def test_what_the_function_cannot_do_is_left_to_bitsandbytes(shape, blocksize):
    module = linear4bit(shape, blocksize=blocksize)
    assert scratch.decoded(module.weight.data, module.weight.quant_state, torch.bfloat16) is None
    with torch.no_grad():
        assert torch.equal(view_of(module).operand(torch.bfloat16)(), view_of(module).weight_as(torch.bfloat16))


@has_function
def test_memory_is_used_again_and_threads_have_their_own():
    first, second = (linear4bit(shape) for shape in ((64, 128), (32, 64)))
    one = scratch.decoded(first.weight.data, first.weight.quant_state, torch.float32)
    expected, found = one.clone(), []
    other = threading.Thread(
        target=lambda: found.append(scratch.decoded(second.weight.data, second.weight.quant_state, torch.float32))
    )
    other.start()
    other.join()
    assert torch.equal(one, expected)
    again = scratch.decoded(second.weight.data, second.weight.quant_state, torch.float32)
    assert again.untyped_storage().data_ptr() == one.untyped_storage().data_ptr() and torch.equal(again, found[0])
    scratch.free()
    assert scratch._memory.bytes is None


@has_function
def test_recorded_weights_are_never_decoded_to_scratch():
    """A trained bias, and gradients of gradients: there the weight is kept for later, so it must be its own."""
    modules = [linear4bit((48, 64), compute=torch.float32, bias=True) for _ in range(2)]
    weights = [view_of(module).weight_as(torch.float32) for module in modules]
    x = torch.randn(3, 64, requires_grad=True)
    biases = [torch.zeros(48, requires_grad=True) for _ in modules]
    ys = [decoded_linear(x, view_of(module).operand(torch.float32), bias) for module, bias in zip(modules, biases)]
    (found,) = torch.autograd.grad(sum(y.square().sum() for y in ys), x)
    torch.testing.assert_close(found, sum(2 * (x @ w.T) @ w for w in weights).detach(), rtol=1e-4, atol=1e-4)
    ys = [decoded_linear(x, view_of(module).operand(torch.float32), None) for module in modules]
    (slope,) = torch.autograd.grad(sum(y.square().sum() for y in ys), x, create_graph=True)
    (found,) = torch.autograd.grad(slope.square().sum(), x)
    twice = sum(2 * w.T @ w for w in weights)
    torch.testing.assert_close(found, (2 * x @ twice @ twice).detach(), rtol=1e-3, atol=1e-3)


@has_function
def test_a_second_use_on_copies():
    module = linear4bit((64, 64), compute=torch.bfloat16)
    copied, x = copy.deepcopy(module), torch.randn(40, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(view_of(module)(x), view_of(copied)(x))
