"""Methods stay small: what every method would repeat belongs to the lifecycle around them."""

from pathlib import Path

import tunesmith.methods
from tunesmith.registry import all_methods


def test_methods_take_fewer_than_150_lines_each_on_average() -> None:
    sources = Path(next(iter(tunesmith.methods.__path__))).glob("*.py")
    lines = sum(bool(line.strip()) for source in sources for line in source.read_text().splitlines())
    assert lines / len(all_methods()) < 150
