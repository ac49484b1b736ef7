"""Settings from four sources: defaults < recipe file < environment (`TUNESMITH_LEARNING_RATE`) < flags. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, bullet_list, did_you_mean
from .settings import Settings

ENVIRONMENT_PREFIX = "TUNESMITH_"
RECIPE_FILE = "recipe.resolved.yaml"  # of a run: every setting that it was started with
FIELDS = {known.name: known for known in dataclasses.fields(Settings)}
TYPES = typing.get_type_hints(Settings)
SYNONYMS = {other: name for name, known in FIELDS.items() for other in known.metadata["names"]}

# Names that other tools, or older versions of them, use for the same thing.
OLD_NAMES: dict[str, str] = {
    "warmup_ratio": "warmup_steps",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "cutoff_len": "max_length",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "target_modules": "lora_target_modules",
    "train_on_inputs": "completion_only_loss",
    "dataset_text_field": "text_column",
    "base_model": "base",
    "sample_packing": "packing",
    "evaluation_strategy": "eval_strategy",
}
# Settings of other tools that have no counterpart, and why.
NOTHING_TO_SET: dict[str, str] = {
    "group_by_length": "rows of similar lengths are always batched together, or packed",
    "overwrite_output_dir": "a folder that contains another run's checkpoints is never overwritten",
    "no_cuda": "the machine's accelerator is used if there is one; CUDA_VISIBLE_DEVICES= hides it",
    "remove_unused_columns": "columns that are not trained on are dropped automatically",
    "logging_dir": "metrics.jsonl in output_dir holds every record",
}


@dataclass
class Resolved:
    """Checked values for `Settings`, and what a person should be told about them."""

    values: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def columns_of(given: list[str] | None) -> dict[str, str] | None:
    """`{name here: name in the file}` from a verb's `--columns`; None where none are given.

    Raises:
        ConfigError: one is not of the form `name=column`.
    """
    return resolve(None, {}, {"columns": given}).values["columns"] if given else None


def resolve(recipe: Path | None, environment: Mapping[str, str], flags: Mapping[str, Any]) -> Resolved:
    """The settings that were given; later sources override earlier ones.

    Raises:
        ConfigError: all unknown names and invalid values of all sources at once.
    """
    result = Resolved()
    faults: list[str] = []
    from_environment = {
        name.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(ENVIRONMENT_PREFIX)
    }
    sources: list[tuple[Mapping[str, Any], Callable[[str], str]]] = [
        (read_recipe(recipe) if recipe else {}, lambda name: f"{recipe}: {name}"),
        (from_environment, lambda name: ENVIRONMENT_PREFIX + name.upper()),
        (flags, lambda name: "--" + name.replace("_", "-").replace("options", "option")),
    ]
    for given, shown in sources:
        for key, value in _renamed(given, shown, result.warnings, faults).items():
            try:
                converted = _converted(value, TYPES[key])
            except ValueError as error:
                faults.append(f"{shown(key)}{_shown(value)} {error}")
            else:
                both = isinstance(converted, dict) and key in result.values
                result.values[key] = {**result.values[key], **converted} if both else converted
    if faults:
        raise ConfigError(faults[0] if len(faults) == 1 else f"{len(faults)} settings are invalid:\n{bullet_list(faults)}")
    return result


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a recipe file (yaml or json).

    Raises:
        ConfigError: it is missing, malformed, not a mapping, or has a duplicate key.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"recipe {path} cannot be read ({reason}); pass a yaml file of settings") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: malformed yaml ({getattr(error, 'problem', None) or error})") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path} holds a {type(values).__name__}, expected settings such as `learning_rate: 1e-4`")
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.value in seen:
            raise ConfigError(f'{path}:{line}: "{key.value}" appears twice (first on line {seen[key.value]}); keep one')
        seen[key.value] = line
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def as_yaml(settings: Settings) -> str:
    """A complete recipe file, the method's usual learning rate included."""
    import yaml

    values = {**dataclasses.asdict(settings), "learning_rate": settings.rate}
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def _renamed(given: Mapping[str, Any], shown: Callable[[str], str], warnings: list[str], faults: list[str]) -> dict[str, Any]:
    """The values under their present names; old names become warnings, unknown ones faults."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        key = SYNONYMS.get(name, name)
        if name in NOTHING_TO_SET:
            warnings.append(f"{shown(name)} has no effect here: {NOTHING_TO_SET[name]}")
            continue
        if name in OLD_NAMES:
            key = OLD_NAMES[name]
            warnings.append(f"{shown(name)} is called {key} here; using that name")
            if name == "train_on_inputs":
                value = _opposite(value)
        if key not in FIELDS:
            known = [*FIELDS, *SYNONYMS, *OLD_NAMES]
            near = did_you_mean(name, known)
            faults.append(f"{shown(name)} is not a setting{near or '; `tunesmith train --settings` lists them'}")
        elif key in found:
            faults.append(f"{shown(name)} is given twice, under two names; keep one")
        elif value is not None:
            found[key] = value
    return found


def _opposite(value: Any) -> Any:
    try:
        return not _converted(value, bool)
    except ValueError:
        return value


def _converted(value: Any, hint: Any) -> Any:
    """A value of a recipe, of the environment or of a flag as its field's type.

    Raises:
        ValueError: it cannot be converted; the text says what is expected.
    """
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (option for option in typing.get_args(hint) if option is not type(None))
    if typing.get_origin(hint) is dict:
        return _pairs(value, texts=typing.get_args(hint)[1] is str)
    if hint is bool:
        return _truth(value)
    if hint is str:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return ",".join(value)
        if isinstance(value, (dict, list, bool)):
            raise ValueError("is not a string")
        return str(value)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("is not a number")
    try:
        number = float(value)  # yaml reads 1e-4, which has no point, as text
    except ValueError:
        raise ValueError("is not a number") from None
    if hint is int:
        if not math.isfinite(number) or number != int(number):
            raise ValueError("is not a whole number")
        return int(number)
    return number


def _shown(value: Any) -> str:
    """An invalid value as an error shows it; of a list the reason names the part."""
    return "" if isinstance(value, list) else f"={value!r}"


def _truth(value: Any) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() not in words:
        raise ValueError("is neither true nor false")
    return words[str(value).lower()]


def _pairs(value: Any, texts: bool) -> dict[str, Any]:
    """`{"r": 16}` of a mapping, of `"r=16,bias=all"` or of a list of such pairs; values are JSON, or else plain text."""
    if isinstance(value, dict):
        return {str(name): str(item) if texts else item for name, item in value.items()}
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise ValueError("is not a list of name=value")
    found: dict[str, Any] = {}
    for part in [piece for text in parts for piece in _split(text)]:
        name, equals, text = part.partition("=")
        name = name.strip() if texts else name.strip().replace("-", "_")
        if not equals or not name or name in found:
            raise ValueError(f"{part}: give each field once, as name=value, e.g. use_dora=true")
        found[name] = text if texts else _json(text)
    return found


def _split(text: str) -> list[str]:
    """The pairs of a text with commas; a comma inside a JSON list or of a plain list is not a separator."""
    parts: list[str] = []
    for part in text.split(","):
        if "=" in part and (not parts or parts[-1].count("[") == parts[-1].count("]")):
            parts.append(part)
        elif parts:
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return parts


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
