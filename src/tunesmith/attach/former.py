"""What a configuration names by its name in transformers 4, in the names of the base as it is.

transformers 5 renamed modules, and stacked the linear maps of experts in parameters: of Mixtral, `experts.N.w1` and `w3` are
now `experts.gate_up_proj`. Names of the former are read as the latter, so that they reach what they reached; LoRA on maps that
are parts of one is LoRA on the whole with the sum of their ranks.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..bases import architecture
from ..bases.view import view_type
from ..config import TargetedConfig
from ..methods.parts import by_pattern
from ..paths import ends_with, is_named, matches
from .plan_names import linear_paths, of_layers, short_names, some

Modules = dict[str, nn.Module]  # by path


@dataclass(frozen=True)
class Place:
    """Where a module's weight is now: a parameter of a module, or one expert's share of it, by the order of its parts."""

    path: str
    parameter: str
    expert: int | None = None
    part: int = 0

    @property
    def name(self) -> str:
        return f"{self.path}.{self.parameter}"


def former_places(model: nn.Module, modules: Modules) -> dict[str, Place]:
    """`{path in transformers 4: place now}` of every weight that has moved."""
    names = architecture.FormerNames(model)
    places: dict[str, Place] = {}
    for path, module in modules.items():
        for parameter, value in module._parameters.items():
            if not path or value is None:
                continue
            formers = names.former(f"{path}.{parameter}")
            for part, former in enumerate(formers):
                place = Place(path, parameter, part=part)
                if former == place.name or not former.endswith(".weight"):
                    continue
                former = former.removesuffix(".weight")
                if "*" in former:
                    places |= {former.replace("*", str(i)): replace(place, expert=i) for i in range(len(value))}
                else:
                    places[former] = place
    return places


def narrowed(paths: Iterable[str], config: TargetedConfig) -> list[str]:
    """Those that `exclude_modules` and `layers_to_transform` leave."""
    kept = [path for path in paths if not (config.exclude_modules and is_named(path, config.exclude_modules))]
    return kept if config.layers_to_transform is None else of_layers(kept, config, [])


def resolve(model: Any, modules: Modules, config: Any, faults: list[str]) -> list[str]:
    """Put today's names into `config`.

    Returns:
        A sentence for everything that is left out, though a reader might expect it to be adapted.
    """
    wanted = config.target_modules
    if wanted is None:
        return []
    named = Named(model, modules, config)
    if wanted == "all-linear":
        named.add_all_linear()
    elif isinstance(wanted, str):
        named.add_expression(wanted)
    else:
        for name in sorted(wanted):
            named.add_name(name)
    named.choose_stacks()
    if wanted == "all-linear":
        named.tell_of_experts()
    named.write()
    faults += named.faults
    return named.left_out


@dataclass
class Named:
    """What `target_modules` names on a base, as it is collected."""

    model: Any
    modules: Modules
    config: Any
    kept: set[str] = field(default_factory=set)  # names that stay as they are
    paths: set[str] = field(default_factory=set)  # modules that other names stand for
    parameters: set[str] = field(default_factory=set)  # what is adapted as `target_parameters` are
    by_own_name: set[str] = field(default_factory=set)  # experts' parameters that are named as such
    formers: dict[str, str] = field(default_factory=dict)  # {path of one of these: its path in transformers 4}
    wants: list[Callable[[str], bool]] = field(default_factory=list)  # tests of experts' paths in transformers 4
    ranks: dict[str, tuple[int, float]] = field(default_factory=dict)  # {stack: rank and scale}
    faults: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.places = former_places(self.model, self.modules)
        self.stacks: dict[str, list[str]] = {}  # {parameter: its experts' paths in transformers 4}
        for path, place in self.places.items():
            if place.expert is not None:
                self.stacks.setdefault(place.name, []).append(path)
        self.routers = {path for path, module in self.modules.items() if architecture.is_router(module)}
        blocks = [(path, module) for path, module in self.modules.items() if path and view_type(module) is None]
        own = [f"{path}.{name}" for path, module in blocks for name in architecture.expert_parameters(module)]
        self.experts = dict.fromkeys([*self.stacks, *own])  # parameters that hold experts
        self.takes_parameters = hasattr(self.config, "target_parameters")

    # --- the three ways to name targets ---

    def add_all_linear(self) -> None:
        """Every linear map, with those of stacked experts, and routers that were or are linear modules."""
        self.paths = linear_paths(self.model, self.modules) - self.routers
        routers = {path for path in self.routers if self.stacks or view_type(self.modules[path])}
        blocked = self._blocked()
        if self.takes_parameters and (self.stacks or not blocked):
            self.wants.append(lambda path: True)
            self._add_routers(routers)
        elif routers:
            self.left_out.append(f"{some(routers)}: a router answers more than a product, so {'; '.join(blocked)}")

    def add_expression(self, expression: str) -> None:
        def named(path: str) -> bool:
            return re.fullmatch(expression, path) is not None

        current = {path for path in self.modules if path and named(path)}
        renamed = {path for path, place in self.places.items() if place.expert is None and named(path)}
        routers = current & self.routers if self.takes_parameters else set()
        if self.takes_parameters:
            self.wants.append(named)
            self.by_own_name |= {name for name in self.experts if named(name)}
            self._add_routers(routers)
        elif any(named(path) for path, place in self.places.items() if place.expert is not None):
            self._refuse(f'"{expression}"', self.stacks)
        self._add_renamed(renamed - current)
        self.paths |= current - routers

    def add_name(self, name: str) -> None:
        current = {path for path in self.modules if path and ends_with(path, name)}
        parameters = {parameter for parameter in self.experts if ends_with(parameter, name)}
        stacks = {stack for stack, paths in self.stacks.items() if any(ends_with(path, name) for path in paths)}
        renamed = {path for path, place in self.places.items() if place.expert is None and ends_with(path, name)}
        if stacks and self.takes_parameters:
            self.wants.append(lambda path: ends_with(path, name))
            if current:  # the ecosystem reads such a name as that of the experts alone
                self.left_out.append(f'{some(current)}: "{name}" names experts here; name such modules by longer endings, too')
        elif current:
            routers = current & self.routers if self.takes_parameters else set()
            self._add_routers(routers)
            self.kept |= set() if routers else {name}
            self.paths |= current - routers if routers else set()
            if parameters or stacks:
                rest = some(parameters or stacks)
                self.left_out.append(f'{rest}: "{name}" names modules here, experts are parameters; {self._advice()}')
        elif renamed:
            self._add_renamed(renamed)
        elif parameters and self.takes_parameters:
            self.by_own_name |= parameters
        elif parameters or stacks:
            self._refuse(f'"{name}"', stacks or parameters)
        else:
            self.kept.add(name)  # the plan says that it matches nothing

    def _add_routers(self, paths: set[str]) -> None:
        self.parameters |= {f"{path}.weight" for path in narrowed(paths, self.config)}

    def _add_renamed(self, paths: Iterable[str]) -> None:
        for former in narrowed(paths, self.config):
            place = self.places[former]
            if place.parameter == "weight" and view_type(self.modules[place.path]) and place.path not in self.routers:
                self.paths.add(place.path)
                self.formers[place.path] = former
            elif self.takes_parameters:
                self.parameters.add(place.name)
                self.formers[place.name] = former
            else:
                self._refuse(f'"{former}"', [place.name])

    # --- stacks of experts ---

    def choose_stacks(self) -> None:
        """Take parameters all of whose experts' maps are named; those of which only some are cannot be adapted so."""
        partly: list[str] = []
        for stack, paths in self.stacks.items():
            named = narrowed([path for path in paths if any(wants(path) for wants in self.wants)], self.config)
            if not named or not self._reaches(stack):
                continue
            if any(ends_with(stack, ending) for ending in self.config.target_parameters or ()):
                continue  # as the user says there
            if len(named) == len(paths):
                self.parameters.add(stack)
                self._rank(stack, paths)
            elif stack not in self.by_own_name:
                missing = some(set(paths) - set(named))
                partly.append(f"{some(named)} is a target and {missing} is not, but {stack} holds both")
        self.parameters |= {name for name in self.by_own_name if self._reaches(name)}
        if partly:
            layers = f" (and so in {len(partly) - 1} more parameters)" if len(partly) > 1 else ""
            self.faults.append(f"{partly[0]}{layers}: name all, or none")

    def _reaches(self, parameter: str) -> bool:
        """Whether neither the parameter nor the module that holds it is excluded by its own name."""
        return all(narrowed([path], self.config) for path in (parameter, parameter.rpartition(".")[0]))

    def _rank(self, stack: str, paths: list[str]) -> None:
        """The rank of a stack is the sum of its parts', unless a pattern names the stack itself."""
        if any(matches(stack, key) for keys in self.config.pattern_keys().values() for key in keys):
            return
        settings = {(self.places[path].part, self.config.settings(path)) for path in paths}
        parts, scales = {part for part, _ in settings}, {each.scale for _, each in settings}
        if len(settings) > len(parts) or len(scales) > 1:
            self.faults.append(
                f"{stack} holds the maps of all experts, so they need one rank for each name and one alpha / r: "
                "change rank_pattern and alpha_pattern, or name the parameter in them"
            )
        else:
            self.ranks[stack] = sum(each.r for _, each in settings), scales.pop()

    def tell_of_experts(self) -> None:
        """Of "all-linear": experts' parameters that it does not reach, because they have never been linear modules."""
        own = self.config.target_parameters or () if self.takes_parameters else ()
        rest = [name for name in self.experts if name not in self.parameters and not any(ends_with(name, e) for e in own)]
        rest = [name for name in rest if self._reaches(name) and narrowed(self.stacks.get(name, [name]), self.config)]
        if rest and not self.faults:
            self.left_out.append(f'{some(rest)}: "all-linear" names modules, experts are parameters; {self._advice()}')

    # --- the configuration ---

    def write(self) -> None:
        """Put names and patterns into the configuration."""
        config, expression = (
            self.config,
            isinstance(self.config.target_modules, str) and self.config.target_modules != "all-linear",
        )
        if not expression or self.formers or self.parameters:
            then = [path for paths in self.stacks.values() for path in paths]
            others = [path for path in self.modules if path not in self.paths]
            config.target_modules = self.kept | short_names(self.paths, [*others, *then])
        values = moved_patterns(config, self.formers)
        if self.formers and hasattr(config, "feedforward_modules"):
            config.feedforward_modules = moved_names(config.feedforward_modules, self.formers)
        if self.parameters:
            names = {f"{path}.{name}" for path, module in self.modules.items() for name in module._parameters}
            chosen = short_names(self.parameters, names - self.parameters, parts=2)
            config.target_parameters = sorted({*(config.target_parameters or ()), *chosen})
            add_ranks(values, config, self.ranks, names)
            self.faults += [
                f"target_modules names parameters here ({some(self.parameters)}): {reason}, or exclude them (exclude_modules)"
                for reason in self._blocked()
            ]
        then_named = {*self.formers.values(), *(path for stack in self.ranks for path in self.stacks[stack])}
        now = {*self.parameters, *self.paths, *(path for path in self.modules if self.kept and is_named(path, self.kept))}
        write_patterns(config, values, lambda key: _names(key, then_named) and not _names(key, now))

    def _blocked(self) -> list[str]:
        """Why this configuration cannot adapt parameters."""
        if not self.takes_parameters:
            return [f"{self.config.method} cannot adapt it"]
        trial = copy.copy(self.config)
        trial.target_parameters = ["weight"]
        return [fault for fault in trial.faults() if "target_parameters" in fault]

    def _refuse(self, what: str, parameters: Iterable[str]) -> None:
        self.faults.append(f"{what} names experts, which are parameters here ({some(parameters)}); {self._advice()}")

    def _advice(self) -> str:
        return "add them to target_parameters" if self.takes_parameters else f"{self.config.method} cannot adapt them, LoRA can"


