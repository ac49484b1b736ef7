"""One training job: rows to an adapter, measured on rows that it was not trained on."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainingArguments

from ..data.encode import Encoded, encode
from ..data.packing import PackedCollator
from ..data.templates import Piece
from ..data.text import PadRight, mean_loss, pad_id_of, perplexity, split
from ..errors import DataError, DivergedError, InterruptedRun
from ..model import PeftModel, get_peft_model
from ..train.batching import BucketTrainer, batching
from ..train.trainer import Trainer
from . import processes
from .callbacks import RecordMetrics, StopOnSignal
from .checkpoints import WholeCheckpoints
from .divergence import StopsWhenDiverging
from .held_out import MeasureHeldOut
from .progress import JobConsole, ShowProgress
from .run_folder import RunFolder
from .settings import Settings as Settings
from .settings import method_names as method_names

Rows = Sequence[str | Sequence[Piece]]  # texts, or texts in pieces of which only some are trained


@dataclass
class Result:
    """A trained handle and what was measured on the way; losses are nats per token."""

    handle: PeftModel
    held_out: list[dict[str, list[int]]]
    held_out_before: float | None
    held_out_after: float | None
    losses: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    rows: int = 0
    tokens: int = 0
    note: str | None = None

    def sentence(self) -> str:
        """The outcome in one line, as perplexities."""
        speed = f"{self.seconds:.0f} s, {self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s"
        if self.held_out_before is None or self.held_out_after is None:
            return speed
        before, after = perplexity(self.held_out_before), perplexity(self.held_out_after)
        return f"held-out perplexity {before:.1f} -> {after:.1f} on {len(self.held_out)} rows ({speed})"


def train(
    base: nn.Module, tokenizer: Any, rows: Rows, settings: Settings, output: JobConsole, run: RunFolder | None = None
) -> Result:
    """Train one adapter on `rows`; the base is not changed, so any number of jobs share it.

    Args:
        run: where checkpoints and records are written, and the checkpoint to resume from; without it none are written.

    Raises:
        DataError: too few rows.
        ConfigError, TargetError: the method does not fit the base.
        InterruptedRun: a signal came; a checkpoint is in `run`.
        DivergedError: the loss was not finite or ran away; the last good adapter is in `run`.
    """
    job = prepare(base, tokenizer, rows, settings, output)
    return measure(job, fit(job, output, run))


@dataclass(frozen=True)
class Job:
    """A new adapter, and what it is to be trained and measured on."""

    settings: Settings
    handle: PeftModel
    rows: int
    data: Encoded
    held_out: list[dict[str, list[int]]]
    pad_id: int
    batches: tuple[type[Trainer], PackedCollator | PadRight]
    before: float | None


def prepare(base: nn.Module, tokenizer: Any, rows: Rows, settings: Settings, output: JobConsole) -> Job:
    """Encode the rows, make the adapter, and measure the bare base."""
    data, held_out = _encoded(rows, tokenizer, settings, output)
    torch.manual_seed(settings.seed)
    peft_config = settings.peft_config(getattr(base, "name_or_path", ""), settings.steps(len(data.examples)))
    handle, pad_id = get_peft_model(base, peft_config), pad_id_of(tokenizer)
    batches = batching(handle, settings.packing, pad_id)
    before = mean_loss(base, held_out.examples, pad_id) if held_out.examples else None
    return Job(settings, handle, len(rows), data, held_out.examples, pad_id, batches, before)


@dataclass(frozen=True)
class Fitted:
    """How a training run went."""

    progress: ShowProgress
    held_out: MeasureHeldOut | None
    seconds: float
    step: int
    steps: int


def fit(job: Job, output: JobConsole, run: RunFolder | None) -> Fitted:
    """Train a job's adapter.

    Raises:
        InterruptedRun, DivergedError: see `train`.
    """
    progress, signals, held_out = ShowProgress(output, job.data.tokens), StopOnSignal(), None
    callbacks: list[Any] = [progress]
    if run is not None:
        callbacks += [signals, record := RecordMetrics(run.path)]
        if job.held_out and job.settings.eval_strategy != "no":
            callbacks.append(held_out := MeasureHeldOut(job.handle, job.held_out, job.pad_id, job.settings, record))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(job, run, Path(scratch), callbacks)
        started = time.monotonic()
        try:
            if run is None:
                trainer.train()
            else:
                with signals:
                    trainer.train(resume_from_checkpoint=None if run.resume_from is None else str(run.resume_from))
        except DivergedError as error:
            raise _kept(error, job.handle, run) from error
        finally:
            progress.close()
        seconds = time.monotonic() - started
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if run is not None and signals.received and step < steps and not (held_out and held_out.stopped):
        raise InterruptedRun(f"interrupted at step {step} of {steps}; checkpoint saved. Resume with: {run.resume_command}")
    return Fitted(progress, held_out, seconds, step, steps)


def measure(job: Job, fitted: Fitted) -> Result:
    """Take the best adapter where that was asked for, and measure it on the held-out rows."""
    held_out, notes = fitted.held_out, []
    if held_out and held_out.stopped:
        patience = job.settings.early_stopping_patience
        notes.append(f"stopped early at step {fitted.step} of {fitted.steps}: no improvement in {patience} evaluations")
    if held_out and (best := held_out.take_best()):
        notes.append(best)
    job.handle.eval()
    after = held_out.known(fitted.step) if held_out else None
    if after is None and job.held_out:
        after = mean_loss(job.handle, job.held_out, job.pad_id)
    progress = fitted.progress
    return Result(
        job.handle,
        job.held_out,
        job.before,
        after,
        losses=progress.losses,
        seconds=fitted.seconds,
        rows=job.rows,
        tokens=progress.tokens_done,
        note="; ".join(notes) or None,
    )


class RunTrainer(StopsWhenDiverging, WholeCheckpoints, Trainer):
    """The Trainer of a run with a folder: ends when the loss diverges, and writes atomic checkpoints."""


class BucketRunTrainer(StopsWhenDiverging, WholeCheckpoints, BucketTrainer):
    """The same, with batches of similar lengths."""


OF_RUNS: dict[type[Trainer], Any] = {Trainer: RunTrainer, BucketTrainer: BucketRunTrainer}


def _trainer(job: Job, run: RunFolder | None, scratch: Path, callbacks: list[Any]) -> Trainer:
    """The Trainer of a job; without a run it writes nothing, but needs a folder all the same."""
    kind, collator = job.batches
    trainer: Any = (kind if run is None else OF_RUNS[kind])(
        model=job.handle,
        args=_arguments(job, scratch if run is None else run.path, keeps=run is not None),
        train_dataset=job.data.examples,
        data_collator=collator,
        callbacks=callbacks,
    )
    if run is not None:
        trainer.keep = job.settings.save_total_limit
    trainer.remove_callback(PrinterCallback)
    return trainer  # type: ignore[no-any-return]


def _arguments(job: Job, folder: Path, keeps: bool) -> TrainingArguments:
    """A job's settings as a Trainer wants them; `keeps` is whether checkpoints and records are written."""
    settings, steps = job.settings, job.settings.steps(len(job.data.examples))
    return TrainingArguments(
        output_dir=str(folder),
        save_strategy="steps" if keeps else "no",
        save_steps=settings.save_steps,
        num_train_epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        gradient_checkpointing=bool(settings.gradient_checkpointing),
        optim=settings.optim,
        learning_rate=settings.rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=settings.warmup(steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=settings.logging_steps or max(1, steps // 30),
        logging_nan_inf_filter=False,
        seed=settings.seed,
        data_seed=settings.seed,
        report_to=settings.reporters if keeps else [],
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),  # or the processes of a run on CPUs would not find each other
    )


def _encoded(rows: Rows, tokenizer: Any, settings: Settings, output: JobConsole) -> tuple[Encoded, Encoded]:
    """The rows to train on and those held out, as token ids; prints how many were truncated or skipped."""
    pieces = [[Piece(row, True)] if isinstance(row, str) else row for row in rows]
    train_rows, held_out_rows = split(pieces, settings.held_out, settings.seed)
    if not train_rows:
        raise DataError(f"{len(rows)} row(s) leave nothing to train on; add rows or set --held-out 0")
    room = settings.room
    data, held_out = encode(train_rows, tokenizer, room), encode(held_out_rows, tokenizer, room)
    if data.cut or held_out.cut:
        output.print(f"{data.cut + held_out.cut} of {len(rows)} rows truncated to {room} tokens (--max-length)")
    if data.empty or held_out.empty:
        skipped = data.empty + held_out.empty
        output.print(f"{skipped} of {len(rows)} rows skipped: no trained tokens in their first {room}")
    if not data.examples:
        raise DataError(f"no row has a trained token among its first {room}; raise --max-length")
    return data, held_out


def _kept(error: DivergedError, handle: PeftModel, run: RunFolder | None) -> DivergedError:
    """The error with advice, once the last good adapter is saved."""
    advice = "try a lower --learning-rate"
    if run is None or error.good_step is None:
        return DivergedError(f"{error}; {advice}")
    folder = run.path / "last-good"
    handle.save_pretrained(str(folder), is_main_process=processes.is_main())
    return DivergedError(f"{error}; the adapter as of step {error.good_step} is in {folder}; {advice}")


def save(result: Result, tokenizer: Any, folder: Path) -> int:
    """Write the adapter and its tokenizer; returns the size of the adapter's tensors in bytes."""
    result.handle.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return (folder / "adapter_model.safetensors").stat().st_size
