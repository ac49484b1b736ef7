"""The folder of a run: how the run was made, and whether it can be resumed.

recipe.resolved.yaml     every setting
environment.json         versions, machine, and the data's hash
metrics.jsonl            every record of the training
report.html              the run as a page: curves, samples before and after, recipe
best/                    the adapter that was best on the held-out rows, if that was asked for
checkpoint-N/            adapter, optimizer, schedule, random states
adapter_config.json, adapter_model.safetensors, tunesmith_template.json, tokenizer files: the trained adapter
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ConfigError, bullet_list
from ..storage.folder import write_folder, write_text
from . import processes
from .checkpoints import checkpoints
from .recipe import RECIPE_FILE, as_yaml, read_recipe
from .settings import Settings
from .versions import version_of

ENVIRONMENT_FILE = "environment.json"
PACKAGES = ("tunesmith", "torch", "transformers", "accelerate", "safetensors", "tokenizers")
# These may change when a run is resumed: they do not change what is computed.
FREE = {"output_dir", "data", "save_steps", "save_total_limit", "logging_steps", "samples", "report_to"}


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, and the checkpoint to resume from; None starts from the beginning."""

    path: Path
    resume_from: Path | None = None

    @classmethod
    def opened(cls, path: Path, resume: bool) -> RunFolder:
        """The folder with its last checkpoint.

        Raises:
            ConfigError: it contains another run's checkpoints, and `resume` is False.
        """
        found = checkpoints(path)
        if found and not resume:
            raise ConfigError(
                f"{path} contains checkpoints of another run; resume it (--resume), or choose another --output-dir"
            )
        return cls(path, found[-1] if found else None)

    @property
    def resume_command(self) -> str:
        return f"tunesmith train --resume --output-dir {self.path}"

    def check_same(self, settings: Settings, data_hash: str) -> None:
        """A run is resumed under its own settings and with its own data, or its result would match no recipe.

        Raises:
            ConfigError: names every setting that differs.
        """
        recipe = self.path / RECIPE_FILE
        if not recipe.is_file():
            raise ConfigError(f"{self.path} contains checkpoints but no {RECIPE_FILE}; choose another --output-dir")
        import yaml

        before, now = read_recipe(recipe), yaml.safe_load(as_yaml(settings))
        names = [name for name in now if name not in FREE and before.get(name) != now[name]]
        faults = [f"{name}: was {before.get(name)!r}, is {now[name]!r} now" for name in names]
        try:
            recorded = json.loads((self.path / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            recorded = {}
        if recorded.get("data_sha256", data_hash) != data_hash:
            faults.append("the data file has changed")
        if (before_it := recorded.get("processes", processes.count())) != processes.count():
            faults.append(f"processes: were {before_it}, are {processes.count()} now")
        if faults:
            raise ConfigError(
                f"the run in {self.path} was started with other settings; restore them, or choose another --output-dir:\n"
                + bullet_list(faults)
            )

    def write_records(self, settings: Settings, data_hash: str) -> None:
        """Write the recipe and the environment, both or neither."""
        texts = {
            RECIPE_FILE: as_yaml(settings),
            ENVIRONMENT_FILE: json.dumps(environment(settings, data_hash), indent=2) + "\n",
        }
        write_folder(self.path, {name: partial(write_text, text) for name, text in texts.items()})

    @contextmanager
    def removed_if_unused(self) -> Iterator[None]:
        """Leave no trace of a folder that a run made and then failed in before its first step."""
        existed = self.path.exists()
        try:
            yield
        except Exception:
            if not existed and self.path.exists() and processes.is_main():
                self._remove_records()
            raise

    def _remove_records(self) -> None:
        found = list(self.path.iterdir())
        if all(path.name in (RECIPE_FILE, ENVIRONMENT_FILE) for path in found):
            for path in found:
                path.unlink()
            self.path.rmdir()


def file_hash(path: str | Path) -> str:
    """The SHA-256 of a file; of a name on the Hub, of the name."""
    file = Path(path)
    return hashlib.sha256(file.read_bytes() if file.is_file() else str(path).encode()).hexdigest()


def environment(settings: Settings, data_hash: str) -> dict[str, Any]:
    """What a result depends on besides its recipe."""
    import torch

    return {
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "processes": processes.count(),
        "command": sys.argv,
        "data": settings.data,
        "data_sha256": data_hash,
    }
