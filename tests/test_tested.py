"""The tested range of releases, and what is said outside of it."""

from __future__ import annotations

import logging
from importlib import metadata
from pathlib import Path

import pytest

from tests import tiny
from tunesmith import LoraConfig, TaskType, get_peft_model, tested
from tunesmith.jobs import diagnosis

TRANSFORMERS = tested.Tested("transformers", "5.4.0", "5.24.0")


@pytest.mark.parametrize("release", ["5.4.0", "5.4.1", "5.10.4", "5.24.0", "5.24.3", "5.24.0.dev0"])
def test_nothing_is_said_within_the_range(release):
    assert TRANSFORMERS.fault(release) is None


@pytest.mark.parametrize("release", ["5.25.0", "5.25.0.dev0", "6.0.0", "5.100"])
def test_a_newer_release_is_named_with_what_to_do(release):
    assert f"transformers {release} is newer than 5.24.0" in TRANSFORMERS.fault(release)
    assert 'pip install "transformers==5.24.0"' in TRANSFORMERS.fault(release)


@pytest.mark.parametrize("release", ["5.3.0", "4.57.6"])
def test_an_older_release_is_named_with_what_to_do(release):
    assert f"transformers {release} is older than 5.4.0" in TRANSFORMERS.fault(release)


def test_the_installed_release_is_tested():
    assert tested.TRANSFORMERS.fault(metadata.version("transformers")) is None


def test_an_unknown_release_is_told_once(monkeypatch, caplog):
    monkeypatch.setattr(tested, "TRANSFORMERS", tested.Tested("transformers", "4.0.0", "4.1.0"))
    tested.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            get_peft_model(tiny.make("llama"), LoraConfig(task_type=TaskType.CAUSAL_LM))
    tested.warn_once.cache_clear()
    assert sum("is newer than 4.1.0" in record.message for record in caplog.records) == 1


def test_doctor_names_the_range(monkeypatch):
    said = {finding.topic: finding.text for finding in diagnosis.findings()}
    assert said["tested with"] == f"{tested.TRANSFORMERS}; {tested.TORCH}"
    monkeypatch.setattr(diagnosis, "TRANSFORMERS", tested.Tested("transformers", "4.0.0", "4.1.0"))
    doubts = [finding for finding in diagnosis.findings() if finding.topic == "transformers"]
    assert [finding.kind for finding in doubts] == ["slow"] and "is newer than 4.1.0" in doubts[0].text


def test_the_range_is_the_declared_one_and_the_one_of_the_pinned_sets():
    root = Path(__file__).parents[1]
    declared = (root / "pyproject.toml").read_text(encoding="utf-8")
    for package in (tested.TRANSFORMERS, tested.TORCH):
        assert f'"{package.package}>={package.oldest.removesuffix(".0")}' in declared
        for name, release in (("oldest", package.oldest), ("newest", package.newest)):
            pinned = (root / f"constraints-{name}.txt").read_text(encoding="utf-8").splitlines()
            assert f"{package.package}=={release}" in pinned


def test_a_source_tree_without_a_release_number_is_no_reason_to_fail(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    tested.warn_once.cache_clear()
    monkeypatch.setattr(tested.metadata, "version", version)
    tested.warn_once()
    tested.warn_once.cache_clear()
    monkeypatch.setattr(tested.metadata, "version", lambda name: "main")
    tested.warn_once()
    tested.warn_once.cache_clear()
