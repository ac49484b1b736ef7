"""Views of 4-bit and 8-bit modules: what they decode, what they compute, and that they leave alone what is stored."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tunesmith.bases.quantised import dense_module, hold, logical_size, release
from tunesmith.bases.view import compute_dtype, view_of

bnb = pytest.importorskip("bitsandbytes")

SHAPES = [(5, 7), (33, 65), (48, 100), (64, 64), (32, 256), (1, 1)]  # odd ones, rows that are no whole blocks, whole ones
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def linear4bit(shape=(64, 64), kind="nf4", nested=False, blocksize=64, dtype=torch.bfloat16, compute=None, bias=False):
    """A quantised `Linear4bit` on the CPU."""
    out, inner = shape
    module = bnb.nn.Linear4bit(inner, out, bias=bias, compute_dtype=compute, compress_statistics=nested, quant_type=kind)
    module.weight = bnb.nn.Params4bit(
        torch.randn(out, inner, dtype=dtype), quant_type=kind, compress_statistics=nested, blocksize=blocksize, module=module
    )
    if bias:
        module.bias = nn.Parameter(torch.randn(out, dtype=dtype), requires_grad=False)
    return module.to("cpu")


def linear8bit(shape=(64, 64), bias=False):
    out, inner = shape
    module = bnb.nn.Linear8bitLt(inner, out, bias=bias, has_fp16_weights=False, threshold=6.0)
    return module.to("cpu")


def by_the_formula(module) -> torch.Tensor:
    """`level[code] * scale of its block` in fp32, from the packed bytes: high half first."""
    state = module.weight.quant_state
    packed = module.weight.data.view(torch.uint8).flatten().int()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[: state.shape.numel()]
    scales = state.absmax
    if state.nested:
        inner = state.state2
        scales = inner.code[scales.int()] * inner.absmax.repeat_interleave(inner.blocksize)[: len(scales)] + state.offset
    levels = bnb.functional.get_4bit_type(state.quant_type, device="cpu")
    return (levels[codes] * scales.repeat_interleave(state.blocksize)[: len(codes)]).view(state.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bit_weights_decode_as_bitsandbytes_decodes_them_bit_for_bit(kind, nested, shape):
    for dtype in FLOATS:
        module = linear4bit(shape, kind, nested, dtype=dtype)
        expected = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        found = view_of(module).weight_as(dtype)
        assert found.dtype == dtype and tuple(found.shape) == shape == tuple(view_of(module).shape)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bit_weights_are_levels_times_scales(kind, shape):
    """fp32: exact. bf16: that value rounded once, whatever type the weight had before."""
    for nested in (False, True):
        module = linear4bit(shape, kind, nested)
        expected = by_the_formula(module)
        torch.testing.assert_close(view_of(module).weight_as(torch.float32), expected, rtol=2**-22, atol=0)
        torch.testing.assert_close(view_of(module).weight_as(torch.bfloat16).float(), expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("blocksize", [32, 64, 128, 512, 2048, 4096])
def test_every_block_size_decodes(blocksize):
    module = linear4bit((24, 200), blocksize=blocksize)
    expected = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    assert torch.equal(view_of(module).weight_as(torch.bfloat16), expected)
    torch.testing.assert_close(view_of(module).weight_as(torch.float32), by_the_formula(module), rtol=2**-22, atol=0)


def test_8_bit_weights_decode_as_bitsandbytes_decodes_them_bit_for_bit():
    for shape in SHAPES:
        module = linear8bit(shape)
        expected = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        assert torch.equal(view_of(module).weight(), expected)
        module(torch.randn(2, shape[1]))  # the package's forward moves the scales to another place
        assert torch.equal(view_of(module).weight(), expected)


def test_the_type_a_module_computes_in():
    assert compute_dtype(linear4bit(compute=torch.float16)) == torch.float16
    assert compute_dtype(linear4bit(compute=None, dtype=torch.bfloat16)) == torch.bfloat16  # nothing asked for: as it was
    assert compute_dtype(linear8bit()) == torch.float32


@pytest.mark.parametrize("x_type", FLOATS, ids=str)
@pytest.mark.parametrize("compute", FLOATS, ids=str)
def test_4_bit_output_and_gradient_are_those_of_the_decoded_weight(compute, x_type):
    module = linear4bit((48, 100), compute=compute, bias=True)
    x = torch.randn(2, 3, 100, dtype=x_type, requires_grad=True)
    upstream = torch.randn(2, 3, 48, dtype=x_type)
    weight = view_of(module).weight_as(compute)
    expected = F.linear(x.to(compute), weight, module.bias.to(compute)).to(x_type)
    (wanted,) = torch.autograd.grad(expected, x, upstream)
    y = view_of(module)(x)
    (found,) = torch.autograd.grad(y, x, upstream)
    assert y.dtype == x_type and torch.equal(y, expected) and torch.equal(found, wanted)
    with torch.no_grad():
        assert torch.equal(view_of(module)(x), expected)  # 100 inputs are no whole blocks: no way of its own for few rows
    assert torch.equal(view_of(module).matmul(x.detach()), F.linear(x.detach().to(compute), weight).to(x_type))


def test_the_packages_own_training_pass_computes_the_same():
    """bitsandbytes' forward in training mode, whose gradient rounds the weight to its first type on the way."""
    module = linear4bit((64, 128), compute=torch.float32, dtype=torch.float32, bias=True).train()
    x = torch.randn(5, 128, requires_grad=True)
    expected, found = module(x), view_of(module)(x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    (wanted,), (got,) = (torch.autograd.grad(y.square().sum(), x) for y in (expected, found))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_nothing_but_the_stored_form_is_kept_for_the_backward_pass():
    module = linear4bit((48, 100), compute=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = view_of(module)(torch.randn(7, 100, requires_grad=True))
    assert y.requires_grad and not kept


def test_under_autocast_the_modules_own_type_decides():
    module = linear4bit((48, 100), compute=torch.float32)
    x = torch.randn(4, 100, requires_grad=True)
    expected = view_of(module)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = view_of(module)(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_evaluation_cannot_repack_what_is_held(nested):
    if not linear4bit().support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes repacks on CPUs with AVX-512 bf16 only")
    module = linear4bit((64, 128), nested=nested, compute=torch.bfloat16).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    loose = copy.deepcopy(module)
    hold(module)
    with torch.no_grad():
        module(x), loose(x)
    assert getattr(loose.weight.quant_state, "packing_format_for_cpu", False)  # what holding keeps from happening
    found = module.state_dict()
    assert found.keys() == before.keys() and all(torch.equal(found[name], before[name]) for name in before)
    release(module)
    assert module.support_avx512bf16_for_cpu == loose.support_avx512bf16_for_cpu
    assert module.__dict__.keys() == loose.__dict__.keys()


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_what_was_repacked_before_is_unpacked_and_said(nested, caplog):
    module = linear4bit((64, 128), nested=nested, compute=torch.bfloat16).eval()
    if not module.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes repacks on CPUs with AVX-512 bf16 only")
    codes, weight = module.weight.data.clone(), view_of(module).weight_as(torch.float32)
    with torch.no_grad():
        module(torch.randn(3, 128, dtype=torch.bfloat16))
    assert not torch.equal(module.weight.data.view(-1, 1), codes)
    with caplog.at_level("WARNING"):
        hold(module)
    assert "repacked 1 modules" in caplog.text
    assert torch.equal(module.weight.data, codes)
    torch.testing.assert_close(view_of(module).weight_as(torch.float32), weight, rtol=2**-8, atol=0)  # scales: bf16, rounded


def test_modules_that_are_not_quantised_yet_are_refused():
    for module in (bnb.nn.Linear4bit(8, 8), bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False)):
        assert "not quantised until it is moved" in view_of(module).storage_fault()
    assert "llm_int8_has_fp16_weight" in view_of(bnb.nn.Linear8bitLt(8, 8).to("cpu")).storage_fault()
    assert view_of(linear4bit()).storage_fault() is None and view_of(linear8bit()).storage_fault() is None


def test_a_parameter_counts_the_numbers_it_stands_for():
    assert logical_size(linear4bit((48, 100)).weight) == 4800
    assert logical_size(linear8bit((48, 100)).weight) == logical_size(nn.Linear(100, 48).weight) == 4800


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_requantising_what_was_decoded_gives_the_stored_form_again(kind):
    """Not with nested scales: those are rounded to 8 bits, and would be once more. (FP4 has two codes for zero.)"""
    module = linear4bit((48, 100), kind, dtype=torch.bfloat16)
    expected = view_of(module).weight_as(torch.float32)
    found = view_of(module).parameter(expected)
    assert torch.equal(found.quant_state.absmax, module.weight.quant_state.absmax)
    module.weight = found
    assert torch.equal(view_of(module).weight_as(torch.float32), expected)
    assert found.quant_state.dtype == torch.bfloat16 and found.quant_state.shape == (48, 100)


def test_requantising_to_8_bits_rounds_to_the_nearest():
    module, weight = linear8bit((48, 100)), torch.randn(48, 100)
    module.weight = view_of(module).parameter(weight)
    steps = weight.abs().amax(1, keepdim=True) / 127
    assert ((view_of(module).weight() - weight).abs() <= steps * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("make", [linear4bit, linear8bit])
def test_the_dense_module_computes_what_the_view_does(make):
    module = make((48, 100), bias=True).eval()
    x = torch.randn(3, 100)
    dense = dense_module(view_of(module), torch.float32)
    assert type(dense) is nn.Linear and not dense.training
    weight, bias = view_of(module).weight_as(torch.float32), module.bias.float()
    assert torch.equal(dense(x), F.linear(x, weight, bias))
