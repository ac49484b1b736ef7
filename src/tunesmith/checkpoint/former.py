"""Adapter files written under transformers 4, in the names and shapes of the base as it is.

Modules were renamed (`attach/former.py`), and the linear maps of experts became parameters. LoRA's factors of such maps are
factors of the parameter, exactly: those of one expert stand side by side, with zeros between them. Files whose names all
exist on the base are left as they are.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..attach.former import Place, add_ranks, former_places, moved_names, moved_patterns, narrowed
from ..attach.plan_names import short_names, some
from ..bases import architecture
from ..bases.view import view_type
from ..checks import not_an_expression
from ..config import PeftConfig, TargetedConfig
from ..errors import AdapterFileError, ConfigError, bullet_list
from ..methods.lora_parameters import prefixes_in_file, stacked
from ..paths import is_named
from ..storage.folder import AdapterFolder

logger = logging.getLogger(__name__)
_PREFIX = "base_model.model."
_FACTORS = ("lora_A.weight", "lora_B.weight")


def translated(
    base: nn.Module, folder: AdapterFolder, config: PeftConfig, key_mapping: Mapping[str, str] | None = None
) -> tuple[AdapterFolder, PeftConfig]:
    """A folder and its configuration, in the names of this base.

    Args:
        key_mapping: `{regular expression: replacement}` for the names of the file's tensors after `base_model.model.`; of
            each name the first expression that is found is replaced. What transformers renamed needs none.

    Raises:
        AdapterFileError: something in the file has no exact counterpart on the base.
        ConfigError: `key_mapping` is not usable.
    """
    _check_mapping(key_mapping, config)
    if not isinstance(config, TargetedConfig):
        return folder, config
    file = FormerFile(base, folder.tensors(), config, key_mapping or {})
    if not file.differs():
        return folder.holding(file.tensors), config
    values, tensors = file.settings(), file.renamed()
    if file.faults:
        raise AdapterFileError(
            f'"{folder.name}" was written for other names than {type(base).__name__} has, and not all of it can be mapped, so '
            "nothing was loaded; load it with the release of transformers that it was made with:\n"
            + bullet_list(sorted(file.faults))
        )
    return folder.holding(tensors), dataclasses.replace(config, **values)._with(config.unknown)


def _check_mapping(key_mapping: Any, config: PeftConfig) -> None:
    if key_mapping is None or key_mapping == {}:
        return
    if not isinstance(key_mapping, Mapping) or not all(isinstance(text, str) for pair in key_mapping.items() for text in pair):
        raise ConfigError("key_mapping must be a dictionary {regular expression: replacement}")
    if not isinstance(config, TargetedConfig):
        raise ConfigError(f"key_mapping renames modules, and {config.method} names none in its file; leave it out")
    for pattern, replacement in key_mapping.items():
        reason = not_an_expression(pattern) or _not_a_replacement(pattern, replacement)
        if reason:
            raise ConfigError(f'key_mapping: "{pattern}": "{replacement}" cannot be used ({reason})')


def _not_a_replacement(pattern: str, replacement: str) -> str | None:
    try:
        re.sub(f"(?:{pattern})|", lambda hit: hit.expand(replacement), "")
    except (re.error, IndexError) as error:
        return str(error)
    return None


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file: the path that the file gives its module, where that is now, and the rest of its name."""

    path: str
    place: Place
    rest: str

    @property
    def share(self) -> tuple[str, int | None, int]:
        return self.place.name, self.place.expert, self.place.part


