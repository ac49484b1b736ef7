"""A tiny model of each class whose loss is known, with a head whose logits matter, and settings that would change its loss."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
import transformers as tf

from tests import tiny
from tunesmith.bases import architecture

SIZES = {
    **tiny.SIZES, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "n_embd": 32, "n_layer": 2,
    "n_head": 4, "n_positions": 64, "ffn_dim": 64, "word_embed_proj_dim": 32, "rotary_dim": 4, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
    "topk_group": 1, "moe_k": 2, "moe_num_experts": 4, "moe_layer_start_index": 0, "first_k_dense_replace": 1,
    "decoder_sparse_step": 1, "shared_expert_intermediate_size": 32, "kv_lora_rank": 16, "q_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id":
    1, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "DeepseekV3ForCausalLM": {"num_key_value_heads": 4},
    "Gemma2ForCausalLM": {"final_logit_softcapping": None},
    "GPTNeoForCausalLM": {"hidden_size": 32, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "MptForCausalLM": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    **{f"{kind}ForConditionalGeneration": {"decoder_start_token_id": 0, "dropout_rate": 0.0} for kind in ("T5", "MT5", "UMT5")},
}
SETTING_OF_LOSSES = re.compile(r"logit|loss|coef|softcap|mtp|nextn|predict")


def config_of(name: str, hostile: bool = False) -> Any:
    """A tiny configuration; `hostile` changes every setting whose name has to do with logits and losses."""
    kind = getattr(tf, name).config_class
    default = kind()
    known = (
        vars(default).keys() | inspect.signature(kind.__init__).parameters.keys() | getattr(kind, "__annotations__", {}).keys()
    )
    given = {key: value for key, value in SIZES.items() if key in known and key not in kind.attribute_map}
    if getattr(default, "layer_types", None):
        given["layer_types"] = ["full_attention"] * 2
    config = kind(**{**given, **SPECIAL.get(name, {})})
    for key, value in list(vars(config).items()) if hostile else ():
        if SETTING_OF_LOSSES.search(key) and key in known:
            setattr(config, key, True if value is False else 2.0 if value is None or isinstance(value, float) else value)
    return config


def make(name: str, hostile: bool = False) -> Any:
    """The tiny model of that class; its logits are large enough that caps, scales and z-losses show."""
    torch.manual_seed(0)
    base = getattr(tf, name)(config_of(name, hostile)).eval()
    if base.config.is_encoder_decoder:
        base = base.double()  # without scales in its attention, T5 loses digits
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        architecture.output_head(base).weight.normal_()
    return base


def batch() -> dict[str, torch.Tensor]:
    """Left-padded rows, some labels ignored; a first token that has a label."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, tiny.VOCAB, (3, 7), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    mask[0, :2] = 0
    labels[0, :3] = -100
    labels[1, ::2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