def moved_names(names: Any, formers: dict[str, str]) -> Any:
    """`names`, with the paths of today where they name a path in transformers 4, for `{path now: path then}`."""
    moved = {now for now, then in formers.items() if names and is_named(then, names)}
    return names if not moved or isinstance(names, str) else {*names, *moved}


def _names(key: str, paths: Iterable[str]) -> bool:
    return any(matches(path, key) for path in paths)


def moved_patterns(config: TargetedConfig, formers: dict[str, str]) -> dict[str, dict[str, Any]]:
    """`{field: {key: value}}` of what patterns say of modules by their paths in transformers 4, for `{path now: path then}`."""
    values: dict[str, dict[str, Any]] = {}
    for name in config.pattern_keys():
        pattern = getattr(config, name)
        said = {now: by_pattern(pattern, then, None) for now, then in formers.items()}
        values[name] = {re.escape(now): value for now, value in said.items() if value is not None}
    return values


def add_ranks(values: dict[str, dict[str, Any]], config: Any, ranks: dict[str, tuple[int, float]], names: set[str]) -> None:
    """Add `{parameter: (rank, scale)}` to patterns' values, under the shortest keys that name no other of `names`."""
    for name, (r, scale) in ranks.items():
        alpha = scale * (math.sqrt(r) if config.use_rslora else r)
        alpha = round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
        if (r, alpha) != (config.r, config.lora_alpha):
            alike = {other for other, rank in ranks.items() if rank == ranks[name]}
            (key,) = short_names([name], names - alike, parts=2)
            values["rank_pattern"][re.escape(key)], values["alpha_pattern"][re.escape(key)] = r, alpha


def write_patterns(config: TargetedConfig, values: dict[str, dict[str, Any]], gone: Callable[[str], bool]) -> None:
    """Put `{field: {key: value}}` in front of the configuration's patterns, and drop keys that named only what is gone."""
    for name in config.pattern_keys():
        pattern = getattr(config, name) or {}
        if values[name] or any(map(gone, pattern)):
            setattr(config, name, {**values[name], **{key: value for key, value in pattern.items() if not gone(key)}})
