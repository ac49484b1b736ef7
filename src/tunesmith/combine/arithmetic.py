"""What `combination_type` stands for, and the checks of everything that goes with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..attach.tree import AdapterTree
from ..errors import ConfigError, did_you_mean
from .sparsify import drop_randomly, keep_largest
from .sums import agreed_mean, weighted_sum

PRUNERS: dict[str, Callable[[Tensor, float], Tensor]] = {"magnitude": keep_largest, "random": drop_randomly}

# combination_type: (pruning, whether signs are elected); "_svd" does it on whole changes rather than on their factors.
_SUMS = {
    "linear": (None, False),
    "ties": ("magnitude", True),
    "dare_linear": ("random", False),
    "dare_ties": ("random", True),
    "magnitude_prune": ("magnitude", False),
}
TYPES = [*_SUMS, "cat", "svd", *(f"{name}_svd" for name in _SUMS if name != "linear")]


@dataclass(frozen=True)
class Member:
    """One adapter of a combination."""

    name: str
    config: Any
    tree: AdapterTree
    weight: float


@dataclass(frozen=True)
class Recipe:
    """How the members of a combination become one; the fields are the arguments of `add_weighted_adapter`."""

    combination_type: str
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_options: dict[str, Any] = field(default_factory=dict)
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        if faults := list(self.faults()):
            raise ConfigError("; ".join(faults))

    def faults(self) -> list[str]:
        kind, density = self.combination_type, self.density
        if kind not in TYPES:
            return [f"combination_type={kind!r} is unknown{did_you_mean(str(kind), TYPES)}; allowed: {', '.join(TYPES)}"]
        found = []
        if self.prunes and density is None:
            found.append(f'combination_type="{kind}" needs density, the share of values to keep, e.g. density=0.5')
        if density is not None and not 0 < density <= 1:
            found.append(f"density={density!r} must be above 0 and at most 1")
        if self.svd_rank is not None and (not isinstance(self.svd_rank, int) or self.svd_rank < 1):
            found.append(f"svd_rank={self.svd_rank!r} must be a whole number of at least 1")
        if self.svd_clamp is not None and not 0 <= self.svd_clamp <= 1:
            found.append(f"svd_clamp={self.svd_clamp!r} is a quantile, so it must be between 0 and 1")
        if self.majority_sign_method not in ("total", "frequency"):
            found.append(f'majority_sign_method={self.majority_sign_method!r} must be "total" or "frequency"')
        return found

    @property
    def on_whole_changes(self) -> bool:
        """Whether whole changes `s B A` are summed up and split again, rather than their factors."""
        return self.combination_type.endswith("svd")

    @property
    def prunes(self) -> bool:
        return self._sum[0] is not None

    def prune(self, change: Tensor) -> Tensor:
        pruning, density = self._sum[0], self.density
        return change if pruning is None or density is None else PRUNERS[pruning](change, density)

    def sum(self, changes: list[Tensor], weights: list[float]) -> Tensor:
        """One change out of several, pruned already."""
        if self._sum[1]:
            return agreed_mean(changes, weights, self.majority_sign_method)
        return weighted_sum(changes, weights)

    @property
    def _sum(self) -> tuple[str | None, bool]:
        return _SUMS.get(self.combination_type.removesuffix("_svd"), (None, False))


def check_weights(adapters: list[str], weights: list[float]) -> None:
    """Raise unless there is one finite number per adapter."""
    if not adapters:
        raise ConfigError("adapters is empty; name at least one adapter to combine")
    if len(weights) != len(adapters):
        raise ConfigError(f"{len(adapters)} adapters need as many weights, got {len(weights)}")
    wrong = [w for w in weights if isinstance(w, bool) or not isinstance(w, (int, float)) or not math.isfinite(w)]
    if wrong:
        raise ConfigError(f"weights must be finite numbers, got {', '.join(map(repr, wrong))}")
