"""4-bit weights repacked for products of few rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.bases.test_quantised import linear4bit
from tunesmith.bases import repacked
from tunesmith.bases.view import view_of

bnb = pytest.importorskip("bitsandbytes")

PACKABLE = [((64, 128), 64), ((96, 192), 32), ((32, 512), 256)]
has_kernel = pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="the kernel is for CPUs with AVX-512 bf16")


@has_kernel
@pytest.mark.parametrize(("shape", "blocksize"), PACKABLE, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_product_of_few_rows_is_within_rounding_and_leaves_the_stored_form_alone(kind, shape, blocksize):
    """In bf16 the scale, the weight and the result are rounded (2^-9 each); the terms' sizes say how much that can be."""
    for nested in (False, True):
        module = linear4bit(shape, kind, nested, blocksize, compute=torch.bfloat16, bias=True).eval()
        before = {name: value.clone() for name, value in module.state_dict().items()}
        weight, bias = view_of(module).weight_as(torch.float32), module.bias.float()
        for rows in (1, 5, repacked.FEW_ROWS):
            x = torch.randn(rows, 1, shape[1], dtype=torch.bfloat16)
            with torch.no_grad():
                found = view_of(module)(x)
            assert module in repacked._repacked and found.dtype == torch.bfloat16
            sizes = F.linear(x.float().abs(), weight.abs(), bias.abs())
            assert ((found.float() - F.linear(x.float(), weight, bias)).abs() <= 4 * 2**-9 * sizes).all()
        after = module.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)


@has_kernel
def test_the_packed_form_lasts_until_the_next_training_step_or_another_weight():
    module = linear4bit((64, 128), compute=torch.bfloat16)
    x = torch.randn(2, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        view_of(module.train())(x)
        assert module not in repacked._repacked
        view_of(module.eval())(x)
        first = repacked._repacked[module]
        view_of(module)(x)
        assert repacked._repacked[module] is first
        module.weight = view_of(module).parameter(torch.randn(64, 128))
        weight = view_of(module).weight_as(torch.float32)
        error = (view_of(module)(x).float() - F.linear(x.float(), weight)).abs()
        assert (error <= 4 * 2**-9 * F.linear(x.float().abs(), weight.abs())).all()
        assert repacked._repacked[module] is not first
    view_of(module)(x.clone().requires_grad_())
    assert module not in repacked._repacked


@has_kernel
@pytest.mark.parametrize(
    ("shape", "rows", "x_type", "compute"),
    [((64, 128), 65, torch.bfloat16, torch.bfloat16), ((64, 128), 2, torch.float32, torch.float32),
     ((48, 128), 2, torch.bfloat16, torch.bfloat16), ((64, 96), 2, torch.bfloat16, torch.bfloat16),
     ((64, 128), 0, torch.bfloat16, torch.bfloat16)], ids=str,
)  # fmt: skip
def test_what_does_not_fit_the_kernel_is_decoded(shape, rows, x_type, compute):
    module = linear4bit(shape, compute=compute).eval()
    x = torch.randn(rows, shape[1], dtype=x_type)
    with torch.no_grad():
        assert torch.equal(view_of(module)(x), F.linear(x.to(compute), view_of(module).weight()).to(x_type))
    assert module not in repacked._repacked
