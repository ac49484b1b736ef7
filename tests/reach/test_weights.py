"""A parameter read through a handle is the one that the module computes with: that of the merged model, with its gradients."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reach.methods import MERGED_PAIRS, OFF
from tests.reach.parts import assert_same, case_of, gradients_of, slope, slope_of_merged
from tests.reach.test_parts import COMBINATIONS as PARTS
from tests.reach.test_whole import CODES, WHOLES
from tests.reach.ways import MODES, ROUTES, Cycle, mode_of, within
from tunesmith import TunesmithError

READS: dict[str, Callable[[Tensor], Tensor]] = {
    "product": lambda weight: weight * 2,
    "transposed": lambda weight: weight.T @ weight if weight.dim() == 2 else weight.flatten(),
    "linear": lambda weight: F.linear(torch.ones_like(weight[:1]), weight) if weight.dim() == 2 else weight.sum(),
    "clone": lambda weight: weight.clone(),
    "norm": lambda weight: weight.norm(),
    "row": lambda weight: weight[0],
    "stack": lambda weight: torch.stack([weight, weight]),
    "detached": lambda weight: weight.detach(),
}


def _reads() -> list[tuple[str, ...]]:
    routes, reads, modes = Cycle(ROUTES), Cycle(READS), Cycle(MODES)
    return [(*pair, next(routes), next(reads), next(modes)) for pair in MERGED_PAIRS if pair[1] != OFF]


ALL_READS = _reads()


@pytest.mark.each_value_once
@pytest.mark.parametrize(("family", "method", "route", "read", "mode"), ALL_READS)
def test_a_parameter_read_through_a_handle_is_the_merged_one(family, method, route, read, mode):
    case, look = case_of(method, family), READS[read]
    before = dict(case.base.named_parameters(remove_duplicate=False))
    changed = [n for n, p in case.merged.named_parameters() if n not in before or not torch.equal(p, before[n])]
    path, _, attribute = random.Random(f"{family} {method} {route}").choice(sorted(changed)).rpartition(".")
    told = f"{family}, {method}: {read} of {path}.{attribute} by {route} ({mode})"

    def of(module: nn.Module) -> Tensor:
        return look(getattr(module, attribute))

    with mode_of(mode, *case.models) as grad:
        try:
            module = ROUTES[route](case.handle, path)
            found = within(grad, lambda: of(module))()
        except TunesmithError as error:
            assert attribute != "weight", f"{told}: refused without need: {error}"
            return
        assert_same(found, of(case.merged.get_submodule(path)), told)
        if grad is torch.enable_grad and route != "a deep copy" and read != "detached":
            gradients = gradients_of(case, found)
            expected, direction = slope_of_merged(case, lambda merged: of(merged.get_submodule(path)))
            assert slope(gradients, direction) == pytest.approx(expected, rel=1e-5, abs=1e-6), told
    case.assert_bare()


def test_the_combinations_are_as_many_as_promised():
    """Of families, methods and ways, all different."""
    every = [("part", *case) for case in PARTS] + [("whole", *case) for case in WHOLES]
    every += [("client", *case) for case in CODES] + [("weight", *case) for case in ALL_READS]
    assert len(set(every)) == len(every) >= 2000
