"""Texts to token batches for causal language models."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..labels import IGNORED

Example = dict[str, list[int]]
R = TypeVar("R")


def split(texts: Sequence[R], held_out: float, seed: int) -> tuple[list[R], list[R]]:
    """`(train, held out)`: a share of the rows (at least one) chosen by `seed`; the order of rows is kept."""
    count = max(1, round(len(texts) * held_out)) if held_out > 0 and len(texts) > 1 else 0
    chosen = set(random.Random(seed).sample(range(len(texts)), count))
    return [t for i, t in enumerate(texts) if i not in chosen], [t for i, t in enumerate(texts) if i in chosen]


class PadRight:
    """Collator: rows of one length, labels the examples' own or else the ids, padding masked and `IGNORED`.

    Padding is recognised by position, never by id: where pad and end-of-text are one token, the real end is still learned.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)
        rows = [torch.tensor(example["input_ids"]) for example in examples]

        def padded(value: int, tensors: list[Tensor]) -> Tensor:
            return torch.stack([torch.nn.functional.pad(row, (0, longest - len(row)), value=value) for row in tensors])

        return {
            "input_ids": padded(self.pad_id, rows),
            "attention_mask": padded(0, [torch.ones_like(row) for row in rows]),
            "labels": padded(IGNORED, [torch.tensor(example.get("labels", example["input_ids"])) for example in examples]),
        }


def pad_id_of(tokenizer: Any) -> int:
    """The padding token's id; without one any id will do, since padding is masked."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)


LOGITS_AT_A_TIME = 2**24  # values, so that evaluation needs no more memory than training


def batches(examples: Sequence[Example], size: int, pad_id: int, words: int = 1) -> Iterator[dict[str, Tensor]]:
    """Batches of neighbouring lengths, the shortest first: for evaluation. Logits over `words` bound their sizes, too."""
    waiting = sorted(examples, key=lambda example: len(example["input_ids"]))
    while waiting:
        most = max(LOGITS_AT_A_TIME // (len(waiting[min(size, len(waiting)) - 1]["input_ids"]) * words), 1)
        yield PadRight(pad_id)(waiting[: min(size, most)])
        waiting = waiting[min(size, most) :]


def perplexity(loss: float) -> float:
    """`exp(loss)`, capped where a float would overflow."""
    return math.exp(min(loss, 700))


@torch.no_grad()
def mean_loss(model: torch.nn.Module, examples: Sequence[Example], pad_id: int, size: int = 16) -> float:
    """Mean negative log-likelihood per token, in nats, over all rows; `exp` of it is the perplexity.

    The first token of a row is not scored: only a model with virtual tokens has anything to predict it from, so all
    models are compared on the same tokens.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    total, count = 0.0, 0
    words = getattr(getattr(model, "config", None), "vocab_size", None) or 1
    for batch in batches(examples, size, pad_id, words):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, -labels.shape[1] - 1 : -1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="sum")
        total, count = total + losses.item(), count + int((labels != IGNORED).sum())
    model.train(was_training)
    return total / count
