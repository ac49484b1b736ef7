"""An adapter's files in a folder: validated when read, written completely or not at all.

    adapter_config.json         the configuration (indent 2, sorted keys)
    adapter_model.safetensors   the tensors (metadata {"format": "pt"})
    adapter_encoder.safetensors the encoder of virtual tokens in training; needed only to resume
    adapter_model.bin           the tensors in the old format, of which nothing but plain tensors is unpickled
    README.md                   the model card

Writing stages new files beside the old ones in `.adapter-staging-<id>/`, flushes them to disk and renames the folder
to `.adapter-commit/`: from that moment the new adapter is the valid one, and each file then moves into place.
Readers check `.adapter-commit/` first. A writer killed at any moment leaves the old adapter or the new one.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from safetensors import SafetensorError, safe_open

from ..errors import AdapterFileError
from .hub import fetch
from .options import hub_options

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ENCODER_FILE = "adapter_encoder.safetensors"
OLD_WEIGHTS_FILE = "adapter_model.bin"
CARD_FILE = "README.md"
COMMIT_FOLDER = ".adapter-commit"
STAGING_PREFIX = ".adapter-staging-"
REMOVED_FILE = ".removed"  # of a commit: names of the files that it takes away


class AdapterFolder:
    """Where an adapter's files are: a local folder, or a hub repository's cached files."""

    def __init__(self, name: str, locate: Callable[[str], Path | None]) -> None:
        self.name = name
        self.locate = locate
        self._held: dict[str, Tensor] | None = None

    @classmethod
    def find(cls, name_or_path: str | os.PathLike, subfolder: str | None = None, **hub: Any) -> AdapterFolder:
        """The adapter in a local folder, else in a Hub repository (kwargs: see `options.py`).

        Raises:
            AdapterFileError: neither exists.
            ConfigError: an option is unknown.
        """
        known = hub_options(hub)
        if not isinstance(name_or_path, (str, os.PathLike)) or not str(name_or_path):
            raise AdapterFileError(f"{name_or_path!r} does not name an adapter; give a folder or the id of a Hub repository")
        if subfolder and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
            raise AdapterFileError(f"subfolder={subfolder!r} points outside the adapter's folder; give a folder inside it")
        folder = Path(name_or_path) / (subfolder or "")
        if os.path.isdir(folder):  # unlike Path.is_dir, False for names that no file system takes
            return cls(str(folder), lambda filename: _present(folder, filename))
        if os.path.isfile(folder):
            raise AdapterFileError(f"{folder} is a file; give the folder that holds {CONFIG_FILE}")
        if Path(name_or_path).is_absolute() or str(name_or_path).startswith(".") or str(name_or_path).count("/") != 1:
            raise AdapterFileError(f"there is no folder {folder}; check the path (Hub repositories are written owner/name)")
        prefix = f"{subfolder}/" if subfolder else ""
        return cls(str(name_or_path), lambda filename: fetch(str(name_or_path), prefix + filename, **known))

    def values(self) -> dict[str, Any]:
        """What `adapter_config.json` holds.

        Raises:
            AdapterFileError: the file is missing or is not a JSON object.
        """
        path = self.locate(CONFIG_FILE)
        if path is None:
            raise AdapterFileError(f'"{self.name}" holds no {CONFIG_FILE}, so it is not an adapter{self._hint()}')
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise AdapterFileError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
        except (ValueError, RecursionError) as error:
            raise AdapterFileError(f"{path} is not valid JSON ({error}); download or save the adapter again") from error
        if not isinstance(values, dict):
            raise AdapterFileError(
                f"{path} holds a {type(values).__name__}, expected a JSON object; download or save the adapter again"
            )
        return values

    def _hint(self) -> str:
        folder = Path(self.name)
        if not folder.is_dir():
            return ""
        inner = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG_FILE}"))
        return f"; adapters inside it: {', '.join(inner[:8])}" if inner else ""

    def holding(self, tensors: dict[str, Tensor]) -> AdapterFolder:
        """The same folder with these tensors in place of what its weights file holds."""
        other = AdapterFolder(self.name, self.locate)
        other._held = tensors
        return other

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the weights file, on the CPU.

        Raises:
            AdapterFileError: the file is missing, truncated, damaged or holds anything but tensors.
        """
        if self._held is not None:
            return self._held
        path = self.locate(WEIGHTS_FILE)
        if path is not None:
            return _read_safetensors(path)
        path = self.locate(OLD_WEIGHTS_FILE)
        if path is None:
            raise AdapterFileError(f'"{self.name}" has a {CONFIG_FILE} but no {WEIGHTS_FILE}; save or download it again')
        return _read_pickle(path)

    def holds_encoder(self) -> bool:
        """Whether training can be resumed: the virtual tokens' encoder is present."""
        return self.locate(ENCODER_FILE) is not None

    def encoder_tensors(self) -> dict[str, Tensor]:
        """Every tensor of the virtual tokens' encoder; empty if there is no such file."""
        path = self.locate(ENCODER_FILE)
        return {} if path is None else _read_safetensors(path)


