"""The linear map on a decoded weight against its reference: values, gradients, what it keeps; LoRA's lean step on it."""

from __future__ import annotations

import pytest
import torch

from tunesmith.kernels import reference
from tunesmith.kernels.decoded_linear import Decoded, decoded_linear
from tunesmith.kernels.lora_linear import applies, lora_linear

IN, OUT, RANK = 24, 40, 3


class Counted(Decoded):
    """A weight that counts how often it is decoded."""

    def __init__(self, dtype=torch.float64):
        weight = torch.randn(OUT, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        super().__init__(weight.to, dtype)
        self.count = 0

    def __call__(self):
        self.count += 1
        return super().__call__()


def draw(*size, seed=1):
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(IN,), (7, IN), (2, 5, IN), (0, IN)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_reference(shape, bias):
    weight, offset = Counted(), draw(OUT) if bias else None
    x, upstream = draw(*shape).requires_grad_(), draw(*shape[:-1], OUT, seed=2)
    found, expected = (f(x, weight, offset) for f in (decoded_linear, reference.decoded_linear))
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (got,), (wanted,) = (torch.autograd.grad(y, x, upstream) for y in (found, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_first_and_second_derivatives():
    weight, x = Counted(), draw(4, IN).requires_grad_()
    torch.autograd.gradcheck(lambda x: decoded_linear(x, weight, None), x)
    torch.autograd.gradgradcheck(lambda x: decoded_linear(x, weight, None).tanh(), x)


def test_decodes_once_each_way_and_keeps_nothing():
    weight, x, kept = Counted(), draw(4, IN).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = decoded_linear(x, weight, None)
    assert weight.count == 1 and not kept
    y.sum().backward()
    assert weight.count == 2


def test_without_gradients_there_is_no_step_to_record():
    weight = Counted()
    assert decoded_linear(draw(4, IN), weight, None).grad_fn is None
    with torch.no_grad():
        assert decoded_linear(draw(4, IN).requires_grad_(), weight, None).grad_fn is None
    assert weight.count == 2


def test_a_bias_that_trains_gets_its_gradient():
    weight, bias = Counted(), draw(OUT).requires_grad_()
    decoded_linear(draw(4, IN), weight, bias).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((OUT,), 4.0, dtype=torch.float64))


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_under_function_transforms_it_is_the_plain_operation(transform):
    weight, x = Counted(), draw(4, IN)
    step = lambda f: lambda x: f(x, weight, None).square().sum()  # noqa: E731
    run = {
        "vmap": lambda f: torch.func.vmap(lambda row: f(row, weight, None))(x),
        "grad": lambda f: torch.func.grad(step(f))(x),
        "jvp": lambda f: torch.func.jvp(step(f), (x,), (draw(4, IN, seed=3),))[1],
    }[transform]
    torch.testing.assert_close(run(decoded_linear), run(reference.decoded_linear), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trains_x", [True, False])
def test_loras_lean_step_on_a_decoded_weight(bias, trains_x):
    weight, offset = Counted(), draw(OUT) if bias else None
    a, b = draw(RANK, IN, seed=3).requires_grad_(), draw(OUT, RANK, seed=4).requires_grad_()
    x = draw(2, 5, IN).requires_grad_(trains_x)
    assert applies(x, weight, offset)
    found = lora_linear(x, weight, offset, a, b, 1.7)
    expected = reference.lora_linear(x, weight(), offset, a, b, 1.7)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    wanted = [a, b, *([x] if trains_x else [])]
    before = weight.count
    gradients = torch.autograd.grad(found.square().sum(), wanted)
    assert weight.count - before == trains_x  # nothing but the input's gradient needs the weight
    for got, expect in zip(gradients, torch.autograd.grad(expected.square().sum(), wanted)):
        torch.testing.assert_close(got, expect, rtol=1e-10, atol=1e-10)


def test_a_decoded_weight_of_another_type_is_not_for_the_lean_step():
    assert not applies(draw(4, IN), Counted(torch.float32), None)
