"""A run: a job with a folder of its own, which says how it was made and can be gone on with.

recipe.resolved.yaml     every setting
environment.json         versions, machine, and the data's hash
metrics.jsonl            every record of the training
report.html              the run as a page: curves, samples before and after, recipe
best/                    the adapter that was best on the held-out rows, where that was asked for
checkpoint-N/            adapter, optimizer, schedule, random states
adapter_config.json, adapter_model.safetensors, tunesmith_template.json, tokenizer files: what came of it
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, OutOfMemoryError, bullet_list
from .recipe import RECIPE_FILE

if TYPE_CHECKING:
    from rich.console import Console

    from ..data.formats import Examples
    from ..data.templates import Piece, Template
    from .job import Result
    from .settings import Settings

ENVIRONMENT_FILE = "environment.json"
# These may change when a run is gone on with: they do not change what is computed.
FREE = {"output_dir", "data", "save_steps", "save_total_limit", "logging_steps", "samples", "report_to"}


def check_resume(folder: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from; None starts at the beginning.

    Raises:
        ConfigError: the folder holds another run's checkpoints.
    """
    from .checkpoints import checkpoints

    found = checkpoints(folder)
    if found and not resume:
        raise ConfigError(f"{folder} holds checkpoints of another run; go on with it (--resume), or give another --output-dir")
    return found[-1] if found else None


def check_same(folder: Path, settings: Settings, data_hash: str) -> None:
    """A run is gone on with under its own settings and data, or its result would be nobody's.

    Raises:
        ConfigError: names every setting that differs.
    """
    from .recipe import as_yaml, read_recipe

    recipe = folder / RECIPE_FILE
    if not recipe.is_file():
        raise ConfigError(f"{folder} holds checkpoints but no {RECIPE_FILE}; give another --output-dir")
    import yaml

    there, here = read_recipe(recipe), yaml.safe_load(as_yaml(settings))
    names = [name for name in here if name not in FREE and there.get(name) != here[name]]
    faults = [f"{name}: {there.get(name)!r} there, {here[name]!r} now" for name in names]
    try:
        recorded = json.loads((folder / ENVIRONMENT_FILE).read_text(encoding="utf-8")).get("data_sha256")
    except (OSError, ValueError):
        recorded = None
    if recorded is not None and recorded != data_hash:
        faults.append("the data file has changed")
    if faults:
        raise ConfigError(
            f"the run in {folder} was made with other settings; leave them as they were, or give another --output-dir:\n"
            + bullet_list(faults)
        )


def file_hash(path: str | Path) -> str:
    """The SHA-256 of a file; of a name on the hub, of the name."""
    file = Path(path)
    return hashlib.sha256(file.read_bytes() if file.is_file() else str(path).encode()).hexdigest()


def environment(settings: Settings, data_hash: str) -> dict[str, Any]:
    """What a result depends on beside its recipe."""
    import torch

    names = ("tunesmith", "torch", "transformers", "accelerate", "safetensors", "tokenizers")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "versions": versions,
        "machine": f"{platform.system()} {platform.machine()}",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "command": sys.argv,
        "data": settings.data,
        "data_sha256": data_hash,
    }


def write_records(folder: Path, settings: Settings, data_hash: str) -> None:
    """Write the recipe and the environment, both or neither."""
    from ..storage.folder import write_folder, write_text
    from .recipe import as_yaml

    texts = {
        RECIPE_FILE: as_yaml(settings),
        ENVIRONMENT_FILE: json.dumps(environment(settings, data_hash), indent=2) + "\n",
    }
    write_folder(folder, {name: partial(write_text, text) for name, text in texts.items()})


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
    """Read the data, look at the folder, and train; what is wrong with either shows before torch is imported.

    Raises:
        TunesmithError: see `start`.
    """
    from ..data.files import check_folder
    from ..data.formats import good_examples
    from .settings import Settings

    if not values.get("data"):
        raise ConfigError("no data; give a file: --data prompts.csv, or `data: prompts.csv` in the recipe")
    folder = Path(values.get("output_dir", Settings.output_dir))
    given = {name: values.get(name) for name in ("text_column", "columns", "format")}
    data = good_examples(values["data"], **given, skip_bad_rows=bool(values.get("skip_bad_rows")))
    check_folder(folder)
    checkpoint = check_resume(folder, resume)

    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if resume and checkpoint is None:
        console.print(f"{folder} holds no checkpoint yet; starting at the beginning")
    if data.faults:
        console.print(f"{len(data.faults)} of {data.total} rows are left out: they cannot be used")
    from . import quiet

    quiet.hush()
    return start(Settings(**values), data, checkpoint, console)


