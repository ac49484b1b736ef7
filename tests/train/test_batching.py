"""The trainer that reads batches of like lengths."""

from __future__ import annotations

from tests import tiny
from tests.data.test_packing import LENGTHS
from tests.handles import lora
from tunesmith.data.packing import LengthBuckets
from tunesmith.train.batching import BucketTrainer


def test_the_trainer_of_buckets_reads_them(tmp_path):
    import transformers

    from tunesmith.data.text import PadRight

    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=8, num_train_epochs=2, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", data_seed=4,
    )  # fmt: skip
    rows = [{"input_ids": [3] * (length // 4 + 2)} for length in LENGTHS]
    shapes = []

    class Recording(BucketTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            shapes.append(tuple(inputs["input_ids"].shape))
            return sum(p.sum() for p in model.parameters() if p.requires_grad) * 0.0

    Recording(model=lora(tiny.make("llama")), args=arguments, train_dataset=rows, data_collator=PadRight(0)).train()
    expected = []
    for epoch in range(2):
        sampler = LengthBuckets([len(row["input_ids"]) for row in rows], 8, seed=4)
        sampler.set_epoch(epoch)
        order = list(sampler)
        batches = [order[i : i + 8] for i in range(0, 301, 8)]
        expected += [(len(batch), max(len(rows[row]["input_ids"]) for row in batch)) for batch in batches]
    assert shapes == expected
