from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests import tiny


def pytest_addoption(parser):
    parser.addoption("--one-of-each", action="store_true", help="of each test function, one case (make test-sample)")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """One case of each function; which one differs from function to function, so that all models and methods have a turn."""
    if not config.getoption("--one-of-each"):
        return
    functions: dict[str, list] = {}
    for item in items:
        functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {cases[7 * index % len(cases)] for index, cases in enumerate(functions.values())}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def llama():
    return tiny.make("llama")


@pytest.fixture
def llama_inputs():
    return tiny.inputs_for("llama")
