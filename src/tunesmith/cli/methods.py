"""`tunesmith methods`: what there is to choose from."""

from __future__ import annotations

from .output import console, table


def methods() -> None:
    """List the adapter methods and their papers.

    \b
    Example:
      tunesmith methods
    """
    import inspect
    import re

    from ..registry import all_methods

    shown = table("--method", "description", "paper")
    shown.columns[0].no_wrap = shown.columns[2].no_wrap = True
    for name, method in all_methods().items():
        text = inspect.getdoc(inspect.getmodule(method.adapter)) or ""
        links = re.findall(r"arxiv\.org/abs/[\d.]*\d", text)
        summary = text.partition("\n")[0].rstrip(".")
        shown.add_row(name.lower().replace("_", "-"), summary, links[0] if links else "")
    console().print(shown, soft_wrap=False)
