"""One training job: a text file to an adapter, measured on rows it has not seen."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import nn

from ..data.encode import Encoded, encode
from ..data.templates import Piece
from ..data.text import mean_loss, pad_id_of, perplexity, split
from ..errors import DataError, DivergedError, InterruptedRun
from ..model import PeftModel, get_peft_model
from ..train.batching import batching
from .settings import Settings as Settings
from .settings import method_names as method_names

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass
class Result:
    """A trained handle and what was measured on the way; losses are nats per token."""

    handle: PeftModel
    held_out: list[dict[str, list[int]]]
    held_out_before: float | None
    held_out_after: float | None
    losses: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
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
    base: nn.Module,
    tokenizer: Any,
    rows: Sequence[str | Sequence[Piece]],
    settings: Settings,
    title: str,
    console: Console,
    run: Path | None = None,
    resume_from: Path | None = None,
) -> Result:
    """Train one adapter on `rows`; the base is not changed, so any number of jobs share it.

    Args:
        rows: texts, or texts in pieces of which only some are trained.
        run: a folder for checkpoints and records; none are kept without.
        resume_from: the checkpoint to go on from.

    Raises:
        DataError: too few rows.
        ConfigError, TargetError: the method does not fit the base.
        InterruptedRun: a signal came; a checkpoint is in `run`.
        DivergedError: the loss was no number or ran away; the last good adapter is in `run`.
    """
    import torch
    from transformers import PrinterCallback

    from .callbacks import RecordMetrics, StopOnSignal, StopsWhenDiverging
    from .checkpoints import WholeCheckpoints
    from .held_out import MeasureHeldOut
    from .progress import ShowProgress

    data, held_out = _encoded(rows, tokenizer, settings, title, console)
    torch.manual_seed(settings.seed)
    name = getattr(base, "name_or_path", "")
    steps = settings.steps(len(data.examples))
    handle = get_peft_model(base, settings.peft_config(name, steps))
    pad_id = pad_id_of(tokenizer)
    trainer_type, collator = batching(handle, settings.packing, pad_id)
    before = mean_loss(base, held_out.examples, pad_id) if held_out.examples else None
    progress, signals = ShowProgress(title, console, data.tokens), StopOnSignal()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = _arguments(settings, steps, scratch if run is None else str(run), keeps=run is not None)
        if run is not None:
            watched: Any = (StopsWhenDiverging, WholeCheckpoints, trainer_type)
            trainer_type = type("RunTrainer", watched, {"keep": settings.save_total_limit})
        callbacks: list[Any] = [progress]
        measure = None
        if run is not None:
            callbacks += [signals, record := RecordMetrics(run)]
            if held_out.examples and settings.eval_strategy != "no":
                callbacks.append(measure := MeasureHeldOut(handle, held_out.examples, pad_id, settings, record))
        trainer = trainer_type(
            model=handle, args=arguments, train_dataset=data.examples, data_collator=collator, callbacks=callbacks
        )
        trainer.remove_callback(PrinterCallback)
        started = time.monotonic()
        try:
            if run is None:
                trainer.train()
            else:
                with signals:
                    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        except DivergedError as error:
            raise _kept(error, handle, run) from error
        finally:
            progress.close()
        seconds = time.monotonic() - started
        step, of = trainer.state.global_step, trainer.state.max_steps
        if signals.received and step < of and not (measure and measure.stopped):
            raise InterruptedRun(
                f"interrupted at step {step} of {of}; a checkpoint is saved, go on: tunesmith train --resume --output-dir {run}"
            )
    note = measure.take_best() if measure else None
    if measure and measure.stopped:
        note = f"ended at step {step} of {of}, after {settings.early_stopping_patience} measurements without a better one" + (
            f"; {note}" if note else ""
        )
    handle.eval()
    after = measure.known(step) if measure else None
    if after is None and held_out.examples:
        after = mean_loss(handle, held_out.examples, pad_id)
    return Result(handle, held_out.examples, before, after, progress.losses, seconds, progress.tokens_done, note)


def _encoded(
    rows: Sequence[str | Sequence[Piece]], tokenizer: Any, settings: Settings, title: str, console: Console
) -> tuple[Encoded, Encoded]:
    """The rows to train on and those held out, as token ids; says what was cut or left out."""
    pieces = [[Piece(row, True)] if isinstance(row, str) else row for row in rows]
    train_rows, held_out_rows = split(pieces, settings.held_out, settings.seed)
    if not train_rows:
        raise DataError(f"{len(rows)} row(s) leave nothing to train on; add rows or set --held-out 0")
    room = settings.room
    data, held_out = encode(train_rows, tokenizer, room), encode(held_out_rows, tokenizer, room)
    if data.cut or held_out.cut:
        console.print(f"{title}: {data.cut + held_out.cut} of {len(rows)} rows cut to {room} tokens (--max-length)")
    if data.empty or held_out.empty:
        left_out = data.empty + held_out.empty
        console.print(f"{title}: {left_out} of {len(rows)} rows left out: within {room} tokens nothing of them is trained")
    if not data.examples:
        raise DataError(f"no row has anything to train within {room} tokens; raise --max-length")
    return data, held_out


def _arguments(settings: Settings, steps: int, folder: str, keeps: bool) -> TrainingArguments:
    """A job's settings as a Trainer wants them; `keeps` is whether checkpoints and records are written."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=folder,
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
    )


def _kept(error: DivergedError, handle: PeftModel, run: Path | None) -> DivergedError:
    """The error with what to do, once the last good adapter is written."""
    advice = "try a lower --learning-rate"
    if run is None or error.good_step is None:
        return DivergedError(f"{error}; {advice}")
    handle.save_pretrained(str(run / "last-good"))
    return DivergedError(f"{error}; the adapter as of step {error.good_step} is in {run / 'last-good'}; {advice}")


def save(result: Result, tokenizer: Any, folder: Path) -> int:
    """Write the adapter and its tokenizer; returns the size of the adapter's tensors in bytes."""
    result.handle.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return (folder / "adapter_model.safetensors").stat().st_size