def _present(folder: Path, filename: str) -> Path | None:
    """The file in a folder; that of a committed write whose files have not been moved yet comes first."""
    commit = folder / COMMIT_FOLDER
    if commit.is_symlink():
        places: tuple[Path, ...] = (folder,)
    else:
        places = (commit,) if filename in _removed(commit) else (commit, folder)
    return next((place / filename for place in places if (place / filename).is_file()), None)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        message = f"{path} is damaged or not a safetensors file ({error}); download or save the adapter again"
        raise AdapterFileError(message) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    import torch

    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise AdapterFileError(
            f"{path} cannot be read as plain tensors, and Tunesmith runs no code from pickles; "
            f"ask its author for {WEIGHTS_FILE}"
        ) from error
    if not isinstance(values, dict) or not all(isinstance(v, torch.Tensor) for v in values.values()):
        raise AdapterFileError(f"{path} holds something other than named tensors; ask its author for {WEIGHTS_FILE}")
    return values


def write_folder(
    folder: str | os.PathLike, writers: Mapping[str, Callable[[Path], object]], removed: Collection[str] = ()
) -> None:
    """Write files into `folder` and remove others, all of it or nothing; files that are not named are kept.

    Processes that write into one folder take turns.

    Args:
        writers: `{filename: function that writes it to the given path}`.
        removed: names of files that must not be there afterwards.
    """
    folder = Path(folder)
    if folder.is_file():
        raise AdapterFileError(f"{folder} is a file; give a folder to save into")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            _finish(folder)
            for leftover in folder.glob(f"{STAGING_PREFIX}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            present = [name for name in sorted(removed) if (folder / name).is_file()]
            gone = {REMOVED_FILE: partial(write_text, "\n".join(present))} if present else {}
            _stage(folder, {**writers, **gone})
            _finish(folder)
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"cannot save into {folder} ({error}); fix this or give another folder") from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process writes into `folder`; the system lets go of it when a process ends, however it ends."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_text(text: str, path: Path) -> None:
    """A writer for `write_folder`, once the text is bound."""
    path.write_text(text, encoding="utf-8")


def _stage(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write files beside the old ones and make them the valid ones in one step."""
    staging = folder / f"{STAGING_PREFIX}{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    try:
        for filename, write in writers.items():
            write(staging / filename)
            flush(staging / filename)
        flush(staging)
        staging.rename(folder / COMMIT_FOLDER)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    flush(folder)


def _finish(folder: Path) -> None:
    """Move the files of a committed write into place; does nothing if there are none."""
    commit = folder / COMMIT_FOLDER
    if commit.is_symlink() or not commit.is_dir():  # a link is not ours: it would move another folder's files
        return
    for name in _removed(commit):
        (folder / name).unlink(missing_ok=True)
    (commit / REMOVED_FILE).unlink(missing_ok=True)
    for path in commit.iterdir():
        os.replace(path, folder / path.name)
    commit.rmdir()
    flush(folder)


def _removed(commit: Path) -> list[str]:
    """The files that a committed write takes away: an adapter's own, whatever somebody else's list may name."""
    listed, own = commit / REMOVED_FILE, (WEIGHTS_FILE, OLD_WEIGHTS_FILE, ENCODER_FILE)
    return [name for name in listed.read_text(encoding="utf-8").splitlines() if name in own] if listed.is_file() else []


def flush(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
