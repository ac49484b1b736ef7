"""A run: a job with a folder of its own (`run_folder.py`), from a data file to a trained adapter and its report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, OutOfMemoryError
from .run_folder import RunFolder, file_hash
from .versions import version_of

if TYPE_CHECKING:
    from rich.console import Console

    from ..data.formats import Examples
    from ..data.templates import Piece, Template
    from .job import Result
    from .settings import Settings


def pieces_of(data: Examples, template: Template, tokenizer: Any, completion_only: bool) -> list[list[Piece]]:
    """Every example as text in pieces.

    Raises:
        DataError: all conversations at once that the template refuses.
    """
    rows, faults = written(data, template, tokenizer, completion_only)
    from ..data.files import raise_faults

    raise_faults(faults, data.total)
    return rows


def written(data: Examples, template: Template, tokenizer: Any, completion_only: bool) -> tuple[list[list[Piece]], list[str]]:
    """`(examples as text in pieces, faults)`."""
    from ..errors import DataError

    rows, faults = [], []
    for example in data.examples:
        try:
            rows.append(template.pieces(example, tokenizer, completion_only))
        except DataError as error:
            faults.append(str(error))
    return rows, faults


def from_values(values: dict[str, Any], resume: bool) -> Result:
    """Read the data, check the folder, and train; faults in either show before torch is imported.

    Raises:
        TunesmithError: see `start`.
    """
    from ..data.files import check_folder
    from ..data.formats import good_examples
    from .settings import Settings

    if not values.get("data"):
        raise ConfigError("no data; pass a file: --data prompts.csv, or `data: prompts.csv` in the recipe")
    folder = Path(values.get("output_dir", Settings.output_dir))
    given = {name: values.get(name) for name in ("text_column", "columns", "format")}
    data = good_examples(values["data"], **given, skip_bad_rows=bool(values.get("skip_bad_rows")))
    check_folder(folder)
    run = RunFolder.opened(folder, resume)

    from rich.console import Console

    from . import processes

    processes.connect()
    processes.wait()  # all have looked into the folder before one of them writes there
    console = Console(highlight=False, soft_wrap=True, quiet=not processes.is_main())
    if resume and run.resume_from is None:
        console.print(f"no checkpoint in {folder} yet; starting from the beginning")
    if data.faults:
        console.print(f"{len(data.faults)} of {data.total} rows skipped: they cannot be used")
    from . import quiet

    quiet.hush()
    return start(Settings(**values), data, run, console)


def start(settings: Settings, data: Examples, run: RunFolder, console: Console) -> Result:
    """Train, evaluate and save one run.

    Raises:
        TunesmithError: see `job.train`.
    """
    from ..auto import load_tokenizer
    from ..data.templates import chosen
    from . import job, processes
    from .progress import JobConsole
    from .sizing import needs_checkpointing

    data_hash = file_hash(data.path)
    if run.resume_from is not None:
        run.check_same(settings, data_hash)
    tokenizer = load_tokenizer(settings.base)
    template = chosen(settings.template, data.format, tokenizer)
    rows: Sequence[Any] = pieces_of(data, template, tokenizer, settings.completion_only_loss)
    model, form = _load(settings)
    console.print(
        f"{len(rows)} rows from {data.path}: {data.format}, template {template.name}; method {settings.method}; "
        f"base {settings.base} in {form}"
    )
    settings.check_room()
    if run.resume_from is not None:
        console.print(f"resumed from {run.resume_from}")
    trained_with = settings
    if settings.gradient_checkpointing is None and needs_checkpointing(settings, model):
        console.print(
            "gradient checkpointing enabled: activations would not fit in memory (--no-gradient-checkpointing to keep them)"
        )
        trained_with = dataclasses.replace(settings, gradient_checkpointing=True)
    with run.removed_if_unused():
        if processes.is_main():
            run.write_records(settings, data_hash)
        with _memory_explained(settings):
            result = job.train(model, tokenizer, rows, trained_with, JobConsole(settings.method, console), run)
    if processes.is_main():
        _save(run, settings, result, tokenizer, template, console)
    processes.wait()
    return result


def _load(settings: Settings) -> tuple[Any, str]:
    """`(the base, how it computes and is stored, in words)`."""
    from ..auto import load_base
    from ..bases.loading import stored_in
    from ..bases.precision import dtype_named
    from .devices import to_accelerator

    dtype = dtype_named(settings.dtype)
    stored = stored_in(settings.bits, dtype, settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant)
    with _memory_explained(settings):
        model = to_accelerator(load_base(settings.base, dtype="auto" if dtype is None else dtype, **stored))
    form = str(model.dtype).removeprefix("torch.") + (f", stored in {settings.bits} bits" if stored else "")
    if settings.dtype == "auto" and dtype:
        form += ", the fastest type on this machine (--dtype float32 for full precision)"
    return model, form


def _save(run: RunFolder, settings: Settings, result: Result, tokenizer: Any, template: Template, console: Console) -> None:
    """Write the adapter, the last record and the report; print the outcome."""
    from . import job
    from .callbacks import RecordMetrics

    folder = run.path
    template.save(folder)
    size = job.save(result, tokenizer, folder)
    before, after = result.held_out_before, result.held_out_after
    RecordMetrics(folder).write(held_out_loss_before=before, held_out_loss_after=after, seconds=round(result.seconds, 3))
    if result.note:
        console.print(result.note)
    page = _report(folder, settings, result, tokenizer, template.name)
    trainable, total = result.handle.get_nb_trainable_parameters()
    console.print(f"trained {trainable:,} of {total:,} parameters; {result.sentence()}")
    if before is not None and (after or 0.0) > before:
        console.print(
            "warning: on held-out rows the adapter does worse than the bare base; try a lower --learning-rate or more rows"
        )
    console.print(f"adapter: {folder} ({size / 1024:.1f} KB of tensors)")
    console.print(f"report: {page}")
    console.print(f'use it: tunesmith generate --adapter {folder} --prompt "..."')


def _report(folder: Path, settings: Settings, result: Result, tokenizer: Any, template: str) -> Path:
    """Write the page of a finished run."""
    from . import report
    from .callbacks import METRICS_FILE, read_metrics
    from .recipe import as_yaml
    from .samples import answered

    trainable, total = result.handle.get_nb_trainable_parameters()
    peak = max((record.get("peak_memory_mb", 0.0) for record in read_metrics(folder / METRICS_FILE)), default=0.0)
    base = result.handle.bare_base
    facts = {
        "base": f"{settings.base}, {total - trainable:,} parameters in {str(base.dtype).removeprefix('torch.')}",
        "method": f"{settings.method}, {trainable:,} trained parameters",
        "data": f"{settings.data}: {result.rows} rows, {len(result.held_out)} of them held out; template {template}",
        "time": f"{result.seconds:.0f} s, {result.tokens / max(result.seconds, 1e-9):,.0f} tokens/s",
        "peak memory": f"{peak:,.0f} MB",
        "versions": ", ".join(f"{name} {version_of(name)}" for name in ("tunesmith", "transformers")),
    }
    samples = answered(result.handle, tokenizer, result.held_out[: settings.samples])
    note = f" ({result.note})" if result.note else ""
    return report.write(
        folder,
        report.Facts(f"{settings.method} on {settings.base}", result.sentence() + note, facts, as_yaml(settings), samples),
    )


@contextmanager
def _memory_explained(settings: Settings) -> Iterator[None]:
    """Turns lack of memory into an error that says what to change."""
    import torch

    try:
        yield
        return
    except (torch.OutOfMemoryError, MemoryError) as error:
        reason = f"out of memory ({str(error).partition('. ')[0]})"
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch's words for the CPU
            raise
        reason = "out of memory"
    from .sizing import advice

    raise OutOfMemoryError(f"{reason}; {advice(settings)}")  # outside `except`: what failed has released its memory
