"""Answers to held-out rows, by the bare base and with the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..labels import IGNORED
from ..model import PeftModel
from .report import Sample

NEW_TOKENS = 40


def answered(handle: PeftModel, tokenizer: Any, rows: Sequence[dict[str, list[int]]]) -> list[Sample]:
    """A sample of each row: from its question, or of plain text from its first third."""
    handle.eval()
    samples = []
    for row in rows:
        ids, labels = row["input_ids"], row.get("labels", row["input_ids"])
        trained = next((place for place, label in enumerate(labels) if label != IGNORED), 0)
        start = trained if trained > 1 else max(len(ids) // 3, 1)
        with handle.disable_adapter():
            before = _went_on(handle, tokenizer, ids[:start])
        after = _went_on(handle, tokenizer, ids[:start])
        asked, wanted = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:start], ids[start:]))
        samples.append(Sample(asked.strip(), before.strip(), after.strip(), wanted.strip()))
    return samples


@torch.no_grad()
def _went_on(handle: PeftModel, tokenizer: Any, ids: list[int]) -> str:
    text = torch.tensor([ids], device=next(handle.parameters()).device)
    made = handle.generate(
        input_ids=text, attention_mask=torch.ones_like(text), max_new_tokens=NEW_TOKENS, do_sample=False, repetition_penalty=1.3
    )
    return str(tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True))
