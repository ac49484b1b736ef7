"""Tiny models of many architectures with seeded random weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as tf
from torch import nn

from tunesmith.bases.architecture import enable_recomputing as enable_recomputing

VOCAB = 96
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
T5_SIZES = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


def _llama_config(**kwargs):
    return tf.LlamaConfig(**{**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, **kwargs})


def _gpt2_config(**kwargs):
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return tf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, pad_token_id=0, **kwargs)


def _opt_config():
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tf.OPTConfig(**sizes, max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0)


def _bert_config(**kwargs):
    return tf.BertConfig(**SIZES, max_position_embeddings=64, **kwargs)


# name -> (maker, task)
MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "llama": (lambda: tf.LlamaForCausalLM(_llama_config()), "CAUSAL_LM"),
    "gpt2": (lambda: tf.GPT2LMHeadModel(_gpt2_config()), "CAUSAL_LM"),
    "opt": (lambda: tf.OPTForCausalLM(_opt_config()), "CAUSAL_LM"),
    "bloom": (
        lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0)),
        "CAUSAL_LM",
    ),
    "t5": (lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5_SIZES)), "SEQ_2_SEQ_LM"),
    "mt5": (lambda: tf.MT5ForConditionalGeneration(tf.MT5Config(**T5_SIZES)), "SEQ_2_SEQ_LM"),
    "bert-classifier": (lambda: tf.BertForSequenceClassification(_bert_config(num_labels=3)), "SEQ_CLS"),
    "bert-tagger": (lambda: tf.BertForTokenClassification(_bert_config(num_labels=3)), "TOKEN_CLS"),
    "bert-answers": (lambda: tf.BertForQuestionAnswering(_bert_config()), "QUESTION_ANS"),
    "bert-features": (lambda: tf.BertModel(_bert_config()), "FEATURE_EXTRACTION"),
    "llama-classifier": (lambda: tf.LlamaForSequenceClassification(_llama_config(num_labels=3)), "SEQ_CLS"),
}
CAUSAL = [name for name, (_, task) in MODELS.items() if task == "CAUSAL_LM"]
GENERATING = [name for name, (_, task) in MODELS.items() if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM")]


def make(name: str, seed: int = 0) -> nn.Module:
    """The tiny model of that name in eval mode; equal seeds give equal weights."""
    torch.manual_seed(seed)
    return MODELS[name][0]().eval()


def task_of(name: str) -> str:
    return MODELS[name][1]


def inputs_for(name: str, rows: int = 2, length: int = 7, seed: int = 1) -> dict[str, torch.Tensor]:
    """Unpadded inputs of the model's forward, without labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (rows, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if task_of(name) == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = torch.randint(2, VOCAB, (rows, 5), generator=generator)
    return inputs


def main_output(result) -> torch.Tensor:
    """The tensor that matters of a model's result."""
    return next(result[key] for key in ("logits", "start_logits", "last_hidden_state") if key in result)
