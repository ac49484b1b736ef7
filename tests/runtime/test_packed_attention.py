"""Kernels of attention for packed rows: they keep texts apart."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.runtime.test_packed_row import (
    LENGTHS,
    VIRTUAL,
    check_texts_are_alone,
    examples,
    handle_of,
    lora_config,
    virtual_handle,
)
from tunesmith.data.packing import PackedCollator
from tunesmith.runtime import packed_attention


@pytest.mark.parametrize(("kind", "calls"), [("llama", 2), ("gpt2", 2), ("granite", 2), ("mistral", 0), ("gemma2", 0)])
def test_the_kernel_gets_all_texts_in_its_own_layout(kind, calls, monkeypatch):
    """A stand-in with the kernel's signature; windows and capped scores are not its business."""
    seen = []

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert window_size == (-1, 0) and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert max_q == max(LENGTHS) and max_k == max_q + before
        seen.append(query.shape)
        keys, values = (tensor.split(cu_seq_k.diff().tolist()) for tensor in (key, value))
        texts = []
        for text in zip(query.split(cu_seq_q.diff().tolist()), keys, values):
            mask = torch.ones(len(text[0]), len(text[1]), dtype=torch.bool).tril(before)
            heads = (part.transpose(0, 1)[None] for part in text)
            texts.append(attention(*heads, mask, scale=scale, enable_gqa=enable_gqa)[0].transpose(0, 1))
        return torch.cat(texts)

    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(packed_attention, "varlen_attn", kernel)
    monkeypatch.setattr(packed_attention, "_has_kernel", lambda query: True)
    before = 0
    check_texts_are_alone(handle_of(kind))
    assert len(seen) == calls
    before = VIRTUAL["prefix"].num_virtual_tokens
    check_texts_are_alone(virtual_handle(kind, "prefix"))
    assert len(seen) == 2 * calls


@pytest.mark.parametrize("kind", ["llama", "gpt2", "granite", "qwen2"])
def test_the_kernel_of_short_texts_keeps_them_apart(kind, monkeypatch):
    """Taken here for 32 bits, too, so that tolerances are narrow."""
    monkeypatch.setattr(packed_attention.short_attention, "applies", lambda *_: True)
    check_texts_are_alone(handle_of(kind))
    check_texts_are_alone(virtual_handle(kind, "prefix"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("method", ["lora", "prefix"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma2", "opt"])
def test_kernels_keep_texts_apart(kind, method):
    sizes = {} if kind == "gpt2" else {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64}
    config = lora_config() if method == "lora" else copy.deepcopy(VIRTUAL[method])
    handle = handle_of(kind, config, **sizes).to("cuda", torch.bfloat16)
    batch = {name: v.cuda() if torch.is_tensor(v) else v for name, v in PackedCollator()(examples()).items()}
    handle(**batch).loss.backward()
    for text, logits in zip(examples(), handle(**batch).logits.split(LENGTHS, dim=1)):
        alone = handle(input_ids=torch.tensor([text["input_ids"]], device="cuda")).logits
        assert (logits - alone).abs().max() <= 2**-8 * 8 * alone.abs().max()
