"""Folders that cannot be read or written: one clear error, and everything is as it was before."""

from __future__ import annotations

import os

import pytest
import torch

import tunesmith as ts
from tests.bad_input import CONFIG, INPUTS, WEIGHTS, Snapshot, as_nobody, one_error
from tests.parity.oracle import ours_on, output
from tunesmith import AdapterFileError

# --- places that hold no adapter --------------------------------------------------------------------------------------

NOWHERE = {
    "absolute path": ("/no/such/folder", ["there is no folder /no/such/folder", "check the path"]),
    "relative path": ("./no/such", ["there is no folder no/such"]),
    "parent's path": ("../../no-such-folder-here", ["there is no folder"]),
    "deep path": ("a/b/c", ["there is no folder a/b/c"]),
    "hub id": ("nobody/nothing", ['"nobody/nothing" is not a local folder', "Hub cannot be reached", "HF_HUB_OFFLINE"]),
    "malformed hub id": ("no body/nothing?", ["neither a local folder nor a repository"]),
    "endless name": ("x" * 5000, ["there is no folder", "owner/name"]),
    "name with a zero byte": ("a\0b", ["there is no folder", "owner/name"]),
    "empty name": ("", ["'' does not name an adapter"]),
    "None": (None, ["None does not name an adapter", "give a folder or the id"]),
    "number": (3, ["3 does not name an adapter"]),
}


@pytest.mark.parametrize("case", NOWHERE)
def test_place_that_is_none(case, llama, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    place, words = NOWHERE[case]
    before = Snapshot(llama)
    for call in (
        ts.PeftConfig.from_pretrained,
        lambda p: ts.PeftModel.from_pretrained(llama, p),
        ts.AutoPeftModel.from_pretrained,
    ):
        with one_error(AdapterFileError, *words):
            call(place)
    before.check()


def test_file_in_place_of_a_folder(llama, saved):
    with one_error(AdapterFileError, f"{WEIGHTS} is a file; give the folder that holds {CONFIG}"):
        ts.PeftModel.from_pretrained(llama, saved / WEIGHTS)


@pytest.mark.parametrize("subfolder", ["../adapter", "inner/../../x", "/etc", ".."])
def test_subfolder_that_leads_out(subfolder, llama, saved):
    for place in (saved, "nobody/nothing"):
        with one_error(AdapterFileError, "points outside the adapter's folder", "inside it"):
            ts.PeftModel.from_pretrained(llama, place, subfolder=subfolder)


def test_subfolder_that_is_not_there(llama, saved):
    with one_error(AdapterFileError, "there is no folder .*adapter/inner"):
        ts.PeftModel.from_pretrained(llama, saved, subfolder="inner")


def test_linked_files_are_read_as_in_the_hubs_cache(llama, saved, tmp_path):
    links = tmp_path / "links"
    links.mkdir()
    for name in (CONFIG, WEIGHTS):
        (links / name).symlink_to(saved / name)
    linked = ts.PeftModel.from_pretrained(llama, links).eval()
    plain = ts.PeftModel.from_pretrained(llama, saved).eval()
    assert torch.equal(output(linked, INPUTS), output(plain, INPUTS))


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX")
def test_config_that_may_not_be_read(llama, saved):
    with as_nobody(saved), one_error(AdapterFileError, CONFIG, "cannot be read", "permissions"):
        (saved / CONFIG).chmod(0)
        ts.PeftModel.from_pretrained(llama, saved)


# --- places that cannot be written ------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX")
def test_saving_into_a_read_only_folder(llama, saved):
    handle = ours_on(llama, "lora", "CAUSAL_LM", r=2)
    before, adapted = {p.name: p.read_bytes() for p in saved.iterdir()}, output(handle, INPUTS)
    with as_nobody(saved), one_error(AdapterFileError, "cannot save into", "Permission denied", "give another folder"):
        saved.chmod(0o555)
        handle.save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert torch.equal(output(handle, INPUTS), adapted)


def test_saving_onto_a_file(llama, tmp_path):
    (tmp_path / "file").write_text("mine")
    with one_error(AdapterFileError, "file is a file; give a folder to save into"):
        ours_on(llama, "lora", "CAUSAL_LM").save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_saving_below_a_file(llama, tmp_path):
    (tmp_path / "file").write_text("mine")
    with one_error(AdapterFileError, "cannot save into .*file/inner"):
        ours_on(llama, "lora", "CAUSAL_LM").save_pretrained(tmp_path / "file" / "inner")
    assert (tmp_path / "file").read_text() == "mine"


def test_saving_where_a_folder_bears_a_files_name(llama, tmp_path):
    (tmp_path / WEIGHTS).mkdir()
    with one_error(AdapterFileError, "cannot save into"):
        ours_on(llama, "lora", "CAUSAL_LM").save_pretrained(tmp_path)


def test_saving_onto_a_linked_file_replaces_the_link_only(llama, tmp_path):
    (tmp_path / "precious").write_text("mine")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / CONFIG).symlink_to(tmp_path / "precious")
    ours_on(llama, "lora", "CAUSAL_LM").save_pretrained(folder)
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (folder / CONFIG).is_symlink()


def test_linked_working_folder_is_neither_read_nor_emptied(llama, saved, tmp_path):
    """Someone else's adapter folder may hold a link by our working folder's name."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / CONFIG).write_text("mine")
    (saved / ".adapter-commit").symlink_to(precious)
    ts.PeftModel.from_pretrained(llama, saved)
    with one_error(AdapterFileError, "cannot save into"):
        ours_on(llama, "lora", "CAUSAL_LM").save_pretrained(saved)
    assert (precious / CONFIG).read_text() == "mine"
    ts.PeftModel.from_pretrained(llama, saved)
