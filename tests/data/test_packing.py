"""Collating packed rows, and batches of like lengths."""

from __future__ import annotations

import pytest
import torch

from tunesmith import UsageError
from tunesmith.data.packing import POOL, LengthBuckets, PackedCollator


def test_texts_follow_each_other_and_nothing_is_predicted_across():
    batch = PackedCollator()([{"input_ids": [4, 5, 6]}, {"input_ids": [7]}, {"input_ids": [8, 9], "labels": [-100, 9]}])
    assert batch["input_ids"].tolist() == [[4, 5, 6, 7, 8, 9]]
    assert batch["labels"].tolist() == [[-100, 5, 6, -100, -100, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 4, 6]
    assert batch["cu_seq_lens_q"].dtype == torch.int32 and batch["max_length_q"] == batch["max_length_k"] == 3


def test_examples_are_not_changed():
    example = {"input_ids": torch.tensor([4, 5]), "labels": torch.tensor([4, 5])}
    PackedCollator()([example])
    assert example["labels"].tolist() == [4, 5]


@pytest.mark.parametrize(
    ("examples", "words"),
    [
        ([], "at least one"),
        ([{"input_ids": []}], "0 input_ids"),
        ([{"input_ids": [3]}, {"input_ids": [4, 5], "labels": [4]}], "2 input_ids and 1 labels"),
    ],
)
def test_what_cannot_be_packed_is_refused(examples, words):
    with pytest.raises(UsageError, match=words):
        PackedCollator()(examples)


LENGTHS = torch.randint(3, 200, (301,), generator=torch.Generator().manual_seed(0)).tolist()


def padding(order: list[int], size: int) -> int:
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    return sum(len(batch) * max(LENGTHS[row] for row in batch) - sum(LENGTHS[row] for row in batch) for batch in batches)


def test_buckets_hold_every_row_once_in_an_order_of_their_seed_and_epoch():
    sampler, again, other = (
        LengthBuckets(LENGTHS, 8, seed=1),
        LengthBuckets(LENGTHS, 8, seed=1),
        LengthBuckets(LENGTHS, 8, seed=2),
    )
    first = list(sampler)
    assert sorted(first) == list(range(301)) and len(sampler) == 301
    assert first == list(sampler) == list(again) != list(other)
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_buckets_pad_a_tenth_of_what_random_batches_do():
    generator = torch.Generator().manual_seed(0)
    at_random = padding(torch.randperm(301, generator=generator).tolist(), 8)
    assert padding(list(LengthBuckets(LENGTHS, 8)), 8) < at_random / 10


def test_buckets_come_in_no_order_of_length_and_the_smaller_batch_holds_any():
    """Sorted batches would show long rows first in every epoch, and a batch of the longest few would weigh them most."""
    starts, rests = [], []
    for epoch in range(40):
        sampler = LengthBuckets(LENGTHS, 8)
        sampler.set_epoch(epoch)
        order = list(sampler)
        starts.append(sum(LENGTHS[row] for row in order[:8]) / 8)
        rests.append(sum(LENGTHS[row] for row in order[296:]) / 5)
    mean = sum(LENGTHS) / 301
    for found in (starts, rests):
        assert abs(sum(found) / 40 - mean) < 25 and min(found) < mean - 20 and max(found) > mean + 20
    assert POOL * 8 < 296, "with all rows in one pool this test says less"


def test_first_tokens_keep_their_labels_where_virtual_tokens_predict_them():
    examples = [{"input_ids": [4, 5]}, {"input_ids": [7]}, {"input_ids": [8, 9], "labels": [-100, 9]}]
    assert PackedCollator(first_tokens=True)(examples)["labels"].tolist() == [[4, 5, 7, -100, 9]]
