"""Dropout on a CPU: as many numbers dropped as asked for, in no pattern; the others scaled; gradients through the same mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tunesmith.kernels.dropout import LARGE, dropout

SHAPE = (3, 257, 512)  # 394,752 numbers


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_drops_as_many_as_asked_for_and_scales_the_rest(p):
    torch.manual_seed(0)
    x = torch.ones(SHAPE)
    y = dropout(x, p)
    share = (y == 0).double().mean().item()
    assert abs(share - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5  # five standard deviations
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}


def test_neighbours_rows_and_draws_are_independent():
    torch.manual_seed(0)
    first, second = ((dropout(torch.ones(1024, 1024), 0.5) == 0).double() for _ in range(2))
    pairs = [(first[:, i:], first[:, : 1024 - i]) for i in (1, 2, 3, 4)]
    pairs += [(first[1:], first[:-1]), (first, second)]
    for a, b in pairs:
        assert abs((a * b).mean().item() - 0.25) < 5 * (3 / 16 / a.numel()) ** 0.5


def test_gradients_pass_where_numbers_do():
    torch.manual_seed(0)
    x = torch.randn(SHAPE, requires_grad=True)
    y = dropout(x, 0.25)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient * x, y)


def test_the_seed_decides():
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(dropout(torch.ones(SHAPE, dtype=torch.bfloat16), 0.1))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert draws[0].dtype == torch.bfloat16


@pytest.mark.parametrize(("shape", "p"), [((4, 8), 0.5), ((LARGE,), 0.0), ((LARGE,), 1.0)])
def test_what_is_small_or_certain_is_left_to_torch(shape, p):
    x = torch.randn(shape)
    torch.manual_seed(0)
    expected = F.dropout(x, p)
    torch.manual_seed(0)
    assert torch.equal(dropout(x, p), expected)
