"""What transformers may rename is spelt in one place each."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import tunesmith

SOURCE = Path(tunesmith.__file__).parent
CACHE, ARCHITECTURE = "runtime/cache.py", "bases/architecture.py"

# What is spelt in code (not in comments, docstrings and messages), and the files that may do so.
OWNERS = {
    r"past_key_values|layer_past|cache_params": {CACHE},
    r"cache_utils|masking_utils|DynamicCache|DynamicLayer|EncoderDecoderCache|StaticCache": {CACHE},
    r"get_seq_length|is_compileable|is_sliding": {CACHE},
    r"ALL_ATTENTION_FUNCTIONS|AttentionInterface|_attn_implementation": {ARCHITECTURE},
    r"per_layer_config|get_text_config|max_position_embeddings|num_hidden_layers|num_key_value_heads|head_dim_": {ARCHITECTURE},
    r"final_logit_softcapping|logits_scaling|rope_parameters|rope_scaling|kv_lora_rank|tie_word_embeddings": {ARCHITECTURE},
    r"is_encoder_decoder|is_loaded_in_|activation_checkpointing_enable|_gradient_checkpointing_func": {ARCHITECTURE},
    r"conversion_mapping|rename_source_key|reverse_transform|source_patterns|target_patterns|MergeModulelist": {ARCHITECTURE},
    r"layer_idx|add_cross_attention|use_bidirectional_attention": {ARCHITECTURE},
}


def spelt(path: Path) -> set[str]:
    """Strings, attributes, keywords and imports from other packages in a file's code."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            found |= {node.value} if " " not in node.value else set()  # messages to users name things, too
        elif isinstance(node, ast.Attribute) and not is_ours(node):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(alias.name for alias in node.names if node.level == 0)}
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
    return found


def is_ours(node: ast.Attribute) -> bool:
    """Whether an attribute is one of the owners' functions."""
    return isinstance(node.value, ast.Name) and node.value.id in ("architecture", "cache")


@pytest.mark.parametrize("pattern", OWNERS)
def test_only_the_owner_spells_it(pattern):
    files = {path.relative_to(SOURCE).as_posix(): path for path in SOURCE.rglob("*.py")}
    spellers = {name for name, path in files.items() if any(re.search(rf"(?<![a-z])({pattern})", text) for text in spelt(path))}
    assert spellers == OWNERS[pattern]
