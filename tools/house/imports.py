"""The package as a graph: its rooms, its files, and which file imports which, read from the syntax alone.

A *room* is a top-level file or package. The root `__init__.py` is not a room: it exports everything lazily, so its own
imports are not counted. In return, no file of the package may import from the root (`from .. import PeftModel`), except for
dunder names such as `__version__`.

Every other import counts alike, whether it stands at the top of a file, inside a function or under `TYPE_CHECKING`.
`from . import x` and `from ..room import x` are imports of the file `x` where there is one, of the package's
`__init__.py` otherwise.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = "__init__.py"
DYNAMIC_IMPORTS = {"import_module", "__import__", "spec_from_file_location", "exec_module", "pkgutil", "runpy"}


@dataclass(frozen=True, order=True)
class Import:
    """One file imports another; both relative to the package."""

    source: str
    target: str
    line: int
    dynamic: bool = False


@dataclass(frozen=True, order=True)
class Fault:
    file: str
    line: int
    text: str


@dataclass
class House:
    """A package, read.

    Args:
        folder: the package's folder; its name is the package's.
        trees: `{file: syntax}`, files relative to the package.
        lines: `{file: number of lines}`.
        imports: of files of the package by files of the package.
        faults: imports that cannot be followed: of missing files, from the root, or dynamic.
    """

    folder: Path
    trees: dict[str, ast.Module] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    imports: list[Import] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    @property
    def rooms(self) -> list[str]:
        return sorted({room(file) for file in self.trees} - {room(ROOT)})

    def files_of(self, name: str) -> list[str]:
        return sorted(file for file in self.trees if room(file) == name)

    def between_rooms(self) -> list[Import]:
        """Imports of one room by another; those of and by the root are left out."""
        rooms = [(room(each.source), room(each.target), each) for each in self.imports]
        return [each for source, target, each in rooms if source != target and room(ROOT) not in (source, target)]


def room(file: str) -> str:
    """The room that a file belongs to."""
    return file.split("/")[0].removesuffix(".py")


def read(folder: Path, discovery: Iterable[tuple[str, str]] = ()) -> House:
    """Read the package in `folder`.

    Args:
        discovery: pairs (room, room): the former may import the files of the latter dynamically.
    """
    house = House(folder)
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        file = path.relative_to(folder).as_posix()
        house.trees[file] = ast.parse(text)
        house.lines[file] = len(text.splitlines())
    for file, tree in house.trees.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                _read_import(house, file, node)
        if file != ROOT:
            _read_dynamic_imports(house, file, tree, dict(discovery))
    house.imports = sorted(set(house.imports))
    return house


def _read_import(house: House, file: str, node: ast.Import | ast.ImportFrom) -> None:
    for dotted, name in _imported(house.folder.name, file, node):
        target = _file_of(house, (*dotted, name)) if name else None
        target = target or _file_of(house, dotted)
        if target is None:
            house.faults.append(Fault(file, node.lineno, f"imports {'.'.join(dotted)}, which does not exist"))
        elif target == ROOT and file != ROOT and not name.startswith("__"):
            what = f"{name} from the root" if name else "the root"
            house.faults.append(Fault(file, node.lineno, f"imports {what}; import from the room that defines it"))
        elif target != file:
            house.imports.append(Import(file, target, node.lineno))


def _imported(package: str, file: str, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[tuple[str, ...], str]]:
    """(dotted path inside the package, name taken from it) of each import of something of the package."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            first, *rest = alias.name.split(".")
            if first == package:
                yield tuple(rest), ""
        return
    dotted = tuple(node.module.split(".")) if node.module else ()
    if node.level:
        parts = tuple(file.removesuffix(".py").split("/"))
        dotted = (*parts[: len(parts) - node.level], *dotted)
    elif dotted[0] == package:
        dotted = dotted[1:]
    else:
        return
    for alias in node.names:
        yield dotted, alias.name


def _file_of(house: House, dotted: tuple[str, ...]) -> str | None:
    candidates = ["/".join(dotted) + ".py", "/".join((*dotted, ROOT))]
    return next((file for file in candidates if file in house.trees), None)


def _read_dynamic_imports(house: House, file: str, tree: ast.Module, discovery: Mapping[str, str]) -> None:
    """Dynamic imports are faults, except for the discovery of methods."""
    target = discovery.get(room(file))
    for statement in tree.body:
        used = {line: name for node in ast.walk(statement) for line, name in _dynamic_names(node)}
        if target and isinstance(statement, (ast.Import, ast.ImportFrom)):
            continue
        found = _file_of(house, (target,)) if used and target and target in ast.unparse(statement) else None
        if found is not None:
            house.imports.append(Import(file, found, min(used), dynamic=True))
            continue
        for line, name in used.items():
            house.faults.append(Fault(file, line, f"imports dynamically ({name}); use an import statement"))


def _dynamic_names(node: ast.AST) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.Name) and node.id in DYNAMIC_IMPORTS:
        yield node.lineno, node.id
    elif isinstance(node, ast.alias) and node.name in DYNAMIC_IMPORTS:
        yield node.lineno, node.name
    elif isinstance(node, ast.Attribute) and node.attr in DYNAMIC_IMPORTS:
        yield node.lineno, node.attr


def cycles(nodes: Iterable[str], edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The strongly connected components of more than one node, each sorted (Tarjan 1972)."""
    successors: dict[str, list[str]] = {node: [] for node in nodes}
    for source, target in edges:
        successors[source].append(target)
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for other in successors[node]:
            if other not in order:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], order[other])
        if lowest[node] == order[node]:
            cycle = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(cycle) > 1:
                found.append(sorted(cycle))

    for node in successors:
        if node not in order:
            visit(node)
    return sorted(found)


def file_cycles(house: House) -> list[list[str]]:
    edges = [(i.source, i.target) for i in house.imports if i.source != ROOT and not i.dynamic]
    return cycles(house.trees, edges)


def shortest_loop(cycle: Iterable[str], edges: Iterable[tuple[str, str]]) -> list[str]:
    """A shortest path from the cycle's first node back to it, both ends included."""
    inside = sorted(cycle)
    steps = sorted({(source, target) for source, target in edges if source in inside and target in inside})
    paths, seen = [[inside[0]]], set[str]()
    while True:  # ends: from every node of a strongly connected component a path leads back to it
        paths = [[*path, target] for path in paths for source, target in steps if source == path[-1] and target not in seen]
        seen.update(path[-1] for path in paths)
        if inside[0] in seen:
            return next(path for path in paths if path[-1] == inside[0])


def room_cycles(house: House, discovery: Iterable[tuple[str, str]] = ()) -> list[list[str]]:
    """Circles of rooms; the discovery of methods, which imports them on demand, makes none."""
    pairs = {(room(i.source), room(i.target)) for i in house.between_rooms()} - set(discovery)
    return cycles(house.rooms, sorted(pairs))
