"""Figures of single files: long functions, many parameters, untyped `self`, private names, and what one call runs through."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping, Sequence

from .imports import ROOT, Fault, House, room

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def definitions(tree: ast.Module) -> Iterator[tuple[str, Definition]]:
    """(qualified name, node) of every function and class, those inside functions (`outer.inner`) included."""

    def inside(node: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Definition):
                yield prefix + child.name, child
                yield from inside(child, f"{prefix}{child.name}.")
            else:
                yield from inside(child, prefix)

    yield from inside(tree, "")


def functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    for name, node in definitions(tree):
        if isinstance(node, Function):
            yield name, node


def first_line(node: Definition) -> int:
    """Of the definition with its decorators; it is what a code object gives as its first line."""
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def long_functions(house: House, limit: int) -> list[Fault]:
    """Functions of more than `limit` lines, counted from `def` to the last one, docstring included."""
    faults = []
    for file, tree in house.trees.items():
        for name, node in functions(tree):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > limit:
                faults.append(Fault(file, node.lineno, f"{name} has {lines} lines"))
    return faults


def many_parameters(house: House, limit: int, exempt: Mapping[str, str]) -> list[Fault]:
    """Functions of more than `limit` parameters; `self` and `cls` are not counted, `*args` and `**kwargs` are one each.

    Args:
        exempt: `{"file: qualified name": reason}`; a needless exemption is a fault, too.
    """
    faults = []
    unused = set(exempt)
    for file, tree in house.trees.items():
        for name, node in functions(tree):
            count = _parameters(node)
            if count <= limit:
                continue
            unused.discard(f"{file}: {name}")
            if f"{file}: {name}" not in exempt:
                faults.append(Fault(file, node.lineno, f"{name} has {count} parameters"))
    for key in sorted(unused):
        file, _, name = key.partition(": ")
        faults.append(Fault(file, 1, f"{name} needs no exemption from the limit on parameters; remove it from MIRRORS"))
    return faults


def _parameters(node: Function) -> int:
    every = _every_parameter(node)
    return len(every) - (bool(every) and every[0].arg in ("self", "cls"))


def _every_parameter(node: Function) -> list[ast.arg]:
    given = node.args
    starred = [each for each in (given.vararg, given.kwarg) if each is not None]
    return [*given.posonlyargs, *given.args, *given.kwonlyargs, *starred]


def untyped_self(house: House) -> list[Fault]:
    """Methods whose `self` (or `cls`) is `Any`, which hides all that it is used for from type checkers and readers."""
    faults = []
    for file, tree in house.trees.items():
        for name, node in functions(tree):
            first = next(iter(_every_parameter(node)), None)
            if first is None or first.arg not in ("self", "cls") or first.annotation is None:
                continue
            if ast.unparse(first.annotation).strip("'\"").split(".")[-1] == "Any":
                faults.append(Fault(file, node.lineno, f"{name}({first.arg}: Any)"))
    return faults


def long_files(house: House, limit: int) -> list[tuple[str, int]]:
    return [(file, lines) for file, lines in house.lines.items() if lines > limit]


# --- private names ----------------------------------------------------------------------------------------------------

# Names that every torch module has.
OF_MODULES = {"_apply", "_buffers", "_modules", "_named_members", "_parameters", "_replicate_for_data_parallel"}


def private_uses(house: House, owners: Collection[str], users: Collection[str]) -> list[Fault]:
    """Uses, outside the rooms `owners` and `users`, of private names that are defined in `owners`.

    A use is `x._name` where `x` is not `self` or `cls`, `getattr(x, "_name")` and its like, and `from ..owner import _name`.
    """
    private = {
        name for file, tree in house.trees.items() if room(file) in owners for name in _defined(tree) if _is_private(name)
    } - OF_MODULES
    faults = []
    for file, tree in house.trees.items():
        if room(file) in {*owners, *users}:
            continue
        for node in ast.walk(tree):
            for line, name in _private_uses(node, owners):
                if name in private:
                    faults.append(Fault(file, line, f"uses {name}, a private name of {' or '.join(owners)}"))
    return sorted(set(faults))


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _defined(tree: ast.Module) -> Iterator[str]:
    """Names of functions, classes, module and class variables, and attributes that are set on `self` or `cls`."""
    for _, definition in definitions(tree):
        yield definition.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_own(node.value):
            yield node.attr
        elif isinstance(node, (ast.Module, ast.ClassDef)):
            for statement in node.body:
                targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
                yield from (each.id for each in targets if isinstance(each, ast.Name))


def _private_uses(node: ast.AST, owners: Collection[str]) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.Attribute) and not _is_own(node.value):
        yield node.lineno, node.attr
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _BY_STRING:
        name = node.args[1] if len(node.args) > 1 else None
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            yield node.lineno, name.value
    elif isinstance(node, ast.ImportFrom) and set((node.module or "").split(".")) & set(owners):
        yield from ((node.lineno, alias.name) for alias in node.names)


_BY_STRING = {"getattr", "setattr", "hasattr", "delattr"}


def _is_own(value: ast.AST) -> bool:
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


# --- the path of one call ---------------------------------------------------------------------------------------------


def reading(house: House, path: Mapping[str, Sequence[str]], by_method: int) -> tuple[dict[str, int], list[Fault]]:
    """How many lines of each file one must read to follow a call that runs through `path`.

    Of each file: its head (docstring, imports, constants) and every top-level function or class of which something runs,
    whole. A class of more than `by_method` lines is looked up rather than read: its head and the methods that run.

    Args:
        path: `{file: qualified names of the functions that run}`.
        by_method: lines of the longest class that is read whole.

    Returns:
        `{file: lines to read}`, and a fault for each function that does not exist.
    """
    lines: dict[str, int] = {}
    faults: list[Fault] = []
    for file, names in path.items():
        if file not in house.trees:
            faults.append(Fault(file, 1, "does not exist, but LORA_FORWARD names it"))
            continue
        tree = house.trees[file]
        found = dict(functions(tree))
        missing = [name for name in names if name not in found]
        faults += [Fault(file, 1, f"has no {name}, but LORA_FORWARD names it") for name in missing]
        lines[file] = len(_to_read(tree, [found[name] for name in names if name in found], by_method))
    return lines, faults


def _to_read(tree: ast.Module, runs: list[Function], by_method: int) -> set[int]:
    run = {line for node in runs for line in _span(node)}
    read: set[int] = set()
    for node in tree.body:
        if not isinstance(node, Definition):
            read |= _span(node)
        elif not run & _span(node):
            continue
        elif isinstance(node, ast.ClassDef) and len(_span(node)) > by_method:
            head = (_span(statement) for statement in node.body if not isinstance(statement, Definition))
            read |= set(range(first_line(node), node.lineno + 1)).union(*head) | (run & _span(node))
        else:
            read |= _span(node)
    return read


def _span(node: ast.stmt) -> set[int]:
    start = first_line(node) if isinstance(node, Definition) else node.lineno
    return set(range(start, (node.end_lineno or start) + 1))


def is_accessor(house: House, file: str, name: str) -> bool:
    """Whether a function is a property that is one `return`, which a reader takes for an attribute."""
    node = dict(functions(house.trees[file])).get(name) if file != ROOT else None
    if node is None or not any(isinstance(each, ast.Name) and each.id == "property" for each in node.decorator_list):
        return False
    body = [line for line in node.body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))]
    return len(body) == 1 and isinstance(body[0], ast.Return)


def function_at(house: House, file: str, line: int) -> str:
    """The qualified name of the innermost function around a code object's first line (of a comprehension or a lambda, too)."""
    if file == ROOT:
        return "<root>"
    around = [(name, node) for name, node in functions(house.trees[file]) if line in _span(node)]
    return around[-1][0] if around else "<module>"
