"""Batches with little padding: texts one after another in one row (`PackedCollator`), or rows of similar lengths
(`LengthBuckets`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..errors import UsageError
from ..labels import IGNORED

POOL = 16  # batches whose rows are sorted together: enough for similar lengths, few enough to stay mixed


class PackedCollator:
    """Collator: all examples of a batch in one row, for a handle's forward, with what keeps them apart.

    Nothing is predicted from the end of the text before: the label of each first token is `IGNORED`. The other labels are
    the examples' own (`labels`, if they have them), so a batch has as many labels as it has with padding.

    Args:
        first_tokens: keep the labels of first tokens, for a handle that puts virtual tokens in front of each text; it
            predicts them from the last of these.
    """

    def __init__(self, first_tokens: bool = False) -> None:
        self.first_tokens = first_tokens

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if not examples:
            raise UsageError("no examples to pack; a batch needs at least one")
        texts = [_ids(example["input_ids"]) for example in examples]
        labels = [_ids(example.get("labels", example["input_ids"])).clone() for example in examples]
        for text, own in zip(texts, labels):
            if len(text) != len(own) or not len(text):
                raise UsageError(
                    f"an example has {len(text)} input_ids and {len(own)} labels; expected equally many, at least one"
                )
            if not self.first_tokens:
                own[0] = IGNORED
        lengths = torch.tensor([len(text) for text in texts])
        boundaries = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)  # (texts + 1,)
        longest = int(lengths.max())
        return {
            "input_ids": torch.cat(texts)[None],  # (1, T)
            "labels": torch.cat(labels)[None],  # (1, T)
            "position_ids": torch.cat([torch.arange(len(text)) for text in texts])[None],  # (1, T)
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": longest,
            "max_length_k": longest,
            "use_cache": False,  # with a cache, transformers makes no block mask should this reach a bare base
        }


def _ids(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.long)


class LengthBuckets(Sampler[int]):
    """Sampler: a random order in which the rows of a batch have similar lengths, so that little is padded.

    Rows are shuffled, sorted by length within pools of `POOL` batches, cut into batches, and the batches shuffled. A last,
    smaller batch holds rows of any length; sorted, it would give the longest rows more weight in every epoch.

    Args:
        lengths: tokens of each row.
        size: rows of a batch.
        seed: decides the order, together with the epoch.
    """

    def __init__(self, lengths: Sequence[int], size: int, seed: int = 0) -> None:
        self.lengths = lengths
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by data loaders before each epoch, so that each has another order and a resumed one its own."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        rows = torch.randperm(len(self.lengths), generator=generator).tolist()
        whole = len(rows) - len(rows) % self.size
        batches = []
        for start in range(0, whole, self.size * POOL):
            pool = sorted(rows[start : min(start + self.size * POOL, whole)], key=lambda row: self.lengths[row])
            batches += [pool[i : i + self.size] for i in range(0, len(pool), self.size)]
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[index]
        yield from rows[whole:]
