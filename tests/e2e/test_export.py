"""Exported adapters in the reference library: the same outputs, in the number type that was asked for."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.test_cli import run
from tunesmith import BottleneckConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model, load_base, resolve

CONFIGS = {
    "lora": lambda: LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
WEIGHTS = "adapter_model.safetensors"


def saved(kind: str, folder) -> torch.Tensor:
    """Logits of an adapter that is saved into the folder."""
    torch.manual_seed(0)
    handle = get_peft_model(load_base("sprout", dtype=torch.float32), CONFIGS[kind]()).eval()
    handle.save_pretrained(str(folder))
    return outputs(handle)


@torch.no_grad()
def outputs(handle) -> torch.Tensor:
    return handle(input_ids=torch.arange(5, 17)[None]).logits[:, -12:].float()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", None])
@pytest.mark.parametrize("kind", CONFIGS)
def test_an_exported_adapter_acts_the_same_in_the_reference(kind, dtype, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    expected = saved(kind, tmp_path / "ours")
    flags = ["--dtype", dtype] if dtype else []
    assert run("export", tmp_path / "ours", "--output-dir", tmp_path / "out", *flags) == 0
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype or "float32")}
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "adapter_config.json", WEIGHTS]
    base = AutoModelForCausalLM.from_pretrained(resolve("sprout"), dtype=torch.float32)
    found = outputs(peft.PeftModel.from_pretrained(base, str(tmp_path / "out")).eval())
    tolerance = {None: 1e-5, "float16": 2e-2, "bfloat16": 0.15}[dtype]  # of logits up to about 15, by the type's rounding
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    again = PeftModel.from_pretrained(load_base("sprout", dtype=torch.float32), str(tmp_path / "out")).eval()
    torch.testing.assert_close(outputs(again), found, atol=1e-4, rtol=0)


def test_a_merged_export_is_a_plain_model(tmp_path):
    from transformers import AutoModelForCausalLM

    saved("lora", tmp_path / "ours")
    assert run("export", tmp_path / "ours", "--output-dir", tmp_path / "plain", "--to", "merged") == 0
    expected = PeftModel.from_pretrained(load_base("sprout"), str(tmp_path / "ours")).merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_what_cannot_be_exported_is_said_and_nothing_is_written(tmp_path, capsys):
    get_peft_model(load_base("sprout"), BottleneckConfig(task_type="CAUSAL_LM")).save_pretrained(str(tmp_path / "block"))
    saved("lora", tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / WEIGHTS)
    save_file({name: tensor * 1e6 for name, tensor in tensors.items()}, tmp_path / "ours" / WEIGHTS, {"format": "pt"})
    bad = {
        ("block",): (2, "which other tools do not have"),
        ("ours", "--dtype", "float16"): (2, "export as bfloat16"),
        ("ours", "--dtype", "int8"): (2, "use float32, bfloat16, float16"),
        ("ours", "--to", "gguf"): (2, "use peft or merged"),
        ("ours", "--to", "merged", "--dtype", "float16"): (2, "leave --dtype out"),
        ("nowhere",): (1, "nowhere"),
    }
    for (name, *flags), (code, words) in bad.items():
        assert run("export", tmp_path / name, "--output-dir", tmp_path / "out", *flags) == code
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out" / WEIGHTS).exists()
    assert run("export", tmp_path / "ours", "--output-dir", tmp_path / "block") == 2
