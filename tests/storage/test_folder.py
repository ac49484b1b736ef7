"""A save that is killed at any moment leaves the old adapter or the new one, complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tunesmith as ts
from tests import tiny
from tunesmith.checkpoint import save
from tunesmith.errors import AdapterFileError
from tunesmith.storage.folder import COMMIT_FOLDER

NAMES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def adapter(value: int) -> ts.PeftModel:
    """A handle whose every adapter value, and whose lora_alpha, is `value`: mixed files show."""
    handle = ts.get_peft_model(tiny.make("llama"), ts.LoraConfig(r=2, lora_alpha=value, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in handle.adapters.parameters():
            parameter.fill_(value)
    return handle


def value_in(folder: Path) -> int:
    """The value of a complete adapter in `folder`; fails on a mixture."""
    handle = ts.PeftModel.from_pretrained(tiny.make("llama"), folder)
    values = {value for parameter in handle.adapters.parameters() for value in parameter.unique().tolist()}
    values.add(handle.peft_config["default"].lora_alpha)
    assert len(values) == 1, f"mixed: {values}"
    return int(values.pop())


class Killed(BaseException):
    """As SIGKILL: what comes after it does nothing any more."""


class Kill:
    """Stops the process, as far as the disk can tell, at the n-th step that touches the disk."""

    def __init__(self, monkeypatch, at: int | None) -> None:
        self.at, self.steps, self.dead = at, 0, False
        for owner, name in [
            (os, "replace"), (os, "fsync"), (shutil, "rmtree"),
            (Path, "mkdir"), (Path, "rename"), (Path, "rmdir"), (Path, "unlink"),
        ]:  # fmt: skip
            monkeypatch.setattr(owner, name, self.step(getattr(owner, name)))
        monkeypatch.setattr(Path, "write_text", self.half_way(Path.write_text, lambda args: args[0]))
        monkeypatch.setattr(save, "save_file", self.half_way(save.save_file, lambda args: args[1]))

    def _count(self) -> bool:
        if self.dead:
            raise Killed
        self.steps += 1
        self.dead = self.steps - 1 == self.at
        return self.dead

    def step(self, function):
        def patched(*args, **kwargs):
            if self._count():
                raise Killed
            return function(*args, **kwargs)

        return patched

    def half_way(self, function, path_of):
        """A writing function, killed when half of the file is on the disk."""

        def patched(*args, **kwargs):
            killed = self._count()
            result = function(*args, **kwargs)
            if killed:
                path = Path(path_of(args))
                os.truncate(path, path.stat().st_size // 2)
                raise Killed
            return result

        return patched


def steps_of_a_save() -> int:
    """How many steps of a save over an old adapter touch the disk."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        adapter(1).save_pretrained(folder)
        kill = Kill(monkeypatch, at=None)
        adapter(2).save_pretrained(folder)
        return kill.steps


STEPS = steps_of_a_save()


def test_there_are_steps_to_be_killed_at():
    assert STEPS >= 10