class FormerFile:
    """The tensors of one file, each with its place on a base."""

    def __init__(self, base: nn.Module, tensors: dict[str, Tensor], config: Any, key_mapping: Mapping[str, str]) -> None:
        self.base, self.tensors, self.config = base, tensors, config
        self.modules = dict(base.named_modules())
        self.names = architecture.FormerNames(base)
        self.known: dict[str, Place | None] = {}
        self.faults: list[str] = []
        self.stacks: dict[str, dict[tuple[int, int], str]] = {}  # {parameter: {(expert, part): path in the file}}
        self.parameters: set[str] = set()
        self.mapped = {key: _mapped(key.removeprefix(_PREFIX), key_mapping) for key in tensors if key.startswith(_PREFIX)}
        if key_mapping and all(key == _PREFIX + body for key, body in self.mapped.items()):
            logger.warning("no expression of key_mapping is found in the adapter's file, so it has no effect")
        located = {key: self._located(key, body) for key, body in self.mapped.items()}
        self.entries = {key: entry for key, entry in located.items() if entry is not None}

    def differs(self) -> bool:
        """Whether anything has another name on the base, or is adapted in another way."""
        moved = any(key != f"{_PREFIX}{entry.place.path}.{entry.rest}" for key, entry in self.entries.items())
        mapped = any(key != _PREFIX + body for key, body in self.mapped.items())
        targets = (entry for entry in self.entries.values() if is_named(entry.path, self.config.target_modules or ()))
        return moved or mapped or any(self._is_parameter(entry.place) for entry in targets)

    def _located(self, key: str, body: str) -> Entry | None:
        parts = body.split(".")
        for count in range(len(parts) - 1, 0, -1):
            place, rest = self._place(".".join(parts[:count])), ".".join(parts[count:])
            if place is not None:
                return Entry(key.removeprefix(_PREFIX).removesuffix(f".{rest}"), place, rest)
        return None

    def _place(self, path: str) -> Place | None:
        if path not in self.known:
            self.known[path] = Place(path, "weight") if path in self.modules else self._moved(path)
        return self.known[path]

    def _moved(self, path: str) -> Place | None:
        name, part = self.names.current(f"{path}.weight")
        holder, _, parameter = name.rpartition(".")
        if holder not in self.modules or (parameter != "weight" and parameter not in self.modules[holder]._parameters):
            return None
        if part is None:
            return Place(holder, parameter)
        expert = [int(step) for step in path.split(".") if step.isdigit()][-1]
        weight: Any = self.modules[holder]._parameters[parameter]
        return Place(holder, parameter, expert, part) if expert < len(weight) else None

    def _is_parameter(self, place: Place) -> bool:
        """Whether what was a module's adapter is one of a parameter now."""
        return place.parameter != "weight" or architecture.is_router(self.modules[place.path])

    # --- what the configuration means ---

    def settings(self) -> dict[str, Any]:
        """The fields of the configuration that change."""
        wanted = self._wanted()
        whole = {share[0]: path for share, path in wanted.items() if share[1] is None}
        formers = {name if self._in_parameters(name) else name.removesuffix(".weight"): path for name, path in whole.items()}
        for (name, expert, part), path in wanted.items():
            if expert is not None:
                self.stacks.setdefault(name, {})[expert, part] = path
        self.parameters = {*(name for name in whole if self._in_parameters(name)), *self.stacks}
        targets = {name for name in formers if name not in self.parameters}
        values: dict[str, Any] = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
        values["target_modules"] = short_names(targets, (path for path in self.modules if path not in targets))
        values |= moved_patterns(self.config, formers)
        values["modules_to_save"] = self._modules_to_save()
        if hasattr(self.config, "feedforward_modules"):
            values["feedforward_modules"] = moved_names(self.config.feedforward_modules, formers)
        return values | (self._parameter_settings(values) if self.parameters else {})

    def _wanted(self) -> dict[tuple[str, int | None, int], str]:
        """`{share: path in the file}` of what the configuration names, by the names that the file uses."""
        paths: dict[tuple[str, int | None, int], str] = {}
        paths |= {(f"{path}.weight", None, 0): path for path, module in self.modules.items() if self._could_carry(module)}
        former = former_places(self.base, self.modules)
        paths |= {(place.name, place.expert, place.part): path for path, place in former.items()}
        paths |= {entry.share: entry.path for entry in self.entries.values()}
        targets, parameters = self.config.target_modules or (), getattr(self.config, "target_parameters", None) or ()
        kept = set(narrowed([path for path in paths.values() if is_named(path, targets)], self.config))
        kept |= {path for path in paths.values() if is_named(f"{path}.weight", parameters)}
        return {share: path for share, path in paths.items() if path in kept}

    def _could_carry(self, module: nn.Module) -> bool:
        return view_type(module) is not None or module._parameters.get("weight") is not None

    def _in_parameters(self, name: str) -> bool:
        path, _, parameter = name.rpartition(".")
        return self._is_parameter(Place(path, parameter))

    def _modules_to_save(self) -> Any:
        wanted = self.config.modules_to_save
        now = {entry.path: entry.place.path for entry in self.entries.values()}
        return wanted and [
            name if any(path.endswith(name) for path in self.modules) else next((now[p] for p in now if p.endswith(name)), name)
            for name in wanted
        ]

    def _parameter_settings(self, values: dict[str, Any]) -> dict[str, Any]:
        """Fields for adapted parameters: their names, and for stacks of experts the sums of their parts' ranks."""
        if not hasattr(self.config, "target_parameters"):
            self.faults.append(f"{some(self.parameters)} is a parameter, which {self.config.method} cannot adapt")
            return {}
        names = {f"{path}.{name}" for path, module in self.modules.items() for name in module._parameters}
        if self.config.lora_dropout:
            logger.warning("lora_dropout=%s of the file is left out: parameters cannot drop inputs", self.config.lora_dropout)
        add_ranks(values, self.config, {stack: self._rank(stack) for stack in self.stacks}, names)
        chosen = short_names(self.parameters, names - self.parameters, parts=2)
        return {"target_parameters": sorted(chosen), "lora_dropout": 0.0}

    def _rank(self, stack: str) -> tuple[int, float]:
        """Rank and scale of a stack: its parts' ranks together, and the largest of their scales."""
        ranks: dict[int, int] = {}
        settings = {share: self.config.settings(path) for share, path in self.stacks[stack].items()}
        for (_, part), each in settings.items():
            ranks[part] = max(ranks.get(part, 0), each.r)
        return sum(ranks.values()), max((each.scale for each in settings.values()), key=abs)

    # --- what the tensors become ---

    def renamed(self) -> dict[str, Tensor]:
        """The file's tensors, as a file of today would hold them."""
        result = {key: tensor for key, tensor in self.tensors.items() if key not in self.entries}
        found: dict[tuple[str, int | None, int], dict[str, Tensor]] = {}
        for key, entry in self.entries.items():
            name, expert, part = entry.share
            if expert is None:
                prefix = self._prefix(name) if name in self.parameters and entry.rest in _FACTORS else ""
                result[f"{_PREFIX}{entry.place.path}.{prefix}{entry.rest}"] = self.tensors[key]
            elif (expert, part) in self.stacks.get(name, {}) and entry.rest in _FACTORS:
                found.setdefault(entry.share, {})[entry.rest] = self.tensors[key]
            else:
                self.faults.append(f'"{key}" has no counterpart, because {name} holds all experts')
        for name in self.stacks:
            result |= self._stacked(name, found)
        return result

    def _prefix(self, name: str) -> str:
        path, _, parameter = name.rpartition(".")
        return prefixes_in_file([n for n in self.modules[path]._parameters if f"{path}.{n}" in self.parameters])[parameter]

    def _stacked(self, name: str, found: dict[tuple[str, int | None, int], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The factors of one parameter; a map that the configuration does not name is not changed."""
        path, _, parameter = name.rpartition(".")
        weight: Any = self.modules[path]._parameters[parameter]
        parts = len(self.names.former(name))
        height, (_, scale) = weight.shape[1] // parts, self._rank(name)
        factors = {}
        for share, former in self.stacks[name].items():
            settings, here = self.config.settings(former), found.get((name, *share), {})
            shapes = dict(zip(_FACTORS, ((settings.r, weight.shape[2]), (height, settings.r))))
            wrong = list(_wrong(f"{_PREFIX}{former}.", here, shapes))
            self.faults += wrong
            if not wrong:
                a, b = (here[leaf] for leaf in _FACTORS)
                factors[share] = (a, b, 1.0) if settings.scale == scale else (a.float(), b.float(), settings.scale / scale)
        if self.faults:
            return {}
        tensors = stacked(factors, len(weight), [height] * parts)
        return {f"{_PREFIX}{path}.{self._prefix(name)}{leaf}": tensor for leaf, tensor in zip(_FACTORS, tensors)}


def _wrong(prefix: str, found: dict[str, Tensor], shapes: dict[str, tuple[int, int]]) -> Iterator[str]:
    for leaf, shape in shapes.items():
        if leaf not in found:
            yield f'"{prefix}{leaf}" is missing'
        elif found[leaf].shape != shape:
            yield f'"{prefix}{leaf}" has the shape {tuple(found[leaf].shape)}, the base needs {shape}'


def _mapped(body: str, key_mapping: Mapping[str, str]) -> str:
    """A name after the first expression that is found in it."""
    for pattern, replacement in key_mapping.items():
        new, count = re.subn(pattern, replacement, body)
        if count:
            return new
    return body
