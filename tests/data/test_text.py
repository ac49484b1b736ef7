"""Padding, splitting and the mean loss of texts."""

from __future__ import annotations

import math

import torch

from tests import tiny
from tunesmith.data.text import IGNORED, PadRight, mean_loss, split


def test_padding_is_told_by_position_so_that_the_end_is_learned():
    batch = PadRight(pad_id=9)([{"input_ids": [4, 9]}, {"input_ids": [5, 6, 9]}])  # 9 is both pad and end of text
    assert batch["labels"].tolist() == [[4, 9, IGNORED], [5, 6, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_split_is_seeded_disjoint_and_complete():
    texts = [str(n) for n in range(50)]
    train, held_out = split(texts, 0.1, seed=1)
    assert len(held_out) == 5 and sorted(train + held_out, key=int) == texts
    assert split(texts, 0.1, seed=1) == (train, held_out) != split(texts, 0.1, seed=2)


def test_mean_loss_is_the_mean_over_tokens_whatever_the_batches():
    model = tiny.make("llama")
    examples = [{"input_ids": [3, 4, 5, 6, 7]}, {"input_ids": [8, 9]}, {"input_ids": [10, 11, 12]}]
    total = count = 0
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        loss = model(input_ids=ids, labels=ids).loss.item()
        total, count = total + loss * (ids.shape[1] - 1), count + ids.shape[1] - 1
    for size in (1, 2, 16):
        assert math.isclose(mean_loss(model, examples, pad_id=0, size=size), total / count, rel_tol=1e-5)
