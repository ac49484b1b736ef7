"""Pictures of a run's page."""

from __future__ import annotations

from tunesmith.jobs import report


def test_a_picture_of_strange_values_is_one():
    for points in ([], [(1, float("nan"))], [(1, 2.0)], [(1, 2.0), (2, 2.0)], [(1, float("inf")), (5, 1e30)], [(0, 1.0)]):
        drawn = report.picture({"training": points})
        assert "nan" not in drawn and "inf" not in drawn
