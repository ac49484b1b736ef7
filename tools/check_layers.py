"""Hold the layers apart: a module may import only from its own layer and the layers below (docs/design/architecture.md)."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "tunesmith"

# From top to bottom. A name is a module or a package of tunesmith.
LAYERS = [
    ["cli"],
    ["train", "plan"],
    ["auto"],
    ["tasks"],
    ["model"],
    ["mirror", "framed", "framing", "preflight", "mergeable", "combinable", "scheduled", "status", "checkpoint", "data"],
    ["merge", "merge_quantised", "merging", "record", "describe"],
    ["conflicts"],
    ["attach"],
    ["match"],
    ["token_plan", "parameter_plan"],
    ["methods"],
    ["prefix", "segments"],
    ["site", "prompting"],
    ["mixing"],
    ["contracts"],
    ["registry"],
    ["config", "frame", "runtime", "bases", "kernels", "inits"],
    ["assets", "errors", "targets", "tested"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Public methods that must stand on a class below the layer that does the work, imported when called.
ALLOWED = {
    ("config", "checkpoint"),
    ("config", "registry"),
    ("registry", "methods"),
    ("registry", "contracts"),
    ("model", "tasks"),
}


def main() -> int:
    faults = [fault for path in sorted(SOURCE.rglob("*.py")) for fault in faults_of(path)]
    print("\n".join(faults) if faults else f"layers hold: {len(LEVEL)} parts in {len(LAYERS)} layers")
    return bool(faults)


def faults_of(path: Path) -> list[str]:
    """Every import of `path` that points upwards or to a part that has no layer yet."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    own = parts[0]
    if own == "__init__":
        return []
    if own not in LEVEL:
        return [f"{path}: {own} has no layer; add it to tools/check_layers.py"]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {id(node) for block in ast.walk(tree) if _is_type_checking(block) for node in ast.walk(block)}
    faults = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level or id(node) in typing_only:
            continue
        package = parts[: len(parts) - node.level]
        target = [*package, *(node.module or "").split(".")] if node.module else list(package)
        names = [target[0]] if target else [alias.name for alias in node.names]
        for name in names:
            if name in LEVEL and LEVEL[name] < LEVEL[own] and (own, name) not in ALLOWED:
                faults.append(
                    f"{path.relative_to(SOURCE.parent.parent)}:{node.lineno}: {own} may not import {name}, a layer above"
                )
    return faults


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


if __name__ == "__main__":
    sys.exit(main())
