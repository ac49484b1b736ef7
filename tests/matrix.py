"""Which cases of a full matrix run by default: enough for every value of every axis; `make test-all` runs all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import pytest

MARK = "each_value_once"


def mark(items: Sequence[pytest.Item]) -> None:
    """Mark `matrix` the cases of each function under `@pytest.mark.each_value_once` that are not needed for that."""
    functions: dict[str, list[Any]] = {}
    for item in items:
        if item.get_closest_marker(MARK) is not None:
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in functions.values():
        kept = enough([_values(case) for case in cases])
        for i, case in enumerate(cases):
            if i not in kept:
                case.add_marker(pytest.mark.matrix)


def one_of_each(items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """One case of each function; which one differs from function to function, so that all models and methods have a turn."""
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return {cases[7 * index % len(cases)] for index, cases in enumerate(functions.values())}


def enough(cases: Sequence[Sequence[Hashable]]) -> set[int]:
    """Indices of cases that hold every value of all of them.

    Greedy: the most values not yet seen, then the values taken least. What is left of methods x models meets every
    method and every model, and the methods are spread over the models.
    """
    taken: Counter[Hashable] = Counter()
    kept: set[int] = set()
    while True:
        unseen = {i: sum(not taken[value] for value in values) for i, values in enumerate(cases) if i not in kept}
        most = max(unseen.values(), default=0)
        if most == 0:
            return kept
        chosen = min((i for i in unseen if unseen[i] == most), key=lambda i: sum(taken[value] for value in cases[i]))
        kept.add(chosen)
        taken.update(cases[chosen])


def _values(item: Any) -> list[Hashable]:
    return [(name, repr(value)) for name, value in item.callspec.params.items()]
