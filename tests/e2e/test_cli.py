"""The command line as a person meets it: start-up, a whole job, errors and exit codes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time

import pytest

from tunesmith.cli.app import main
from tunesmith.jobs import job
from tunesmith.jobs.recipe import resolve

TEXTS = [f"I want you to act as a gardener of plot {n}. Tell me what grows there and keep it short." for n in range(20)]


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "prompts.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["act", "prompt"])
        writer.writeheader()
        writer.writerows({"act": "gardener", "prompt": text} for text in TEXTS)
    return path


def run(*arguments: object) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def imported_by(statement: str) -> set[str]:
    script = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.timing
def test_importing_tunesmith_is_quick_and_pulls_in_no_torch():
    assert not {"torch", "transformers", "typer", "rich"} & imported_by("import tunesmith")
    assert not {"torch", "transformers"} & imported_by("import tunesmith.cli")

    def seconds(statement: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        return time.perf_counter() - started

    assert min(seconds("import tunesmith") for _ in range(5)) - min(seconds("pass") for _ in range(5)) < 0.1


@pytest.mark.timing
def test_help_is_quick():
    def seconds() -> float:
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", "from tunesmith.cli import main; main(['--help'])"], check=True, capture_output=True
        )
        return time.perf_counter() - started

    assert min(seconds() for _ in range(5)) < 0.4


@pytest.mark.parametrize("method", ["prompt-tuning", "lora"])
def test_train_then_generate(method, data_file, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    code = run(
        "train", "--data", data_file, "--text_column", "prompt", "--method", method, "--epochs", 1, "--output-dir", adapter
    )
    printed = capsys.readouterr().out
    assert code == 0 and "held-out perplexity" in printed and "20 rows" in printed
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "sprout", "a path of this machine must not get into the file"
    assert (adapter / "tokenizer.json").is_file()
    assert run("generate", "--adapter", adapter, "--prompt", "I want you", "--max-new-tokens", 5, "--compare") == 0
    assert capsys.readouterr().out.count("I want you") == 2


PACKED_COPY = (
    '--text-column prompt --packing --method lora --lora-target-modules down_proj --option modules_to_save=["self_attn"]'
)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "--data", "nowhere.csv"], 3, ["nowhere.csv", "no such file"]),
        (["train", "--data", "{data}"], 3, ["act, prompt", "--text-column"]),
        (["train", "--data", "{data}", "--text-column", "promt"], 3, ["promt", "did you mean", "prompt"]),
        (["train", "--data", "{data}", "--text-column", "prompt", "--method", "lorra"], 2, ["lorra", "lora"]),
        (
            ["train", "--data", "{data}", "--text-column", "prompt", "--lora-r", "0", "--method", "lora"],
            2,
            ["r=0", "at least 1"],
        ),
        (
            ["train", "--data", "{data}", "--text-column", "prompt", "--output-dir", "{data}"],
            2,
            ["cannot write", "--output-dir"],
        ),
        (["train", "--data", "{data}", "--text-column", "prompt", "--epochs", "nan"], 2, ["num_train_epochs"]),
        (["train", "--data", "{data}", "--text-column", "prompt", "--learning-rate", "0"], 2, ["learning_rate"]),
        (["generate", "--adapter", "nowhere", "--prompt", "x"], 1, ["nowhere", "owner/name"]),
        (["generate", "--prompt", "x", "--top-p", "2"], 2, ["--top-p"]),
        (["train", "--data", "{data}", "--text-column", "prompt", "--base", "./nowhere"], 1, ["nowhere"]),
        (["generate", "--adapter", "./nowhere", "--prompt", "x"], 1, ["nowhere"]),
        (["train", "--dtaa", "{data}"], 2, ["--data"]),
        (["train", "--data", "{data}", "--text-column", "prompt", "--option", "r"], 2, ["--option r", "name=value"]),
        (["train", "--data", "{data}", "--text-column", "prompt", "--option", "rr=3"], 2, ["no field", "rr"]),
        (
            ["train", "--data", "{data}", *PACKED_COPY.split()],
            2,
            ["cannot be packed", "private copy of an attention", "leave --packing out"],
        ),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)
def test_mistakes_give_one_clear_error(arguments, code, words, data_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*[argument.format(data=data_file) for argument in arguments]) == code
    printed = capsys.readouterr()
    assert all(word in printed.err for word in words), printed.err
    assert "Traceback" not in printed.err
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("method", job.method_names())
def test_every_method_is_a_choice_of_train_and_in_the_list(method, capsys):
    needed = {"trainable-tokens": {"token_indices": [5]}}  # there is no usual choice
    config = job.Settings(method, options=needed.get(method, {})).peft_config("sprout")
    assert method.upper().replace("-", "_") == config.method
    assert run("methods") == 0
    assert f"\n{method} " in capsys.readouterr().out


def test_options_are_fields_of_the_config_and_win():
    flags = {"options": ["r=3", "init_lora_weights=gaussian", 'target-modules=["q_proj"]']}
    assert resolve(None, {}, flags).values["options"] == {
        "r": 3,
        "init_lora_weights": "gaussian",
        "target_modules": ["q_proj"],
    }
    config = job.Settings("lora", lora_r=4, options={"r": 3}).peft_config("sprout")
    assert config.r == 3 and config.lora_alpha == 16


def test_demo_makes_two_specialists(tmp_path, monkeypatch, capsys):
    from tunesmith.jobs.demo import tell

    perplexity = tell("prompt-tuning", tmp_path / "out", num_train_epochs=1, seed=0)
    for name, data in (("prompt-writer", "prompt-writer"), ("quote-writer", "quote-writer")):
        other = next(model for model in perplexity if model not in (name, "base"))
        assert perplexity[name][data] < 0.9 * perplexity["base"][data]
        assert perplexity[name][data] < 0.9 * perplexity[other][data]
        assert (tmp_path / "out" / name / "adapter_model.safetensors").stat().st_size < 20_000
    assert (tmp_path / "out" / "losses.png").stat().st_size > 5_000
    assert "two full copies" in capsys.readouterr().out


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("tunesmith ")
    assert os.environ.get("HF_HUB_OFFLINE") == "1"
