"""A handle in a few lines: its base, and what each adapter is, whether it is active and where it sits."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable
from enum import Enum
from typing import Any

from ..bases.quantised import logical_size
from ..config import PeftConfig, PromptConfig, TargetedConfig
from .state import HandleState


def described(handle: HandleState) -> str:
    """For example::

    PeftModelForCausalLM on LlamaForCausalLM (7,950,400 parameters, frozen)
      * polite  LORA r=8 lora_alpha=16, CAUSAL_LM, 107,520 parameters, active, trains
          model.layers.{0-5}.self_attn.{q_proj,v_proj}  12 x Linear
      - brief   PROMPT_TUNING num_virtual_tokens=4, CAUSAL_LM, 2,560 parameters, not active
          inputs  4 virtual tokens
    """
    base = handle.bare_base
    size = sum(logical_size(p) for p in base.parameters())
    lines = [f"{type(handle).__name__} on {type(base).__name__} ({size:,} parameters, frozen)"]
    width = max((len(name) for name in handle.peft_config), default=0)
    for name in handle.peft_config:
        lines.append(f"  {'*' if name in handle._active else '-'} {name:<{width}}  {_summary(handle, name)}")
        lines += [f"      {place}" for place in _places(handle, name)]
    return "\n".join(lines if handle.peft_config else [*lines, "  no adapters"])


def _summary(handle: HandleState, name: str) -> str:
    config, parameters = handle.peft_config[name], list(handle.tree(name).parameters())
    task = getattr(config.task_type, "value", config.task_type)
    state = [
        "merged into the base" if name in handle.merged_adapters else "active" if name in handle._active else "not active",
        "switched off" if handle._disabled else "",
        "trains" if any(p.requires_grad for p in parameters) else "",
    ]
    count = f"{sum(logical_size(p) for p in parameters):,} parameters"
    return ", ".join(filter(None, [" ".join([str(config.method), *_settings(config)]), task, count, *state]))


def _settings(config: PeftConfig) -> Iterable[str]:
    """The method's own numbers, and its other settings that differ from the default."""
    shared = {f.name for cls in (TargetedConfig, PromptConfig) for f in dataclasses.fields(cls)} - {"num_virtual_tokens"}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and value != 0
        changed = isinstance(value, (bool, str, Enum)) and value != field.default
        if field.name not in shared and (number or changed):
            yield f"{field.name}={value.value if isinstance(value, Enum) else value}"


def _places(handle: HandleState, name: str) -> list[str]:
    """One line per pattern of paths: `model.layers.{0-5}.self_attn.{q_proj,v_proj}  12 x Linear`."""
    config: Any = handle.peft_config[name]
    tree, base = handle.tree(name), handle.bare_base
    lines = [] if tree.prompt is None else [f"inputs  {config.num_virtual_tokens} virtual tokens"]
    kinds = {"_biases": "bias of ", "_copy": "copy of ", "_adapter": ""}
    for kind, word in kinds.items():
        paths = [path for path, adapter in tree.items() if tree.node(path)._modules.get(kind) is adapter]
        for pattern, members in collapsed(paths).items():
            types = Counter(type(base.get_submodule(path)).__name__ for path in members)
            lines.append(f"{pattern}  " + ", ".join(f"{count} x {word}{type_}" for type_, count in types.items()))
    changed = ((path, tree.node(path).at("_parameters_changed")) for path, _ in tree.items())
    parameters = {f"{path}.{parameter}": None for path, at in changed if at is not None for parameter in at.names}  # type: ignore[union-attr]
    lines += [f"{pattern}  {len(members)} x parameter" for pattern, members in collapsed(parameters).items()]
    return lines


def collapsed(paths: Iterable[str]) -> dict[str, list[str]]:
    """`{pattern: paths}`: paths that differ in numbers, or in the last name alone, become one pattern."""
    by_shape: dict[tuple[str, ...], dict[tuple[int, ...], str]] = {}
    for path in paths:
        parts = path.split(".")
        shape = tuple("#" if part.isdigit() else part for part in parts)
        by_shape.setdefault(shape, {})[tuple(int(part) for part in parts if part.isdigit())] = path
    alike: dict[tuple[Any, ...], tuple[list[str], list[str]]] = {}  # {(parent, numbers): (last names, paths)}
    for (*parent, last), numbered in by_shape.items():
        for group in _boxes(set(numbered)):
            names, members = alike.setdefault((tuple(parent), last == "#", frozenset(group)), ([], []))
            names.append(last)
            members += [numbered[numbers] for numbers in sorted(group)]
    return {_pattern([*key[0], _one_of(names)], key[2]): members for key, (names, members) in alike.items()}


def _boxes(numbers: set[tuple[int, ...]]) -> list[set[tuple[int, ...]]]:
    """`numbers`, split into parts that each hold every combination of their numbers by position."""
    columns = [set(column) for column in zip(*numbers)]
    if len(numbers) == len(set(itertools.product(*columns))):
        return [numbers]
    return [box for first in sorted(columns[0]) for box in _boxes_after(first, numbers)]


def _boxes_after(first: int, numbers: set[tuple[int, ...]]) -> list[set[tuple[int, ...]]]:
    rests = _boxes({rest for head, *tail in numbers if head == first for rest in [tuple(tail)]})
    return [{(first, *rest) for rest in box} for box in rests]


def _pattern(parts: list[str], numbers: Iterable[tuple[int, ...]]) -> str:
    columns = iter([sorted(set(column)) for column in zip(*numbers)])
    return ".".join(_ranges(next(columns)) if part == "#" else part for part in parts)


def _ranges(numbers: list[int]) -> str:
    """`{0-3,7}`; one number alone is itself."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) + "}"


def _one_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else "{" + ",".join(names) + "}"