def start(settings: Settings, data: Examples, resume_from: Path | None, console: Console) -> Result:
    """Train, evaluate and save one run into `settings.output_dir`.

    Raises:
        TunesmithError: see `job.train`.
    """
    from ..auto import load_base, load_tokenizer
    from ..bases.loading import stored_in
    from ..bases.precision import dtype_named
    from ..data.templates import chosen
    from . import job
    from .callbacks import RecordMetrics
    from .devices import to_accelerator
    from .fit import needs_checkpointing

    folder, data_hash = Path(settings.output_dir), file_hash(data.path)
    if resume_from is not None:
        check_same(folder, settings, data_hash)
    tokenizer = load_tokenizer(settings.base)
    template = chosen(settings.template, data.format, tokenizer)
    rows: Sequence[Any] = pieces_of(data, template, tokenizer, settings.completion_only_loss)
    dtype = dtype_named(settings.dtype)
    stored = stored_in(settings.bits, dtype, settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant)
    with _memory_explained(settings):
        model = to_accelerator(load_base(settings.base, dtype="auto" if dtype is None else dtype, **stored))
    computes = str(model.dtype).removeprefix("torch.") + (f", stored in {settings.bits} bits" if stored else "")
    note = ", which this machine multiplies fastest (--dtype float32 for full precision)"
    console.print(
        f"{len(rows)} rows from {data.path}: {data.format}, template {template.name}; method {settings.method}; "
        f"base {settings.base} in {computes}{note if settings.dtype == 'auto' and dtype else ''}"
    )
    if resume_from is not None:
        console.print(f"going on from {resume_from}")
    else:
        settings.room  # noqa: B018  (its fault shows before anything is written)
    doing = settings
    if settings.gradient_checkpointing is None and needs_checkpointing(settings, model):
        console.print(
            "activations are computed twice, because they do not fit into memory (--no-gradient-checkpointing keeps them)"
        )
        doing = dataclasses.replace(settings, gradient_checkpointing=True)
    existed = folder.exists()
    write_records(folder, settings, data_hash)
    try:
        with _memory_explained(settings):
            result = job.train(
                model, tokenizer, rows, doing, title=settings.method, console=console, run=folder, resume_from=resume_from
            )
    except Exception:
        _remove_if_empty(folder, existed)
        raise
    template.save(folder)
    size = job.save(result, tokenizer, folder)
    RecordMetrics(folder).write(
        held_out_loss_before=result.held_out_before, held_out_loss_after=result.held_out_after, seconds=round(result.seconds, 3)
    )
    trainable, total = result.handle.get_nb_trainable_parameters()
    if result.note:
        console.print(result.note)
    page = _report(folder, settings, result, tokenizer, len(rows), template.name)
    console.print(f"trained {trainable:,} of {total:,} parameters; {result.sentence()}")
    if result.held_out_before is not None and (result.held_out_after or 0.0) > result.held_out_before:
        console.print(
            "warning: on held-out rows the adapter is worse than the bare base; try a lower --learning-rate or more rows"
        )
    console.print(f"adapter: {folder} ({size / 1024:.1f} KB of tensors)")
    console.print(f"report: {page}")
    console.print(f'use it: tunesmith generate --adapter {folder} --prompt "..."')
    return result


def _report(folder: Path, settings: Settings, result: Result, tokenizer: Any, rows: int, template: str) -> Path:
    """Write the page of a finished run."""
    import transformers

    from . import report
    from .callbacks import METRICS_FILE, read_metrics
    from .recipe import as_yaml
    from .samples import answered

    trainable, total = result.handle.get_nb_trainable_parameters()
    peak = max((record.get("peak_memory_mb", 0.0) for record in read_metrics(folder / METRICS_FILE)), default=0.0)
    base = result.handle.base_model
    facts = {
        "base": f"{settings.base}, {total - trainable:,} parameters in {str(base.dtype).removeprefix('torch.')}",
        "method": f"{settings.method}, {trainable:,} trained values",
        "data": f"{settings.data}: {rows} rows, {len(result.held_out)} of them held out; template {template}",
        "time": f"{result.seconds:.0f} s, {result.tokens / max(result.seconds, 1e-9):,.0f} tokens/s",
        "peak memory": f"{peak:,.0f} MB",
        "versions": f"tunesmith {metadata.version('tunesmith')}, transformers {transformers.__version__}",
    }
    samples = answered(result.handle, tokenizer, result.held_out[: settings.samples])
    note = f" ({result.note})" if result.note else ""
    return report.write(
        folder,
        report.Facts(f"{settings.method} on {settings.base}", result.sentence() + note, facts, as_yaml(settings), samples),
    )


@contextmanager
def _memory_explained(settings: Settings) -> Iterator[None]:
    """Memory that does not suffice, as an error that says what to change."""
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
    from .fit import advice

    raise OutOfMemoryError(f"{reason}; {advice(settings)}")  # out of `except`: what failed holds memory no longer


def _remove_if_empty(folder: Path, existed: bool) -> None:
    """After a mistake that was found before the first step: leave no trace of a folder that was not there."""
    if existed or any(path.name not in (RECIPE_FILE, ENVIRONMENT_FILE) for path in folder.iterdir()):
        return
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
