"""transformers' Trainer for handles: checkpoints hold adapters, and adapters are what is resumed and reloaded.

The plain `transformers.Trainer` trains, evaluates and saves a handle correctly, too; where `peft` is not installed it wants
full weights to resume or to reload the best checkpoint, so those need this one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils import logging

from ..bases.precision import slower_than_need_be
from ..bases.quantised import quantised_views
from ..errors import AdapterFileError
from ..labels import IGNORED
from ..model import PeftModel
from ..storage.folder import CONFIG_FILE
from .fused_loss import FusedLoss
from .heap import leave_no_gaps
from .named_optimizers import usable_optimizer

logger = logging.get_logger(__name__)


class AdapterTrainerMixin:
    """Put before any Trainer class: `class MyTrainer(AdapterTrainerMixin, SomeTrainer)`.

    Models that are not handles are treated as that class treats them.
    """

    # Of the Trainer class behind this one.
    args: Any
    state: Any
    model: Any
    accelerator: Any
    compute_loss_func: Any
    processing_class: Any
    label_smoother: Any
    model_accepts_loss_kwargs: bool

    _fused_loss: FusedLoss | None = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        handle = self._handle(model)
        if handle is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        else:
            load_all(handle, resume_from_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Any] | None = None) -> None:
        """Adapters alone, whatever the base is; of a base that is no transformers model, its class would save everything."""
        handle = self._handle()
        if handle is None or isinstance(handle, transformers.PreTrainedModel):
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        folder = output_dir or self.args.output_dir
        handle.save_pretrained(folder, state_dict=state_dict, is_main_process=self.args.should_save)
        if self.args.should_save:
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, Path(folder) / TRAINING_ARGS_NAME)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The optimiser of `args.optim`, or what replaces it on this machine; `args` itself stays as the user made it."""
        given = self.args
        self.args = copy.copy(given)
        self.args.optim = type(given.optim)(usable_optimizer(str(given.optim.value), given.device.type))
        try:
            return super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.args = given

    def train(self, *args: Any, **kwargs: Any) -> Any:
        settings, handle = self.args, self._handle()
        if handle is not None and next(quantised_views(handle.bare_base), None):
            if settings.device.type == "cpu":
                leave_no_gaps()
        elif handle is not None and not (settings.bf16 or settings.fp16):
            advice = slower_than_need_be(handle.bare_base, settings.device)
            if advice:
                logger.warning(advice)
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        handle = self._handle()
        best = self.state.best_model_checkpoint
        if handle is None or best is None:
            super()._load_best_model()  # type: ignore[misc]
        else:
            logger.info("Loading the best adapter from %s (score: %s)", best, self.state.best_metric)
            load_all(handle, best)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The fused loss where it is known to be this one (`known_loss.py`) and no outputs are asked for."""
        if not return_outputs and isinstance(model, PeftModel) and model.training and self._takes_the_models_loss():
            if self._fused_loss is None or self._fused_loss.handle is not model:
                self._fused_loss = FusedLoss(model)
            smoothing = 0.0 if self.label_smoother is None else self.label_smoother.epsilon
            loss = self._fused_loss(inputs, num_items_in_batch if self.model_accepts_loss_kwargs else None, smoothing)
            if loss is not None:
                return loss
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]

    def _takes_the_models_loss(self) -> bool:
        """Whether the Trainer class behind this one takes the model's loss, at most smoothed, and scales it by nothing.

        Several processes scale it by their number.
        """
        behind = super().compute_loss  # type: ignore[misc]
        smoother = self.label_smoother
        return (
            getattr(behind, "__globals__", {}).get("__name__") == transformers.trainer.__name__
            and self.compute_loss_func is None
            and (smoother is None or (type(smoother) is LabelSmoother and smoother.ignore_index == IGNORED))
            and self.accelerator.num_processes == 1
        )

    def _handle(self, model: nn.Module | None = None) -> PeftModel | None:
        """The handle being trained, out of whatever accelerate wrapped it in."""
        bare: Any = self.accelerator.unwrap_model(model or self.model, keep_torch_compile=False)
        return bare if isinstance(bare, PeftModel) else None


class Trainer(AdapterTrainerMixin, transformers.Trainer):
    """`transformers.Trainer` that resumes and reloads adapters."""


def load_all(handle: PeftModel, checkpoint: str) -> None:
    """Load every adapter of `handle` from a checkpoint folder written by `save_pretrained`.

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
