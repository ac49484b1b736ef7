"""How training rows become batches: packed into one row, or in buckets of similar lengths."""

from __future__ import annotations

from typing import Any

from ..data.packing import LengthBuckets, PackedCollator
from ..data.text import PadRight
from ..errors import ConfigError
from ..handle.packing import packing_fault
from ..model import PeftModel
from ..runtime.virtual_tokens import virtual_counts
from .trainer import Trainer


class BucketTrainer(Trainer):
    """`tunesmith.Trainer` for data sets of tokenized rows (`input_ids`), batched by length."""

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthBuckets:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        batch = self.args.train_batch_size * self.args.world_size  # of all processes, which take turns at its rows
        return LengthBuckets([len(row["input_ids"]) for row in rows], batch, seed)


def batching(handle: PeftModel, packing: bool | None, pad_id: int) -> tuple[type[Trainer], PackedCollator | PadRight]:
    """The Trainer class and the collator for a handle.

    Args:
        packing: whether the texts of a batch share one row; None packs where that is possible.

    Raises:
        ConfigError: texts are to be packed, but cannot be kept apart.
    """
    cannot = packing_fault(handle)
    if packing and cannot:
        raise ConfigError(f"texts cannot be packed here: {cannot}; leave --packing out")
    if cannot is None and packing is not False:
        return Trainer, PackedCollator(first_tokens=virtual_counts(handle.effective_frame) > 0)
    return BucketTrainer if packing is None else Trainer, PadRight(pad_id)
