"""A Trainer whose batches hold rows of like lengths, for models whose texts cannot be packed into one row."""

from __future__ import annotations

from typing import Any

from ..data.packing import LengthBuckets
from .trainer import Trainer


class BucketTrainer(Trainer):
    """`tunesmith.Trainer` for data sets of tokenized rows (`input_ids`), batched by length."""

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthBuckets:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthBuckets([len(row["input_ids"]) for row in rows], self.args.train_batch_size, seed)
