"""The QLoRA example, small: as a script and as a recipe, each run as a user runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from tests.e2e.test_cli import run
from tunesmith import load_tokenizer

pytest.importorskip("bitsandbytes")
pytest.importorskip("tensorboard")
EXAMPLES = Path(__file__).parents[2] / "examples"


def output_of(folder: Path, *arguments: str) -> str:
    """What the script prints in a fresh process; it writes into `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / "03_qlora_python_coder.py"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def assert_made(folder: Path) -> None:
    """An adapter alone, curves, and a merged model of 16 bits that says nothing of quantisation."""
    names = {path.name for path in (folder / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names and "model.safetensors" not in names
    assert list(folder.glob("**/events.out.tfevents.*"))
    merged = {path.name for path in (folder / "merged").iterdir()}
    assert {"model.safetensors", "tokenizer.json"} <= merged
    assert {value.dtype for value in load_file(folder / "merged" / "model.safetensors").values()} == {torch.float16}
    assert "quantization_config" not in json.loads((folder / "merged" / "config.json").read_text())


def test_on_sprout(tmp_path):
    output = output_of(tmp_path)
    found = re.search(r"16 held-out rows: ([\d.]+) before, ([\d.]+) after", output)
    assert found and float(found[2]) < 0.2 * float(found[1])
    assert "trainable params: 430,080 " in output  # r=64 on q and v of 6 layers
    assert "def compute(" in output.rpartition("### Response:")[2]
    assert_made(tmp_path / "python-coder")


def test_on_a_llama_shape_with_rows_of_ones_own(tmp_path):
    tokenizer = load_tokenizer("sprout")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=len(tokenizer)))
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"instruction": f"Suma {n}.", "input": "", "output": f"print({n} + {n})"} for n in range(12)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    output = output_of(tmp_path, "--base", "base", "--data", "rows.json", "--output-dir", "coder")
    assert "12 rows" in output and "Suma" in output
    assert "trainable params: 32,768 " in output  # 2 layers, q and v: 64 * (64 + 64) each
    assert_made(tmp_path / "coder")


def test_as_a_recipe(tmp_path, monkeypatch, capsys):
    """Trained in 4 bits, merged into 16, asked in 4 bits again."""
    monkeypatch.chdir(EXAMPLES.parent)
    adapter, merged = str(tmp_path / "coder"), str(tmp_path / "merged")
    assert run("train", EXAMPLES / "03_qlora_python_coder.yaml", "--output-dir", adapter, "--max-steps", "20") == 0
    printed = capsys.readouterr().out
    assert "in bfloat16, stored in 4 bits" in printed and "trained 430,080 of" in printed
    before, after = map(float, re.search(r"perplexity ([\d.]+) -> ([\d.]+)", printed).groups())
    assert after < 0.6 * before
    recipe = (tmp_path / "coder" / "recipe.resolved.yaml").read_text()
    assert list((tmp_path / "coder").glob("**/events.out.tfevents.*"))
    assert "load_in_4bit: true" in recipe and "optim: paged_adamw_32bit" in recipe and "warmup_steps: 0.03" in recipe
    assert run("merge", "--adapter", adapter, "--output-dir", merged) == 0
    question = ["--prompt", "Write a function in Python that adds 5.", "--template", "instruction"]
    assert run("generate", "--base", merged, "--load-in-4bit", *question, "--max-new-tokens", "12") == 0
    assert len(capsys.readouterr().out.splitlines()[-1].strip()) > 3
