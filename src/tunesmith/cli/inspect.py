"""`tunesmith inspect`: what is in an adapter's folder."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import AdapterFileError
from .output import console, counted, table

if TYPE_CHECKING:
    from rich.table import Table

    from ..checkpoint.summary import AdapterSummary


def inspect(
    adapter: Annotated[str, typer.Argument(help="Adapter folder or Hub id, from Tunesmith or PEFT.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show what is in an adapter, without loading its base.

    \b
    Examples:
      tunesmith inspect my-adapter
      tunesmith inspect my-adapter --json

    Shows its method, base, targets, ranks, norms, sizes and faults. The exit code is 1 if it has faults.
    """
    from ..checkpoint.summary import summarize

    found = summarize(adapter)
    if as_json:
        typer.echo(json.dumps(_plain(found), indent=2, sort_keys=True))
    else:
        _show(found)
    if found.faults:
        raise AdapterFileError(f"{adapter} has {counted(len(found.faults), 'fault')}: " + "; ".join(found.faults))


def _show(found: AdapterSummary) -> None:
    out = console(markup=False)
    for title, text in _facts(found).items():
        out.print(f"{title:<11}{text}")
    for name, (size, digest) in found.files.items():
        out.print(f"{'file':<11}{name}  {size:,} bytes  sha256 {digest[:16]}")
    if found.layers:
        out.print(_bars(found))


def _facts(found: AdapterSummary) -> dict[str, str]:
    config: Any = found.config
    facts: dict[str, Any] = {"adapter": found.name}
    if config is not None:
        facts |= {"method": getattr(config.peft_type, "value", config.peft_type), "base": config.base_model_name_or_path}
        facts |= {"task": getattr(config.task_type, "value", config.task_type)}
        targets = getattr(config, "target_modules", None)
        facts["targets"] = targets if isinstance(targets, str) else ", ".join(sorted(targets)) if targets else None
        numbers = ("r", "lora_alpha", "num_virtual_tokens")
        facts["settings"] = ", ".join(f"{name}={getattr(config, name)}" for name in numbers if getattr(config, name, None))
    if found.ranks:
        facts["ranks"] = ", ".join(f"{rank} ({count} modules)" for rank, count in sorted(found.ranks.items()))
    if found.tensors:
        types = ", ".join(f"{count} {kind}" for kind, count in found.types.items())
        facts["contains"] = f"{found.parameters:,} parameters in {found.tensors} tensors ({types})"
    return {name: str(value) for name, value in facts.items() if value}


def _bars(found: AdapterSummary) -> Table:
    """One line per layer and one column per module; bars are relative to the largest norm."""
    kinds = list(found.modules)[:6]
    norms = [norm for layer in found.layers.values() for norm in layer.values()]
    largest = max((norm for norm in norms if math.isfinite(norm)), default=0.0) or 1.0

    def cell(norm: float | None) -> str:
        if norm is None:
            return ""
        return f"{'█' * round(8 * norm / largest) if math.isfinite(norm) else '?':<8} {norm:.3g}"

    shown = table("layer", *kinds, numbers=("layer",), title="Norm of the weight change, by layer")
    for column in shown.columns[1:]:
        column.no_wrap = True
    for layer, by_kind in sorted(found.layers.items()):
        shown.add_row("-" if layer < 0 else str(layer), *[cell(by_kind.get(kind)) for kind in kinds])
    if len(found.modules) > len(kinds):
        shown.caption = f"and {len(found.modules) - len(kinds)} more kinds of modules (--json lists them)"
    return shown


def _plain(found: AdapterSummary) -> dict[str, Any]:
    return {
        "adapter": found.name,
        "config": found.config.to_dict() if found.config else None,
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in found.files.items()},
        "parameters": found.parameters,
        "ranks": dict(found.ranks),
        "types": dict(found.types),
        "norms": {("" if layer < 0 else str(layer)): norms for layer, norms in found.layers.items()},
        "faults": found.faults,
    }
