"""The verbs on small data: what they print, write and leave alone."""

from __future__ import annotations

import io
import json
import math
import re

import pytest
import torch

from tests.e2e.test_cli import imported_by, run
from tunesmith import PeftModel, load_base, load_tokenizer
from tunesmith.cli.app import COMMANDS
from tunesmith.data.templates import BUILT_IN, TEMPLATE_FILE

ROWS = [
    {"instruction": f"Name plant {n}.", "input": "", "output": f"Plant {n % 5} is a rose and it grows in the garden."}
    for n in range(24)
]


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.json"
    path.write_text(json.dumps(ROWS))
    return path


@pytest.fixture(scope="module")
def adapter(data_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "adapter"
    assert run("train", "--data", data_file, "--method", "lora", "--epochs", 6, "--batch-size", 4, "--output-dir", folder) == 0
    return folder


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_fits_a_screen_and_begins_with_examples(verb, capsys):
    assert run(verb, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 42 and max(map(len, lines)) <= 100
    assert next(number for number, line in enumerate(lines) if "tunesmith " + verb in line) < 8


@pytest.mark.parametrize(
    ("arguments", "unused"),
    [
        (["inspect", "{adapter}"], {"transformers.trainer", "accelerate", "tunesmith.jobs.sizing", "tunesmith.jobs.job"}),
        (
            ["export", "{adapter}", "--output-dir", "{folder}/out"],
            {"transformers.trainer", "accelerate", "tunesmith.jobs.job"},
        ),
        (["plan", "--models"], {"torch", "transformers", "tunesmith.estimate.ledger"}),
        (
            ["validate", "{data}"],
            {"transformers.trainer", "tunesmith.jobs.job", "tunesmith.jobs.sizing", "datasets", "matplotlib"},
        ),
        (["generate", "--prompt", "x", "--max-new-tokens", "1"], {"transformers.trainer", "tunesmith.jobs.sizing", "datasets"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_verb_imports_nothing_that_it_does_not_use(arguments, unused, adapter, data_file, tmp_path):
    arguments = [argument.format(adapter=adapter, data=data_file, folder=tmp_path) for argument in arguments]
    quiet = "import contextlib, io; from tunesmith.cli.app import app"
    statement = f"{quiet}\nwith contextlib.redirect_stdout(io.StringIO()): app({arguments!r}, standalone_mode=False)\n"
    assert not unused & imported_by(f"exec({statement!r})")


def test_help_of_a_verb_imports_no_torch():
    quiet = "import contextlib, io; from tunesmith.cli.app import COMMANDS, app"
    each = "for verb in COMMANDS: app([verb, '--help'], standalone_mode=False)"
    statement = f"{quiet}\nwith contextlib.redirect_stdout(io.StringIO()):\n    {each}\n"
    assert not {"torch", "transformers", "yaml", "numpy"} & imported_by(f"exec({statement!r})")


def test_a_mistake_in_the_data_or_recipe_shows_before_torch_is_imported(tmp_path):
    (tmp_path / "bad.csv").write_text("a,b\n1\n")
    (tmp_path / "bad.yaml").write_text("learning_rat: 1\n")
    for arguments in (["train", "--data", str(tmp_path / "bad.csv")], ["train", str(tmp_path / "bad.yaml")]):
        statement = (
            f"from tunesmith.cli.app import app\ntry: app({arguments!r}, standalone_mode=False)\nexcept ValueError: pass\n"
        )
        assert "torch" not in imported_by(f"exec({statement!r})")


def test_a_run_is_written_with_what_made_it(adapter):
    assert {path.name for path in adapter.iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", TEMPLATE_FILE, "recipe.resolved.yaml",
        "environment.json", "metrics.jsonl", "README.md",
    }  # fmt: skip
    kept = json.loads((adapter / TEMPLATE_FILE).read_text())
    assert kept == {"name": "human-assistant", "source": BUILT_IN["human-assistant"]}
    environment = json.loads((adapter / "environment.json").read_text())
    assert environment["versions"]["torch"].startswith("2.") and len(environment["data_sha256"]) == 64
    *records, last = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert steps and all(record["loss"] > 0 and record["learning_rate"] >= 0 for record in steps)
    measured = [record for record in records if "loss" not in record]
    assert measured and all(record["eval_loss"] > 0 and record["step"] > 0 for record in measured)
    assert last["held_out_loss_after"] < last["held_out_loss_before"]


def test_a_dry_run_prints_a_recipe_that_gives_the_same(data_file, tmp_path, capsys):
    assert run("train", "--data", data_file, "--method", "lora", "--lora-r", 3, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "lora_r: 3\n" in text and "learning_rate: 0.002\n" in text
    (tmp_path / "again.yaml").write_text(text)
    assert run("train", tmp_path / "again.yaml", "--dry-run") == 0
    assert capsys.readouterr().out == text


def test_the_environment_and_old_names_count(data_file, monkeypatch, capsys):
    monkeypatch.setenv("TUNESMITH_LORA_R", "5")
    assert (
        run("train", "--data", data_file, "--method", "lora", "--warmup-ratio", 0.1, "--max-seq-length", 99, "--dry-run") == 0
    )
    printed = capsys.readouterr()
    assert "lora_r: 5\n" in printed.out and "warmup_steps: 0.1\n" in printed.out and "max_length: 99\n" in printed.out
    assert "--warmup-ratio is called warmup_steps here" in printed.err


def test_all_settings_are_listed(capsys):
    assert run("train", "--settings") == 0
    listed = capsys.readouterr().out
    assert "gradient_accumulation_steps" in listed and "lr_scheduler_type" in listed


def test_validate_shows_lengths_and_what_is_trained(data_file, capsys):
    assert run("validate", data_file, "--max-length", 20) == 0
    printed = capsys.readouterr().out
    assert "24 rows, alpaca, template human-assistant" in printed and "<- max_length" in printed and "no bad rows" in printed
    assert "⟦Plant 0 is a rose and it grows in the garden.<|endoftext|>⟧" in printed
    assert "24 of 24 rows are longer than 20 tokens" in printed


def test_validate_reports_every_bad_row(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": "Name one.", "output": "One." if number % 2 else ""} for number in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert run("validate", path) == 3
    printed = capsys.readouterr()
    assert printed.out.count('"output" is empty') == 30 and f"{path}:59" in printed.out
    assert "30 of 60 rows cannot be used" in printed.err


def test_eval_measures_base_and_adapter(adapter, data_file, tmp_path, capsys):
    assert run("eval", "--data", data_file, "--adapter", adapter, "--samples", 1, "--output", tmp_path / "scores.json") == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["rows"] == 24 and scores["loss"]["adapter"] < scores["loss"]["base"] - 0.5
    printed = capsys.readouterr().out
    assert f"{math.exp(scores['loss']['base']):.2f}" in printed and "expected: Plant 0" in printed


def test_generate_and_chat_write_the_form_that_was_trained(adapter, monkeypatch, capsys):
    base, tokenizer = load_base("sprout").eval(), load_tokenizer("sprout")
    inputs = tokenizer("Human: Name plant 3.\n\nAssistant: ", return_tensors="pt")
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    ids = model.generate(**inputs, max_new_tokens=12, repetition_penalty=1.3, do_sample=False)
    expected = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert run("generate", "--adapter", adapter, "--prompt", "Name plant 3.", "--max-new-tokens", 12) == 0
    assert capsys.readouterr().out.strip() == expected.strip()

    monkeypatch.setattr("sys.stdin", io.StringIO("Name plant 3.\n/base\n/nothing\n/new\nName plant 3.\n/quit\nnever read\n"))
    assert run("chat", "--adapter", adapter, "--max-new-tokens", 12, "--temperature", 0, "--repetition-penalty", 1.3) == 0
    lines = capsys.readouterr().out
    assert lines.startswith(expected.strip()) and lines.count(expected.strip()) == 1
    assert "base alone" in lines and "unknown command /nothing" in lines and "never read" not in lines


def test_a_long_conversation_forgets_its_beginning(adapter, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Name plant 3 and tell me where it grows best.\n" * 8))
    assert run("chat", "--adapter", adapter, "--max-new-tokens", 440, "--temperature", 0) == 0
    printed = capsys.readouterr()
    assert "were dropped" in printed.out and "Traceback" not in printed.err


def test_merge_gives_a_plain_model(adapter, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "merged"
    assert run("merge", "--adapter", adapter, "--output-dir", folder) == 0
    assert "largest difference" in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    handle = PeftModel.from_pretrained(load_base("sprout").eval(), str(adapter)).eval()
    ids = torch.arange(5, 25)[None]
    wide = handle(ids).logits.float()
    assert (plain(ids).logits.float() - wide).abs().max() < 0.05 * wide.abs().max()
    assert run("merge", "--adapter", adapter, "--output-dir", folder) == 2
    assert "already exists" in capsys.readouterr().err


def test_inspect_shows_an_adapter_without_its_base(adapter, capsys):
    assert run("inspect", adapter) == 0
    printed = capsys.readouterr().out
    for words in ("method     LORA", "base       sprout", "q_proj, v_proj", "8 (12 modules)", "sha256", "layer", "█"):
        assert words in printed
    assert run("inspect", adapter, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    handle = PeftModel.from_pretrained(load_base("sprout", dtype=torch.float32), str(adapter))
    plain = {name: p.clone() for name, p in handle.bare_base.named_parameters()}
    merged = handle.merge_and_unload()
    path = "model.layers.2.self_attn.v_proj"
    change = merged.get_submodule(path).weight - plain[f"{path}.weight"]
    assert found["norms"]["2"]["v_proj"] == pytest.approx(change.norm().item(), rel=1e-3)


@pytest.mark.parametrize("method", ["ia3", "prompt-tuning", "vera", "adalora", "lokr", "bottleneck", "prefix-tuning"])
def test_inspect_reads_every_kind(method, tmp_path, capsys):
    from tunesmith import get_peft_model
    from tunesmith.jobs.settings import Settings

    get_peft_model(load_base("sprout"), Settings(method).peft_config("sprout")).save_pretrained(tmp_path)
    assert run("inspect", tmp_path) == 0
    assert f"method     {method.upper().replace('-', '_')}" in capsys.readouterr().out


def test_inspect_tells_faults(adapter, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    (tmp_path / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: tensors[name] * float("nan")}, tmp_path / "adapter_model.safetensors")
    assert run("inspect", tmp_path) == 1
    assert "not finite" in capsys.readouterr().err
    save_file({n: t * 0 if "lora_B" in n else t for n, t in tensors.items()}, tmp_path / "adapter_model.safetensors")
    assert run("inspect", tmp_path) == 1
    assert "changes nothing" in capsys.readouterr().err
    (tmp_path / "adapter_model.safetensors").write_bytes(b"12345678")
    assert run("inspect", tmp_path) == 1
    printed = capsys.readouterr()
    assert "damaged" in printed.err and "method     LORA" in printed.out


def test_doctor_says_what_is_here(capsys):
    assert run("doctor") == 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in printed and "processor" in printed and "model cache" in printed


def test_a_sweep_trains_each_combination_and_does_not_repeat(data_file, tmp_path, capsys):
    recipe = tmp_path / "sweep.yaml"
    recipe.write_text(
        f"data: {data_file}\noutput_dir: {tmp_path}/runs\nmethod: lora\nmax_steps: 2\n"
        "learning_rate: [1e-4, 1e-2]\nlora_r: [2, 4]\n"
    )
    assert run("sweep", recipe, "--dry-run") == 0
    names = capsys.readouterr().out.split()
    assert len(names) == 4 and "learning_rate=1e-4,lora_r=2" in names
    assert run("sweep", recipe) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    rows = json.loads((tmp_path / "runs" / "sweep.json").read_text())
    assert [row["run"] for row in rows] == names
    ranks = {json.loads((tmp_path / "runs" / name / "adapter_config.json").read_text())["r"] for name in names}
    assert ranks == {2, 4}
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("adapter_model.safetensors")}
    assert run("sweep", recipe) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1", "varies nothing"),
        ("seed: []", "empty list"),
        ("data: [a.csv, b.csv]", "cannot be varied"),
        ("seed: [1, 1]", "twice"),
        ("seed: [1, x]", "not a number"),
        ("lora_r: [1,2,3,4,5,6]\nseed: [1,2,3,4,5,6]\nmax_length: [1,2,3,4,5,6]", "216 runs"),
    ],
)
def test_a_sweep_that_makes_no_sense(text, words, tmp_path, capsys):
    recipe = tmp_path / "sweep.yaml"
    recipe.write_text(text)
    assert run("sweep", recipe, "--output-dir", tmp_path / "runs") == 2
    assert words in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_push_uploads_what_makes_the_adapter(adapter, tmp_path, monkeypatch, capsys):
    uploaded = {}

    def push_folder(save, repo_id, **options):
        place = tmp_path / "up"
        place.mkdir()
        save(str(place))
        uploaded[repo_id] = ({path.name for path in place.iterdir()}, options)
        return "https://hub/commit"

    monkeypatch.setattr("tunesmith.storage.hub.push_folder", push_folder)
    assert run("push", adapter, "me/mine", "--private", "--token", "t") == 0
    names = {"adapter_config.json", "adapter_model.safetensors", TEMPLATE_FILE, "README.md"}
    assert uploaded == {"me/mine": (names, {"private": True, "token": "t"})}
    assert "https://hub/commit" in capsys.readouterr().out
    assert run("push", adapter, "mine") == 2 and "owner/name" in capsys.readouterr().err
    assert run("push", tmp_path / "none", "me/mine") == 1


def test_memory_that_does_not_suffice_says_what_to_change(data_file, tmp_path, monkeypatch, capsys):
    from tunesmith.jobs import job

    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried much."),
        RuntimeError("[x] can't allocate memory: you tried"),
    ):

        def fails(*_, error=error, **__):
            raise error

        monkeypatch.setattr(job, "train", fails)
        assert run("train", "--data", data_file, "--method", "lora", "--output-dir", tmp_path / "out") == 4
        err = capsys.readouterr().err
        assert re.search(r"-batch-size 4 --gradient-accumulation-steps 2: about 0\.\d+ GB rather than 0\.\d+", err), err
        assert not (tmp_path / "out").exists()
