"""Which modules are adapted when the user names none, by `model_type`: the attention projections of each paper's LoRA.

These are the ecosystem's own choices, so counts and files agree with it. An architecture that is not listed gets
"all-linear".
"""

from __future__ import annotations

_GROUPS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("q_proj", "v_proj"): (
        "llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "opt", "bart", "mbart", "gptj",
        "gpt_neo", "stablelm", "llama4", "whisper", "pegasus", "m2m_100", "marian", "olmo", "olmo2", "cohere", "smollm3",
    ),
    ("q", "v"): ("t5", "mt5", "umt5", "longt5"),
    ("query_key_value",): ("bloom", "gpt_neox", "chatglm", "falcon", "RefinedWeb", "RefinedWebModel"),
    ("c_attn",): ("gpt2", "gpt_bigcode"),
    ("query", "value"): (
        "bert", "roberta", "xlm-roberta", "electra", "layoutlm", "camembert", "mpnet", "vit", "deit", "beit", "albert",
    ),
    ("query_proj", "value_proj"): ("deberta-v2",),
    ("in_proj",): ("deberta",),
    ("q_lin", "v_lin"): ("distilbert",),
    ("Wqkv",): ("mpt", "modernbert"),
    ("qkv_proj",): ("codegen", "phi3"),
    ("q_proj", "v_proj", "fc1", "fc2"): ("phi",),
    ("q", "v", "q_proj", "v_proj"): ("blip-2",),
}  # fmt: skip

DEFAULT_TARGETS = {model_type: list(names) for names, types in _GROUPS.items() for model_type in types}
