"""The table of methods in the docs says what is so: everything in it is tried again here."""

from __future__ import annotations

import pytest

from tests.parity.capabilities import CAPABILITIES, PAGE, cases

CASES = {case.name: case for case in cases()}


def cells(name: str) -> list[str]:
    line = next((line for line in PAGE.read_text().splitlines() if line.startswith(f"| {name} |")), "")
    return [cell.strip() for cell in line.strip("|").split("|")][3:]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", CASES)
def test_the_page_says_what_was_found(name, capability):
    found = CAPABILITIES[capability](CASES[name])
    assert dict(zip(CAPABILITIES, cells(name))).get(capability) == found, "run python tools/methods_page.py"


def test_the_page_lists_every_method_once():
    rows = [line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    assert rows == list(CASES)
