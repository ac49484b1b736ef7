"""`tunesmith plan`: memory and time of a training before it is started. Its flags are those of `train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..jobs.recipe import resolve
from ..jobs.settings import Settings
from .train import give_signature

if TYPE_CHECKING:
    from rich.console import Console

    from ..estimate.predict import Plan
    from ..jobs.fit import Rows

HELP = """Predict a training's peak memory and time: nothing is downloaded, no weights are made.

\b
Examples:
  tunesmith plan --data alpaca.json --method lora
  tunesmith plan recipe.yaml --batch-size 2
  tunesmith plan --base Llama-2-7B --method lora --max-length 1024 --budget 24GB --device cuda

The base: a folder, a config.json, a hub id, or a name that is known (--models lists them).
With a budget, settings are proposed that fit into it. Takes a recipe and the flags of train.
"""


def plan(recipe: Path | None, budget: str | None, device: str | None, models: bool, **given: Any) -> None:
    from rich.console import Console

    from ..errors import ConfigError

    console = Console(highlight=False, soft_wrap=True, markup=False)
    if models:
        from ..estimate.skeleton import known_models

        console.print("\n".join(known_models()))
        return
    resolved = resolve(recipe, os.environ, {name: value for name, value in given.items() if value not in (None, [])})
    for warning in resolved.warnings:
        typer.secho(f"warning: {warning}", fg="yellow", err=True)
    from ..jobs import quiet

    quiet.hush()
    settings = Settings(**resolved.values)
    if device not in (None, "cpu", "cuda"):
        raise ConfigError(f'device "{device}" is unknown; use cpu or cuda')

    from ..estimate.machine import memory
    from ..jobs import fit

    most = None if budget is None else fit.bytes_of(budget)
    device = device or fit.usual_device()
    rows, source = _rows(settings)
    found = fit.plan_training(settings, rows, device)
    _show(console, settings, found, rows, source, device)
    room = most or memory(device)
    if room is None:
        return
    name = budget if budget else f"{room / 1e9:.1f} GB, which are free now"
    if found.peak <= room:
        console.print(f"\nfits into {name}")
        return
    console.print(f"\ndoes not fit into {name}; trying smaller settings")
    other = fit.fitting(settings, room, rows, device)
    if other is None:
        raise ConfigError(f"nothing fits into {name}: even one row of the base needs more; take a smaller base")
    console.print(f"{other[1].peak / 1e9:.2f} GB with {fit.flags(other[0], than=settings)}")


def _rows(settings: Settings) -> tuple[Rows, str]:
    """The data's rows, and what is known of them."""
    from ..assets import resolve as place
    from ..jobs.fit import Rows

    if not settings.data:
        return Rows(1000), f"1,000 rows of {settings.room} tokens (no --data)"
    from ..data.formats import good_examples

    found = good_examples(
        settings.data,
        text_column=settings.text_column,
        columns=settings.columns or None,
        format=settings.format,
        skip_bad_rows=settings.skip_bad_rows,
    )
    if not Path(place(settings.base)).is_dir():
        text = f"{len(found.examples)} rows, counted as {settings.room} tokens each (no tokenizer without its files)"
        return Rows(len(found.examples)), text
    from ..auto import load_tokenizer
    from ..data.encode import encode
    from ..data.templates import chosen
    from ..jobs.run import pieces_of

    tokenizer = load_tokenizer(settings.base)
    template = chosen(settings.template, found.format, tokenizer)
    encoded = encode(pieces_of(found, template, tokenizer, settings.completion_only_loss), tokenizer, settings.room)
    longest = max((len(example["input_ids"]) for example in encoded.examples), default=0)
    return Rows(len(encoded.examples), encoded.examples), (
        f"{len(encoded.examples)} rows of up to {longest} tokens, template {template.name}"
    )


def _show(console: Console, settings: Settings, found: Plan, rows: Rows, source: str, device: str) -> None:
    from rich.table import Table

    from ..estimate.skeleton import config_of
    from ..jobs.fit import storage_of, usual_device

    storage = storage_of(settings, config_of(settings.base), device)
    dtype = str(storage.dtype).removeprefix("torch.")
    form = dtype if storage.bits == 16 else f"{storage.bits} bits, computing in {dtype}"
    console.print(f"{settings.method} on {settings.base}; {source}; largest batch {found.tokens:,} tokens\n")
    table = Table(box=None, pad_edge=False)
    for column in ("GB", "what", ""):
        table.add_column(column, justify="right" if column == "GB" else "left")
    kept = "recomputed layer by layer" if settings.gradient_checkpointing else "kept for the backward pass"
    lines = {
        "program": (found.program, "Python, torch, transformers" if device == "cpu" else "CUDA's context"),
        "base": (found.base, f"{found.total - found.trainable:,} parameters in {form}"),
        "adapter": (found.adapter, f"{found.trainable:,} trained values"),
        "gradients": (found.gradients, "of the adapter alone"),
        "optimiser": (found.moments, "two moments of each trained value"),
        "activations": (found.activations, kept),
        "logits, passing values": (found.working, "" if storage.bits == 16 else "one decoded weight among them"),
    }
    for what, (size, note) in lines.items():
        table.add_row(f"{size / 1e9:.2f}", what, note)
    more = found.evaluation - found.activations - found.working
    if more > 0:
        table.add_row(f"+{more / 1e9:.2f}", "evaluation", "takes more than a step")
    where = "on this CPU" if device == "cpu" else "on a GPU, where it was not compared with measurements"
    table.add_row(f"{found.peak / 1e9:.2f}", "peak", where)
    console.print(table)
    if settings.max_steps > 0:
        tokens = settings.max_steps * found.tokens * settings.gradient_accumulation_steps
    else:
        tokens = int(rows.tokens(settings.room) * settings.num_train_epochs)
    work = found.flops * tokens / found.tokens
    if device != usual_device():
        console.print(f"\n{work:.3g} operations in all: {_time(work / 1e14)} where 100 TFLOP/s are in use")
        return
    from ..estimate.machine import bytes_per_second, products_per_second

    rate = products_per_second(storage.dtype, device)
    seconds = (found.flops / rate + found.moved / bytes_per_second(device)) * tokens / found.tokens
    measured = f"at {rate / 1e12:.2f} TFLOP/s, as measured just now"
    console.print(f"\nabout {_time(seconds)} of training: {work:.3g} operations {measured}")


def _time(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


give_signature(
    plan,
    HELP,
    ("budget", None, Annotated[str | None, typer.Option(help="Propose settings that fit, e.g. 24GB.", show_default=False)]),
    ("device", None, Annotated[str | None, typer.Option(help="cpu or cuda; default: this machine's.", show_default=False)]),
    ("models", False, Annotated[bool, typer.Option("--models", help="List the models known by name, and stop.")]),
)
