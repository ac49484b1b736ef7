"""What is left of a matrix by default still holds every value of every axis."""

from __future__ import annotations

from itertools import product

from tests.matrix import enough


def test_every_value_is_kept_and_no_more_cases_than_the_longest_axis_has():
    axes = [list("abcdefg"), list("uvw"), [True, False]]
    cases = [tuple(enumerate(values)) for values in product(*axes)]
    kept = [cases[i] for i in sorted(enough(cases))]
    assert {value for case in kept for value in case} == {value for case in cases for value in case}
    assert len(kept) == len(axes[0])


def test_values_of_the_shorter_axis_are_taken_alike():
    cases = [tuple(enumerate(values)) for values in product(range(9), "uvw")]
    kept = [cases[i][1] for i in enough(cases)]
    assert [kept.count((1, name)) for name in "uvw"] == [3, 3, 3]


def test_cases_that_are_missing_leave_no_value_out():
    cases = [("a", "u"), ("b", "u"), ("c", "v"), ("a", "v"), ("d", "u")]
    assert {value for i in enough(cases) for value in cases[i]} == set("abcduv")
    assert enough([]) == set()
