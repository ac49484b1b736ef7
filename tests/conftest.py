from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests import matrix, tiny


def pytest_addoption(parser):
    parser.addoption("--one-of-each", action="store_true", help="of each test function, one case (make test-sample)")


@pytest.hookimpl(tryfirst=True)  # before cases are left out by -m
def pytest_collection_modifyitems(config, items):
    matrix.mark(items)
    if config.getoption("--one-of-each"):
        kept = matrix.one_of_each(items)
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


@pytest.fixture
def saved(tmp_path):
    """The folder of a good LoRA adapter for the tiny Llama."""
    from tests.parity.oracle import ours_on

    folder = tmp_path / "adapter"
    ours_on(tiny.make("llama"), "lora", "CAUSAL_LM").save_pretrained(folder)
    return folder
