"""transformers' Trainer for handles: checkpoints hold adapters, and adapters are what is resumed and reloaded.

The plain `transformers.Trainer` trains, evaluates and saves a handle rightly, too; resuming and reloading the best
checkpoint want full weights there, so they need this one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.utils import logging

from ..bases.precision import slower_than_need_be
from ..bases.quantised import quantised_views
from ..errors import AdapterFileError
from ..model import PeftModel
from ..storage.folder import CONFIG_FILE
from .fused_loss import LiveLoss
from .heap import leave_no_gaps
from .named_optimizers import usable_optimizer

logger = logging.get_logger(__name__)


class AdapterTrainerMixin:
    """Put before any Trainer class: `class MyTrainer(AdapterTrainerMixin, SomeTrainer)`.

    Models that are no handles are treated as that class treats them.
    """

    _live_loss: LiveLoss | None = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        handle = self._handle(model)
        if handle is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        else:
            load_all(handle, resume_from_checkpoint)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The optimiser of `args.optim`, or what stands in for it on this machine."""
        settings = self.args  # type: ignore[attr-defined]
        settings.optim = type(settings.optim)(usable_optimizer(str(settings.optim.value), settings.device.type))
        return super().create_optimizer(*args, **kwargs)  # type: ignore[misc]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        settings, handle = self.args, self._handle()  # type: ignore[attr-defined]
        if handle is not None and next(quantised_views(handle.base_model), None):
            if settings.device.type == "cpu":
                leave_no_gaps()
        elif handle is not None and not (settings.bf16 or settings.fp16):
            advice = slower_than_need_be(handle.base_model, settings.device)
            if advice:
                logger.warning(advice)
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        handle = self._handle()
        best = self.state.best_model_checkpoint  # type: ignore[attr-defined]
        if handle is None or best is None:
            super()._load_best_model()  # type: ignore[misc]
        else:
            logger.info("Loading the best adapter from %s (score: %s)", best, self.state.best_metric)  # type: ignore[attr-defined]
            load_all(handle, best)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss, where labels are (`live_loss.py`); by the plain way where outputs or a loss of one's own are wanted."""
        own = self.compute_loss_func  # type: ignore[attr-defined]
        if not return_outputs and own is None and isinstance(model, PeftModel) and model.training:
            if self._live_loss is None or self._live_loss.handle is not model:
                self._live_loss = LiveLoss(model)
            smoothing = self.args.label_smoothing_factor  # type: ignore[attr-defined]
            items = num_items_in_batch if self.model_accepts_loss_kwargs else None  # type: ignore[attr-defined]
            loss = self._live_loss(inputs, items, smoothing)
            if loss is not None:
                processes = self.accelerator.num_processes  # type: ignore[attr-defined]
                average = self.args.average_tokens_across_devices and items is not None  # type: ignore[attr-defined]
                return loss * processes if average and processes > 1 else loss
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]

    def _handle(self, model: nn.Module | None = None) -> PeftModel | None:
        """The handle being trained, out of whatever accelerate wrapped it in."""
        bare: Any = self.accelerator.unwrap_model(model or self.model, keep_torch_compile=False)  # type: ignore[attr-defined]
        return bare if isinstance(bare, PeftModel) else None


class Trainer(AdapterTrainerMixin, transformers.Trainer):
    """`transformers.Trainer` that resumes and reloads adapters."""


def load_all(handle: PeftModel, checkpoint: str) -> None:
    """Load every adapter of `handle` from a checkpoint folder, as `save_pretrained` laid them out.

    Raises:
        AdapterFileError: an adapter is not in the checkpoint, or its files are damaged.
    """
    folders = {name: Path(checkpoint) if name == "default" else Path(checkpoint) / name for name in handle.peft_config}
    absent = [name for name, folder in folders.items() if not folder.is_dir() or not _holds_adapter(folder)]
    if absent:
        raise AdapterFileError(f"{checkpoint} holds no adapter named {', '.join(absent)}; was it saved by another run?")
    for name, folder in folders.items():
        handle.load_adapter(str(folder), name)


def _holds_adapter(folder: Path) -> bool:
    return any(folder.glob(f"**/{CONFIG_FILE}"))
