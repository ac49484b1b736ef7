"""Check the layers of `src/tunesmith` and measure what makes it hard to read.

Prints a table of figures with their limits, and each fault with its line; exits with 1 where a limit is exceeded. Everything
is read from the syntax, nothing is imported. Definitions:

- *room*: a top-level file or package of `src/tunesmith`; the root `__init__.py` is not one.
- *imports between rooms*: distinct pairs (room, other room). Typing-only imports and imports inside functions count; imports
  by the root do not.
- *imports that run upwards*: distinct pairs (room, room of a higher layer), the discovery of methods included.
- *import cycles*: strongly connected components of the graph of all those imports, over files and over rooms.
- *files and lines to read for LoRA's forward*: the files of the package that run in a call (`LORA_FORWARD`); a property that
  is one `return` is read as an attribute, wherever it stands. Of each file:
  its head (docstring, imports, constants) and every top-level function or class of which something runs, whole. A class of
  more than 150 lines is looked up rather than read: its head and the methods that run.
- *private names of the handle*: `x._name` (`x` not `self`), `getattr(x, "_name")` and `import _name` outside `handle/`,
  `model.py` and `runtime/`, where `_name` is defined in `handle/` or `model.py`.
- *lines of a function*: from `def` to its last line, docstring included. *Parameters*: all but `self` and `cls`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tools.house import figures, imports
from tools.house.imports import Fault, House

SOURCE = Path(__file__).parent.parent / "src" / "tunesmith"

# From top to bottom. Rooms of one layer may import each other as long as that makes no cycle.
LAYERS = (
    ("cli", "compat"),
    ("jobs",),
    ("estimate",),
    ("train",),
    ("auto",),
    ("model",),
    ("checkpoint",),
    ("handle",),
    ("combine",),
    ("merge",),
    ("attach",),
    ("methods",),
    ("registry",),
    ("runtime",),
    ("adapter",),
    ("data", "config", "bases"),
    ("storage",),
    ("labels", "errors", "checks", "paths", "default_targets", "assets", "inits", "kernels", "tested", "seen_as"),
)

# The one import that runs upwards, a dynamic one: each method's file registers itself.
DISCOVERY = (("registry", "methods"), ("config", "methods"))

# What runs of the package in `handle(**inputs)` with one LoRA adapter in training, from the second call on (the first one runs
# the preflight check). tests/test_house.py traces such a call and compares, so the list can be neither too short nor too long.
LORA_FORWARD: dict[str, tuple[str, ...]] = {
    "handle/calls.py": (
        "Calls.forward",
        "Calls.forward_within",
        "Calls.is_due",
        "Calls.entered",
        "Calls._check_in_place",
        "Calls._without_task_ids",
        "Calls._run",
    ),
    "runtime/frame.py": (
        "current_frame",
        "remember_frame",
        "set_running",
        "entered.__init__",
        "entered.__enter__",
        "entered.__exit__",
    ),
    "runtime/own_state.py": (
        "OwnState.enter",
        "OwnState.leave",
        "OwnState.sync",
        "OwnState.apply",
        "OwnState.has_values",
        "OwnState._own",
        "_undo",
        "_Turn.__init__",
        "_Turns.take",
        "_Turns._change",
        "_Turns.give",
    ),
    "runtime/site.py": ("Site.__call__",),
    "runtime/fold.py": ("fold", "_adapted"),
    "bases/view.py": ("view_type", "own_parameter", "BaseView.__init__", "BaseView.weight", "BaseView.operand"),
    "methods/lora.py": ("Lora.forward", "Lora._weight_to_fuse"),
    "kernels/lora_linear.py": ("applies", "lora_linear", "_LoraLinear.forward"),
}
READ_BY_METHOD = 150  # lines; of longer classes only the head and the methods that run are read

# Functions that may have more parameters, because they mirror a public interface: {"file: function": which one}.
MIRRORS: dict[str, str] = {
    "auto.py: AutoPeftModel.from_pretrained": "peft.AutoPeftModel.from_pretrained",
    "cli/chat.py: chat": "Typer: one parameter for each option of the command",
    "cli/evaluate.py: evaluate": "Typer: one parameter for each option of the command",
    "cli/generate.py: generate": "Typer: one parameter for each option of the command",
    "cli/validate.py: validate": "Typer: one parameter for each option of the command",
    "estimate/ledger.py: _attention": "torch.nn.functional.scaled_dot_product_attention",
    "model.py: PeftModel.save_pretrained": "peft.PeftModel.save_pretrained",
    "handle/combining.py: Combining.add_weighted_adapter": "peft.LoraModel.add_weighted_adapter",
    "kernels/linear_cross_entropy.py: _FrozenHead.forward": "torch.autograd.Function.forward: a context first",
    "kernels/lora_linear.py: _LoraLinear.forward": "torch.autograd.Function.forward: a context first",
    "model.py: PeftModel.from_pretrained": "peft.PeftModel.from_pretrained",
    "model.py: get_peft_model": "peft.get_peft_model",
    "runtime/packed_attention.py: attend": "the attention functions of transformers",
    "storage/hub.py: push_folder": "transformers' push_to_hub",
    "train/eva.py: get_eva_state_dict": "peft.get_eva_state_dict",
    "train/eva.py: initialize_lora_eva_weights": "peft.initialize_lora_eva_weights",
    "train/optimizers.py: create_loraplus_optimizer": "peft.optimizers.create_loraplus_optimizer",
}

HANDLE, ITS_USERS = ("handle", "model"), ("runtime",)


@dataclass(frozen=True)
class Limits:
    rooms: int = 30
    imports_between_rooms: int = 150
    imports_upwards: int = 1
    forward_files: int = 8
    forward_lines: int = 800
    lines_of_a_function: int = 50
    parameters: int = 6
    lines_of_a_file: int = 350  # noted only


@dataclass(frozen=True)
class Rules:
    """What a package is checked against; tests check made-up packages against rules of their own."""

    layers: Sequence[Sequence[str]] = LAYERS
    discovery: Sequence[tuple[str, str]] = DISCOVERY
    forward: Mapping[str, Sequence[str]] = field(default_factory=lambda: LORA_FORWARD)
    mirrors: Mapping[str, str] = field(default_factory=lambda: MIRRORS)
    limits: Limits = Limits()


@dataclass(frozen=True)
class Figure:
    """One line of the table. A figure over its limit is a fault even where none can be shown by line."""

    name: str
    found: int
    limit: int
    faults: Sequence[Fault] = ()

    @property
    def holds(self) -> bool:
        return self.found <= self.limit and not self.faults


def main() -> int:
    house = imports.read(SOURCE, DISCOVERY)
    measured = measure(house, Rules())
    print(table(measured))
    for file, lines in figures.long_files(house, Limits.lines_of_a_file):
        print(f"note: {file} has {lines} lines")
    faults = [line for figure in measured if not figure.holds for line in lines_of(figure)]
    print("\n".join(["", *faults]) if faults else "all limits hold")
    return bool(faults)


def measure(house: House, rules: Rules) -> list[Figure]:
    """Every figure, in the order of the table."""
    return [*_graph(house, rules), *_forward(house, rules), *_files(house, rules)]


def table(measured: Sequence[Figure]) -> str:
    """The figures as a Markdown table, aligned for the terminal."""
    width = max(len(figure.name) for figure in measured)
    rows = [f"| {figure.name:{width}} | {figure.found:>5} | {figure.limit:>5} |" for figure in measured]
    return "\n".join([f"| {'':{width}} | found | limit |", f"|{'-' * (width + 2)}|------:|------:|", *rows])


def lines_of(figure: Figure) -> list[str]:
    """The faults of a figure that does not hold, one a line."""
    lines = [f"src/tunesmith/{fault.file}:{fault.line}: {fault.text}" for fault in sorted(figure.faults)]
    return lines or [f"{figure.name}: {figure.found} found, at most {figure.limit} allowed"]


# --- the graph --------------------------------------------------------------------------------------------------------


def _graph(house: House, rules: Rules) -> list[Figure]:
    limits, levels = rules.limits, _levels(rules)
    between = house.between_rooms()
    pairs = {(imports.room(each.source), imports.room(each.target)) for each in between}
    up = {(low, high) for low, high in pairs if levels.get(high, 0) < levels.get(low, 0)}
    upward = [
        Fault(each.source, each.line, f"{imports.room(each.source)} may not import {each.target}, a layer above")
        for each in between
        if (pair := (imports.room(each.source), imports.room(each.target))) in up and pair not in rules.discovery
    ]
    files = [_file_cycle(house, cycle) for cycle in imports.file_cycles(house)]
    cycles = imports.room_cycles(house, rules.discovery)
    rooms = [_room_cycle(house, cycle, rules.discovery) for cycle in cycles]
    placed = _misplaced(house, levels)
    return [
        Figure("rooms", len(house.rooms), limits.rooms),
        Figure("rooms without a layer, layers without a room", len(placed), 0, placed),
        Figure("imports between rooms", len(pairs), limits.imports_between_rooms),
        Figure("imports that run upwards (1: discovery of methods)", len(up), limits.imports_upwards, upward),
        Figure("import cycles between files", len(files), 0, files),
        Figure("import cycles between rooms", len(rooms), 0, rooms),
        Figure("imports that cannot be followed", len(house.faults), 0, house.faults),
    ]


def _levels(rules: Rules) -> dict[str, int]:
    return {name: level for level, names in enumerate(rules.layers) for name in names}


def _misplaced(house: House, levels: Mapping[str, int]) -> list[Fault]:
    no_layer = [Fault(name, 1, "has no layer; add it to LAYERS in tools/check_layers.py") for name in house.rooms]
    no_room = [Fault(name, 1, "has a layer but does not exist") for name in levels if name not in house.rooms]
    return [fault for fault in no_layer if fault.file not in levels] + no_room


def _file_cycle(house: House, cycle: Sequence[str]) -> Fault:
    loop = imports.shortest_loop(cycle, [(each.source, each.target) for each in house.imports if not each.dynamic])
    line = next(each.line for each in house.imports if (each.source, each.target) == (loop[0], loop[1]))
    return Fault(loop[0], line, f"{len(cycle)} files in a cycle ({', '.join(cycle)}): {' → '.join(loop)}")


def _room_cycle(house: House, cycle: Sequence[str], discovery: Sequence[tuple[str, str]]) -> Fault:
    pairs = {(imports.room(each.source), imports.room(each.target)): each for each in house.between_rooms()}
    loop = imports.shortest_loop(cycle, pairs.keys() - set(discovery))
    first = pairs[loop[0], loop[1]]
    return Fault(first.source, first.line, f"{len(cycle)} rooms in a cycle ({', '.join(cycle)}): {' → '.join(loop)}")


# --- LoRA's forward, and single files ---------------------------------------------------------------------------------


def _forward(house: House, rules: Rules) -> list[Figure]:
    lines, faults = figures.reading(house, rules.forward, READ_BY_METHOD)
    return [
        Figure("files to read for LoRA's forward", len(rules.forward), rules.limits.forward_files, faults),
        Figure("lines to read for LoRA's forward", sum(lines.values()), rules.limits.forward_lines),
    ]


def _files(house: House, rules: Rules) -> list[Figure]:
    limits = rules.limits
    untyped = figures.untyped_self(house)
    private = figures.private_uses(house, HANDLE, ITS_USERS)
    long = figures.long_functions(house, limits.lines_of_a_function)
    wide = figures.many_parameters(house, limits.parameters, rules.mirrors)
    return [
        Figure("`self: Any`", len(untyped), 0, untyped),
        Figure("private names of the handle used elsewhere", len(private), 0, private),
        Figure(f"functions of more than {limits.lines_of_a_function} lines", len(long), 0, long),
        Figure(f"functions with more than {limits.parameters} parameters", len(wide), 0, wide),
    ]


if __name__ == "__main__":
    sys.exit(main())
