"""Tiny quantised bases, and the dense models that they stand for."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from torch import nn

from tests import tiny
from tunesmith.bases.architecture import drop_quantised_marks
from tunesmith.bases.quantised import dense_module, quantised_views

pytest.importorskip("bitsandbytes")

FORMS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def load(folder, form: str, compute: torch.dtype = torch.float32, **kwargs) -> nn.Module:
    """A quantised model from a folder of a dense one."""
    fields = dict(FORMS[form])
    if "load_in_4bit" in fields:
        fields["bnb_4bit_compute_dtype"] = compute
    return tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=tf.BitsAndBytesConfig(**fields), **kwargs)


def wide(name: str = "llama", seed: int = 0) -> nn.Module:
    """A tiny model whose linear maps bitsandbytes can repack in evaluation: 64 numbers to a block, outputs by 32."""
    if name != "llama":
        return tiny.make(name, seed)
    torch.manual_seed(seed)
    sizes = {**tiny.SIZES, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, max_position_embeddings=128, pad_token_id=0)).eval()


def make(tmp_path, form: str, name: str = "llama", dtype: torch.dtype = torch.float32, **kwargs) -> nn.Module:
    folder = tmp_path / f"dense-{name}-{dtype}"
    if not folder.exists():
        wide(name).to(dtype).save_pretrained(folder)
    return load(folder, form, **kwargs)


def dense_copy(base: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The dense model that a quantised one stands for: a copy, every weight decoded."""
    dense = copy.deepcopy(base)
    for path, view in list(quantised_views(dense)):
        dense.set_submodule(path, dense_module(view, dtype))
    drop_quantised_marks(dense)
    return dense.to(dtype)


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint of `model` holds, copied."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_stored(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
