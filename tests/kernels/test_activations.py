"""One kernel for each activation against the model's own, in double precision, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import FastGELUActivation, NewGELUActivation
from transformers.models.bloom.modeling_bloom import BloomGelu

from tunesmith.kernels.activations import ONE_KERNEL, one_kernel

KINDS = {kind.__name__: kind for kind in (BloomGelu, FastGELUActivation, NewGELUActivation)}


@pytest.mark.parametrize("name", ONE_KERNEL)
def test_equals_the_models_own(name):
    module = KINDS[name]().train()
    kernel = one_kernel(module)
    assert kernel is not None
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64, requires_grad=True)
    upstream = torch.linspace(1, 2, 4001, dtype=torch.float64)
    own, found = module(x), kernel(x)
    # the models write sqrt(2 / pi) with eight digits
    torch.testing.assert_close(found, own, rtol=1e-7, atol=1e-7)
    (expected,), (gradient,) = (torch.autograd.grad(y, x, upstream) for y in (own, found))
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)


def test_other_modules_of_such_a_name_are_left_alone():
    assert one_kernel(type("BloomGelu", (nn.Module,), {})()) is None
    assert one_kernel(nn.GELU()) is None
