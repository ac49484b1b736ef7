"""EVA's decomposition and how it shares ranks out."""

from __future__ import annotations

import pytest
import torch

from tunesmith.inits.eva import StreamingSvd, share_out


def rows(count: int, inner: int = 24, rank: int | None = None) -> torch.Tensor:
    """Rows with a mean and quickly falling sizes, of full or of the given rank."""
    rank = rank or inner
    factors = torch.randn(count, rank) * 0.6 ** torch.arange(rank)
    return factors @ torch.linalg.qr(torch.randn(inner, inner)).Q[:rank] + 2.0


@pytest.mark.parametrize("batches", [(50,), (20, 30), (3, 40, 7), (1, 1, 48)])
def test_batches_give_what_all_rows_at_once_do(batches):
    x = rows(50, rank=6)
    svd = StreamingSvd(8)
    for batch in x.split(batches):
        svd.add(batch)
    _, sizes, directions = torch.linalg.svd(x.double() - x.double().mean(0), full_matrices=False)
    assert svd.count == 50
    torch.testing.assert_close(svd.mean.double(), x.double().mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(svd.sizes[:6].double(), sizes[:6], atol=1e-4, rtol=1e-4)
    assert ((svd.directions[:4].double() * directions[:4]).sum(1).abs() > 1 - 1e-4).all()
    explained = sizes.square() / sizes.square().sum()
    torch.testing.assert_close(torch.tensor(svd.explained()[:6]).double(), explained[:6], atol=1e-4, rtol=0)


def test_converges_when_batches_stop_turning_the_directions():
    svd, x = StreamingSvd(4), rows(400)
    turns = []
    for batch in x.split(40):
        svd.add(batch)
        turns.append(svd.turn)
    assert turns[0] is None and svd.converged(4, 0.99) and not svd.converged(4, 1.1)


def test_ranks_go_to_what_explains_most_and_keep_the_budget():
    assert share_out({"a": [0.5, 0.3, 0.1], "b": [0.2, 0.05], "c": [0.04]}, 4) == {"a": 2, "b": 1, "c": 0} | {"a": 3}
    assert share_out({"a": [0.5], "b": [0.2]}, 9) == {"a": 1, "b": 1}
