from __future__ import annotations

import pytest
import torch

from tests import quantised


@pytest.fixture
def dense(tmp_path):
    """The folder of a dense base of 16 bits."""
    quantised.wide().to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"
