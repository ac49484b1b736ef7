"""Attention of short texts against torch's in double precision, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tunesmith.kernels import short_attention


def attention(query, key, value, scale):
    mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)


def tensors(heads, groups, length, dtype, before=0):
    torch.manual_seed(0)
    shapes = ((1, heads, length, 16), (1, groups, before + length, 16), (1, groups, before + length, 16))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def outcome(function, inputs, upstream, scale):
    y = function(*inputs, scale)
    return y, *torch.autograd.grad(y, inputs, upstream.to(y.dtype))


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize("heads, groups, length", [(4, 4, 7), (6, 2, 33), (4, 1, 1), (8, 2, 200)])
def test_equals_torchs_in_double_precision(heads, groups, length, before, scale):
    inputs = tensors(heads, groups, length, torch.float64, before)
    upstream = torch.randn(inputs[0].shape).double()
    means_in_fp32 = {"rtol": 1e-5, "atol": 1e-6}
    for found, expected in zip(
        outcome(short_attention.short_attention, inputs, upstream, scale), outcome(attention, inputs, upstream, scale)
    ):
        torch.testing.assert_close(found, expected, **means_in_fp32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_as_near_the_truth_as_its_numbers_allow(dtype):
    inputs = tensors(6, 2, 120, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    upstream = torch.randn(inputs[0].shape).to(dtype)
    for found, expected in zip(
        outcome(short_attention.short_attention, inputs, upstream, None), outcome(attention, exact, upstream, None)
    ):
        assert (found - expected).norm() / expected.norm() < 2 * torch.finfo(dtype).eps


def test_applies_to_short_texts_of_16_bits_alone():
    applies = short_attention.applies
    assert applies(*tensors(4, 2, 400, torch.bfloat16))
    assert not applies(*tensors(4, 2, 401, torch.bfloat16))
    assert not applies(*tensors(4, 2, 7, torch.float32))
    query, key, value = tensors(4, 2, 7, torch.bfloat16)
    assert applies(query[:, :, :3], key, value) and not applies(query, key[:, :, :3], value[:, :, :3])
    assert not applies(*tensors(4, 2, 400, torch.bfloat16, before=401))
    assert not applies(query, key, value[..., :8])
