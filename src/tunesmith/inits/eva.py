"""EVA: A starts as the directions in which a module's inputs vary most; ranks go where directions explain most.

    X - mean(X) = U S V^T,   A = V_r^T,   B = 0;   explained by direction i: S_i^2 / sum of squares of X - mean(X)

Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation",
https://arxiv.org/abs/2410.07170 (section 3); batch by batch: Ross et al. 2008, "Incremental Learning for Robust Visual
Tracking" (section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor


class StreamingSvd:
    """The largest `size` singular parts of rows that arrive in batches, less their mean.

    What leaves the first `size` parts is forgotten, so the result is exact while all rows' rank is at most `size`, and
    near the exact one when later parts are small.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        self.total = 0.0  # sum of squares of all rows less their mean
        self.mean: Tensor | None = None  # (in,)
        self.sizes: Tensor | None = None  # (size,)
        self.directions: Tensor | None = None  # (size, in)
        self.turn: Tensor | None = None  # (size,) cosine of each direction with what it was a batch ago

    def add(self, rows: Tensor) -> None:
        """Take in a batch `(rows, in)`."""
        rows = rows.float()
        n, m, mean = self.count, len(rows), rows.mean(0)
        parts = [rows - mean]
        if self.mean is not None and self.sizes is not None and self.directions is not None:
            parts += [(n * m / (n + m)) ** 0.5 * (self.mean - mean)[None], self.sizes[:, None] * self.directions]
            self.total += parts[1].square().sum().item()
            mean = (n * self.mean + m * mean) / (n + m)
        self.total += parts[0].square().sum().item()
        _, sizes, directions = torch.linalg.svd(torch.cat(parts), full_matrices=False)
        previous, self.directions = self.directions, directions[: self.size]
        self.sizes, self.mean, self.count = sizes[: self.size], mean, n + m
        if previous is not None and previous.shape == self.directions.shape:
            self.turn = (previous * self.directions).sum(1).abs()

    def explained(self) -> list[float]:
        """Each direction's share of the variance, largest first."""
        assert self.sizes is not None
        return (self.sizes.square() / max(self.total, torch.finfo(torch.float32).tiny)).tolist()

    def converged(self, rank: int, least_cosine: float) -> bool:
        """Whether the last batch turned none of the first `rank` directions by more than that."""
        return self.turn is not None and bool((self.turn[:rank] >= least_cosine).all())


def share_out(explained: dict[str, list[float]], budget: int) -> dict[str, int]:
    """Ranks by module: the `budget` directions that explain most, whichever module they are of."""
    best = sorted(((share, path) for path, shares in explained.items() for share in shares), key=lambda pair: -pair[0])
    ranks = dict.fromkeys(explained, 0)
    for _, path in best[:budget]:
        ranks[path] += 1
    return ranks
