"""`tunesmith plan`: memory and time of a training before it is started. Its flags are those of `train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from ..jobs.settings import Settings
from .output import console, table
from .setting_flags import give_signature, resolve_settings

if TYPE_CHECKING:
    from rich.table import Table

    from ..estimate.predict import Plan
    from ..jobs.sizing import Rows

HELP = """Predict the peak memory and time of a training run.

\b
Examples:
  tunesmith plan --data alpaca.json --method lora
  tunesmith plan recipe.yaml --batch-size 2
  tunesmith plan --base Llama-2-7B --method lora --max-length 1024 --budget 24GB --device cuda

No weights are downloaded or allocated. --base takes a folder, a config.json, a Hub id or a known name (see --models). If the
run does not fit in the budget, settings that do are proposed. Takes a recipe and the flags of `tunesmith train`.
"""


def plan(recipe: Path | None, budget: str | None, device: str | None, models: bool, **flags: Any) -> None:
    out = console(markup=False)
    if models:
        from ..estimate.skeleton import known_models

        out.print("\n".join(known_models()))
        return
    settings = Settings(**resolve_settings(recipe, flags))
    if device not in (None, "cpu", "cuda"):
        raise ConfigError(f'device "{device}" is unknown; use cpu or cuda')

    from ..jobs import quiet, sizing

    quiet.hush()
    limit = None if budget is None else sizing.bytes_of(budget)
    device = device or sizing.usual_device()
    rows, source = _rows(settings)
    found = sizing.plan_training(settings, rows, device)
    out.print(f"{settings.method} on {settings.base}; {source}; largest batch {found.tokens:,} tokens\n")
    out.print(_memory_table(settings, found, device))
    out.print(f"\n{_time_sentence(settings, found, rows, device)}")

    from ..estimate.machine import available_memory

    room = limit or available_memory(device)
    if room is None:
        return
    name = budget or f"the {room / 1e9:.1f} GB that are free now"
    if found.peak <= room:
        out.print(f"\nfits in {name}")
        return
    out.print(f"\ndoes not fit in {name}; trying smaller settings")
    other = sizing.fitting(settings, room, rows, device)
    if other is None:
        raise ConfigError(f"nothing fits in {name}: even a batch of one row needs more; use a smaller base")
    out.print(f"{other[1].peak / 1e9:.2f} GB with {sizing.flags(other[0], than=settings)}")


def _rows(settings: Settings) -> tuple[Rows, str]:
    """The data's rows, and what is known of them."""
    from ..assets import resolve as place
    from ..jobs.sizing import Rows

    if not settings.data:
        return Rows(1000), f"1,000 rows of {settings.room} tokens (assumed, as there is no --data)"
    from ..data.formats import good_examples

    found = good_examples(
        settings.data,
        text_column=settings.text_column,
        columns=settings.columns or None,
        format=settings.format,
        skip_bad_rows=settings.skip_bad_rows,
    )
    if not Path(place(settings.base)).is_dir():
        text = (
            f"{len(found.examples)} rows, counted as {settings.room} tokens each (the base's tokenizer is not on this machine)"
        )
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


def _memory_table(settings: Settings, found: Plan, device: str) -> Table:
    """The parts of the peak, in GB."""
    from ..estimate.skeleton import config_of
    from ..jobs.sizing import storage_of

    storage = storage_of(settings, config_of(settings.base), device)
    dtype = str(storage.dtype).removeprefix("torch.")
    form = dtype if storage.bits == 16 else f"{storage.bits} bits, computing in {dtype}"
    kept = "recomputed layer by layer" if settings.gradient_checkpointing else "kept for the backward pass"
    parts = {
        "program": (found.program, "Python, torch, transformers" if device == "cpu" else "CUDA context"),
        "base": (found.base, f"{found.total - found.trainable:,} parameters in {form}"),
        "adapter": (found.adapter, f"{found.trainable:,} trainable parameters"),
        "gradients": (found.gradients, "of the adapter alone"),
        "optimiser": (found.moments, "two moments per trainable parameter"),
        "activations": (found.activations, kept),
        "logits and temporaries": (found.working, "" if storage.bits == 16 else "including one dequantised weight"),
    }
    shown = table("GB", "what", "", numbers=("GB",))
    for what, (size, note) in parts.items():
        shown.add_row(f"{size / 1e9:.2f}", what, note)
    more = found.evaluation - found.activations - found.working
    if more > 0:
        shown.add_row(f"+{more / 1e9:.2f}", "evaluation", "needs more than a training step")
    where = "on this CPU" if device == "cpu" else "on a GPU; not yet compared with measurements there"
    shown.add_row(f"{found.peak / 1e9:.2f}", "peak", where)
    return shown


def _time_sentence(settings: Settings, found: Plan, rows: Rows, device: str) -> str:
    """How long the run takes here, or on another device at a stated speed."""
    from ..estimate.machine import bytes_per_second, products_per_second
    from ..estimate.skeleton import config_of
    from ..jobs.sizing import storage_of, usual_device

    if settings.max_steps > 0:
        tokens = settings.max_steps * found.tokens * settings.gradient_accumulation_steps
    else:
        tokens = int(rows.tokens(settings.room) * settings.num_train_epochs)
    work = found.flops * tokens / found.tokens
    if device != usual_device():
        return f"{work:.3g} operations in total: {_duration(work / 1e14)} at 100 TFLOP/s"
    rate = products_per_second(storage_of(settings, config_of(settings.base), device).dtype, device)
    seconds = (found.flops / rate + found.moved / bytes_per_second(device)) * tokens / found.tokens
    return f"about {_duration(seconds)} of training: {work:.3g} operations at {rate / 1e12:.2f} TFLOP/s (measured just now)"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


give_signature(
    plan,
    HELP,
    (
        "budget",
        None,
        Annotated[str | None, typer.Option(help="Memory limit, e.g. 24GB. [free memory]", show_default=False)],
    ),
    ("device", None, Annotated[str | None, typer.Option(help="cpu or cuda; default: this machine's.", show_default=False)]),
    ("models", False, Annotated[bool, typer.Option("--models", help="List the known models and exit.")]),
)
