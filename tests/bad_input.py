"""What a failed call must leave alone, the one error that it must raise, and folders to spoil."""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tunesmith as ts
from tests import tiny
from tests.parity.oracle import output, tensors
from tunesmith.runtime.site import site_of

INPUTS = tiny.inputs_for("llama")
WEIGHTS, CONFIG, BIN = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"


class Snapshot:
    """Everything of a base that a failed call must leave alone."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.modules = {path: type(module) for path, module in base.named_modules()}
        self.forwards = {path for path, module in base.named_modules() if "forward" in module.__dict__}
        self.values = {name: value.clone() for name, value in base.state_dict().items()}
        self.objects = {name: id(p) for name, p in base.named_parameters()}
        self.requires_grad = {name: p.requires_grad for name, p in base.named_parameters()}
        self.training = base.training
        self.config = base.config.to_dict() if hasattr(base, "config") else None
        self.output = self.run(base)

    def run(self, model: nn.Module) -> torch.Tensor | None:
        return output(model, INPUTS) if hasattr(self.base, "config") else None

    def check(self) -> None:
        base = self.base
        assert {path: type(module) for path, module in base.named_modules()} == self.modules
        assert {path for path, module in base.named_modules() if "forward" in module.__dict__} == self.forwards
        assert {name: id(p) for name, p in base.named_parameters()} == self.objects
        assert {name: p.requires_grad for name, p in base.named_parameters()} == self.requires_grad
        assert all(torch.equal(value, self.values[name]) for name, value in base.state_dict().items())
        assert base.training == self.training
        if self.output is not None:
            assert base.config.to_dict() == self.config
            assert torch.equal(output(base, INPUTS), self.output)


@contextmanager
def one_error(kind: type[Exception], *words: str):
    """The body raises exactly `kind`, whose text holds `words`; nothing else is warned of or logged."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("tunesmith")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            with pytest.raises(Exception) as caught:
                yield
    finally:
        logger.removeHandler(handler)
    assert type(caught.value) is kind, f"{type(caught.value).__name__}: {caught.value}"
    text = str(caught.value)
    for word in words:
        assert re.search(word, text), f"{word!r} is not in: {text}"
    own = Path(ts.__file__).parent
    assert not records and not [w for w in warned if Path(w.filename).is_relative_to(own)]


def sites(base: nn.Module) -> int:
    return sum(site_of(module) is not None for module in base.modules())


def edit_tensors(folder, change):
    values = tensors(folder)
    change(values)
    save_file(values, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder, **changes):
    values = json.loads((folder / CONFIG).read_text())
    values.update(changes)
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


@contextmanager
def as_nobody(folder):
    """Root may do anything, so tests of permissions are run as nobody, who owns `folder`."""
    if os.geteuid() != 0:
        yield
        return
    paths = [folder, *folder.rglob("*")]
    for path in paths:
        os.chown(path, 65534, 65534)
    parents = [parent for parent in folder.parents if parent.stat().st_uid == 0 and parent.stat().st_mode & 0o777 == 0o700]
    for parent in parents:
        parent.chmod(0o711)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        for parent in parents:
            parent.chmod(0o700)
