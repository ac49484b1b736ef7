"""What batches a job takes."""

from __future__ import annotations

import pytest

from tests import tiny
from tests.handles import lora, prefixed, prompted
from tunesmith import ConfigError
from tunesmith.data.packing import PackedCollator
from tunesmith.jobs import job


@pytest.mark.parametrize(
    ("make", "packing", "trainer", "collator"),
    [
        (lora, None, "Trainer", "PackedCollator"),
        (lora, True, "Trainer", "PackedCollator"),
        (lora, False, "Trainer", "PadRight"),
        (prompted, None, "Trainer", "PackedCollator"),
        (prefixed, None, "Trainer", "PackedCollator"),
        (prompted, False, "Trainer", "PadRight"),
    ],
)
def test_a_job_packs_where_it_can(make, packing, trainer, collator):
    kind, found = job.batching(make(tiny.make("llama")), packing, pad_id=0)
    assert (kind.__name__, type(found).__name__) == (trainer, collator)
    if isinstance(found, PackedCollator):
        assert found.first_tokens == (make is prompted), "only virtual tokens in front of a text predict its first one"


def test_a_job_takes_buckets_where_it_cannot_pack():
    kind, found = job.batching(prompted(tiny.make("bloom")), None, pad_id=0)
    assert (kind.__name__, type(found).__name__) == ("BucketTrainer", "PadRight")


def test_a_job_told_to_pack_says_why_it_cannot():
    with pytest.raises(ConfigError, match=r"BloomForCausalLM.* --packing"):
        job.batching(lora(tiny.make("bloom")), True, pad_id=0)
