"""The fused loss of a frozen head against its reference in float64, values and gradients."""

from __future__ import annotations

import pytest
import torch

from tunesmith.kernels import linear_cross_entropy as fused
from tunesmith.kernels import reference


def case(dtype: torch.dtype, rows: int = 37, dim: int = 24, words: int = 1001, bias: bool = False) -> tuple:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, offset = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, dim), (words, dim), (words,))
    )
    return hidden, 0.3 * weight, offset if bias else None, torch.randint(0, words, (rows,), generator=generator)


def both(function, hidden, *rest, **named) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = hidden.clone().requires_grad_()
    loss = function(hidden, *rest, **named)
    (3 * loss).backward()
    return loss.detach(), hidden.grad


def exact(hidden, weight, bias, labels, smoothing):
    wide = (None if value is None else value.double() for value in (hidden, weight, bias))
    return both(reference.linear_cross_entropy, *wide, labels, smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 4 * 1001, 10**6], ids=["16 rows", "16 rows at least", "all rows"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_reference(dtype, chunk, bias, smoothing, monkeypatch):
    monkeypatch.setattr(fused, "LOGITS_AT_A_TIME", chunk)
    values = case(dtype, bias=bias)
    loss, gradient = both(fused.linear_cross_entropy, *values, smoothing, tile=100)
    expected_loss, expected_gradient = exact(*values, smoothing)
    tolerance = 1e-12 if dtype is torch.float64 else 2e-6
    assert loss.dtype == dtype
    torch.testing.assert_close(loss.double(), expected_loss, rtol=tolerance, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance, atol=20 * tolerance)


def test_bf16_is_right_up_to_the_rounding_of_logits_and_gradient():
    """A logit of size s is rounded by up to s / 256; the mean of 37 losses moves by no more than the largest of them."""
    hidden, weight, _, labels = case(torch.bfloat16)
    loss, gradient = both(fused.linear_cross_entropy, hidden, weight, None, labels)
    expected_loss, expected_gradient = exact(hidden, weight, None, labels, 0.0)
    largest = (hidden.double() @ weight.double().T).abs().max().item()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double() / 37, expected_loss / 37, rtol=0, atol=2**-8 * largest)
    plain = both(reference.linear_cross_entropy, hidden, weight, None, labels)[1]
    error, own = ((found.double() - expected_gradient).norm() for found in (gradient, plain))
    assert error <= 3**0.5 * own, "the plain path rounds its result once; this one three times (tile, product, quotient)"


def test_large_logits_do_not_overflow_and_no_rows_cost_nothing():
    hidden, weight, _, labels = case(torch.float32)
    loss, gradient = both(fused.linear_cross_entropy, 1e3 * hidden, weight, None, labels)
    assert loss.isfinite() and gradient.isfinite().all()
    loss, gradient = both(fused.linear_cross_entropy, hidden[:0], weight, None, labels[:0])
    assert loss == 0 and gradient.shape == (0, 24)


def test_the_head_gets_no_gradient_and_is_not_changed():
    hidden, weight, _, labels = case(torch.float32)
    weight = weight.requires_grad_()
    before = weight.detach().clone()
    fused.linear_cross_entropy(hidden.requires_grad_(), weight, None, labels).backward()
    assert weight.grad is None and torch.equal(weight, before)
