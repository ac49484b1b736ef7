"""Answers to held-out rows, by the bare base and with the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..labels import IGNORED
from ..model import PeftModel
from .continuation import Sampling, continuation
from .report import Sample

ANSWER = Sampling(max_new_tokens=40)


def answered(handle: PeftModel, tokenizer: Any, rows: Sequence[dict[str, list[int]]]) -> list[Sample]:
    """A sample of each row: from its question, or of plain text from its first third."""
    handle.eval()
    samples = []
    for row in rows:
        ids, labels = row["input_ids"], row.get("labels", row["input_ids"])
        trained = next((place for place, label in enumerate(labels) if label != IGNORED), 0)
        start = trained if trained > 1 else max(len(ids) // 3, 1)
        with handle.disable_adapter():
            before = continuation(handle, tokenizer, ids[:start], ANSWER)
        after = continuation(handle, tokenizer, ids[:start], ANSWER)
        prompt, expected = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:start], ids[start:]))
        samples.append(Sample(prompt.strip(), before.strip(), after.strip(), expected.strip()))
    return samples
