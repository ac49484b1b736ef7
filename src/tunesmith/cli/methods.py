"""`tunesmith methods`: what there is to choose from."""

from __future__ import annotations


def methods() -> None:
    """List the adapter methods, each with its paper.

    Example: tunesmith methods
    """
    import inspect
    import re

    from rich.console import Console
    from rich.table import Table

    from ..registry import all_methods

    table = Table(box=None, pad_edge=False)
    table.add_column("--method", no_wrap=True)
    table.add_column("what it is")
    table.add_column("paper", no_wrap=True)
    for name, method in all_methods().items():
        text = inspect.getdoc(inspect.getmodule(method.adapter)) or ""
        links = re.findall(r"arxiv\.org/abs/[\d.]*\d", text)
        summary = text.partition("\n")[0].rstrip(".")
        table.add_row(name.lower().replace("_", "-"), summary, links[0] if links else "")
    Console(highlight=False).print(table)