@pytest.mark.parametrize("n", range(STEPS))
def test_save_killed_at_any_step_leaves_the_old_or_the_new_adapter(n, tmp_path):
    adapter(1).save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    new = adapter(2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        Kill(monkeypatch, at=n)
        with pytest.raises(Killed):
            new.save_pretrained(tmp_path)

    assert value_in(tmp_path) in (1, 2)

    adapter(3).save_pretrained(tmp_path)  # the next save cleans up
    assert value_in(tmp_path) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*NAMES, "notes.txt"])
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("n", range(STEPS + 2))
def test_change_of_the_format_killed_at_any_step_leaves_the_old_or_the_new_adapter(n, tmp_path):
    adapter(1).save_pretrained(tmp_path)
    new = adapter(2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        Kill(monkeypatch, at=n)
        with pytest.raises(Killed):
            new.save_pretrained(tmp_path, safe_serialization=False)
    assert value_in(tmp_path) in (1, 2)
    new.save_pretrained(tmp_path, safe_serialization=False)
    assert value_in(tmp_path) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.bin"]


def test_a_list_of_files_to_remove_names_an_adapters_own_files_only(tmp_path):
    folder, other = tmp_path / "adapter", tmp_path / "other"
    adapter(1).save_pretrained(folder)
    other.write_text("mine")
    (folder / COMMIT_FOLDER).mkdir()
    (folder / COMMIT_FOLDER / ".removed").write_text("../other\nREADME.md")
    adapter(2).save_pretrained(folder)
    assert other.read_text() == "mine" and value_in(folder) == 2


@pytest.mark.parametrize("n", range(STEPS + 1))
def test_first_save_killed_at_any_step_leaves_no_adapter_or_a_whole_one(n, tmp_path):
    folder = tmp_path / "new"
    with pytest.MonkeyPatch.context() as monkeypatch:
        kill = Kill(monkeypatch, at=n)
        try:
            adapter(2).save_pretrained(folder)
        except Killed:
            pass
        else:
            assert not kill.dead and value_in(folder) == 2
    try:
        assert value_in(folder) == 2
    except AdapterFileError as error:
        assert "no folder" in str(error) or "holds no adapter_config.json" in str(error)
    adapter(3).save_pretrained(folder)
    assert value_in(folder) == 3
    assert sorted(p.name for p in folder.iterdir()) == NAMES


def test_kills_happen_on_both_sides_of_the_switch(tmp_path):
    """Else the tests above would not show that the new adapter is readable before its files are in place."""
    seen = set()
    for n in range(STEPS):
        folder = tmp_path / str(n)
        adapter(1).save_pretrained(folder)
        with pytest.MonkeyPatch.context() as monkeypatch:
            Kill(monkeypatch, at=n)
            with pytest.raises(Killed):
                adapter(2).save_pretrained(folder)
        seen.add((value_in(folder), (folder / COMMIT_FOLDER).is_dir()))
    assert {(1, False), (2, True)} <= seen


def test_two_kills_one_after_the_other_leave_a_whole_adapter(tmp_path):
    """The second one meets what the first one left, at every pair of steps that differ by a third of the way."""
    for n in range(STEPS):
        folder = tmp_path / str(n)
        adapter(1).save_pretrained(folder)
        for value, at in ((2, n), (3, (n + STEPS // 3) % STEPS)):
            with pytest.MonkeyPatch.context() as monkeypatch:
                Kill(monkeypatch, at=at)
                with contextlib.suppress(Killed):
                    adapter(value).save_pretrained(folder)
            assert value_in(folder) in (1, 2, 3)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError(28, "No space left on device")])
@pytest.mark.parametrize("function", ["save_file", "fsync"])
def test_save_that_fails_leaves_the_old_adapter_and_no_litter(function, error, tmp_path, monkeypatch):
    adapter(1).save_pretrained(tmp_path)
    new = adapter(2)

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(*{"save_file": (save, "save_file"), "fsync": (os, "fsync")}[function], fail)
        with pytest.raises(AdapterFileError if isinstance(error, OSError) else error):
            new.save_pretrained(tmp_path)
    assert value_in(tmp_path) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == NAMES


def test_full_disk_is_said_with_the_next_step(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AdapterFileError, match=r"cannot save into .*No space left on device.*fix this or give another folder"):
        adapter(1).save_pretrained(tmp_path)


def test_config_saved_alone_is_atomic_too(tmp_path):
    adapter(1).save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    with pytest.MonkeyPatch.context() as monkeypatch:
        Kill(monkeypatch, at=2)
        with pytest.raises(Killed):
            ts.LoraConfig(r=2, lora_alpha=9).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").read_text() == text
    assert value_in(tmp_path) == 1


def test_other_files_and_an_edited_card_are_kept(tmp_path):
    adapter(1).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("my own words")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "data.bin").write_bytes(b"123")
    adapter(2).save_pretrained(tmp_path)
    assert value_in(tmp_path) == 2
    assert (tmp_path / "README.md").read_text() == "my own words"
    assert (tmp_path / "inner" / "data.bin").read_bytes() == b"123"


def test_saving_reads_nothing_lazily_from_the_file_it_replaces(tmp_path):
    """Loaded, changed and saved into the same folder: no value may come from the file being replaced."""
    adapter(1).save_pretrained(tmp_path)
    handle = ts.PeftModel.from_pretrained(tiny.make("llama"), tmp_path)
    handle.save_pretrained(tmp_path)
    adapter(2).save_pretrained(tmp_path)
    assert {v for p in handle.adapters.parameters() for v in p.unique().tolist()} == {1.0}


TOGETHER = """
import os, sys
from pathlib import Path
from tests.storage.test_folder import adapter, value_in, NAMES

folder, handles = Path(sys.argv[1]), [adapter(1), adapter(2)]
children = []
for handle in handles:
    child = os.fork()
    if child == 0:
        for _ in range(15):
            handle.save_pretrained(folder)
        os._exit(0)
    children.append(child)
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
assert value_in(folder) in (1, 2) and sorted(p.name for p in folder.iterdir()) == NAMES
print("whole")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_processes_that_save_into_one_folder_take_turns(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", TOGETHER, str(tmp_path / "adapter")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert result.stdout == "whole\n", result.stderr[-2000:]


REAL = """
import os, random, signal, sys, time
from pathlib import Path
from tests.storage.test_folder import adapter, value_in, NAMES

folder, random = Path(sys.argv[1]), random.Random(0)
handles = [adapter(value) for value in (1, 2, 3)]
start = time.perf_counter()
handles[0].save_pretrained(folder)
handles[1].save_pretrained(folder)
duration = (time.perf_counter() - start) / 2
seen = set()
for round in range(9):
    saved, told = os.pipe()
    child = os.fork()
    if child == 0:
        while True:
            round += 1
            handles[round % 3].save_pretrained(folder)
            os.write(told, b".")
    os.close(told)
    os.read(saved, 1)  # the first save is done, more are under way
    time.sleep(random.uniform(0, 3 * duration))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    os.close(saved)
    seen.add(value_in(folder))
adapter(7).save_pretrained(folder)
assert value_in(folder) == 7 and sorted(p.name for p in folder.iterdir()) == NAMES
assert seen <= {1, 2, 3} and len(seen) > 1, seen
print("whole every time")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_process_killed_9_times_while_it_saves_leaves_a_whole_adapter_every_time(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", REAL, str(tmp_path / "adapter")], capture_output=True, text=True, env=environment, timeout=100
    )
    assert result.stdout == "whole every time\n", result.stderr[-2000:]
