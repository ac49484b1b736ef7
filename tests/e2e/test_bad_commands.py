"""Whatever is wrong with what a person gives the command line: one clear message, the right exit code, nothing half-written."""

from __future__ import annotations

import json
import resource

import pytest

from tests.e2e.test_cli import run
from tunesmith import LoraConfig, get_peft_model, load_base

GOOD = [{"instruction": f"Name plant {n}.", "input": "", "output": "A rose."} for n in range(12)]
FILES: dict[str, bytes] = {
    "good.json": json.dumps(GOOD).encode(),
    "empty.json": b"",
    "empty.csv": b"",
    "empty-list.json": b"[]",
    "header.csv": b"instruction,output\n",
    "object.json": b'{"data": []}',
    "comma.json": b'[{"text": "a"},\n]',
    "cut.json": b'[{"text": "a"},\n{"text": "b"',
    "cut.jsonl": b'{"text": "a"}\n{"text": "b"\n{"text": \n',
    "twice.jsonl": b'{"text": "a", "text": "b"}\n',
    "twice.csv": b"text,text\na,b\n",
    "number.jsonl": b'{"text": "a"}\n{"text": 5}\n',
    "null.jsonl": b'{"text": "a"}\n{"text": null}\n',
    "list.jsonl": b'{"text": "a"}\n["a"]\n',
    "missing.jsonl": b'{"instruction": "a", "output": "b"}\n{"instruction": "a", "outptu": "b"}\n',
    "blank.json": json.dumps([*GOOD, {"instruction": " ", "output": "b"}]).encode(),
    "short.csv": b"instruction,output\na,b\na\na,b,c\n",
    "quote.csv": b'text\n"a\nb\n',
    "latin.csv": b"text\ncaf\xe9\n",
    "utf16.csv": "text\na\n".encode("utf-16"),
    "zip.parquet": b"PK\x03\x04 no parquet",
    "nothing.xml": b"<a/>",
    "roles.jsonl": json.dumps({"messages": [{"role": "wizard", "content": "a"}]}).encode(),
    "open.jsonl": json.dumps({"messages": [{"role": "user", "content": "a"}]}).encode(),
    "no-list.jsonl": json.dumps({"messages": "a"}).encode(),
    "from.jsonl": json.dumps({"conversations": [{"role": "user", "content": "a"}]}).encode(),
    "prefer.jsonl": json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}).encode(),
    "strange.csv": b"a,b\n1,2\n",
    "deep.json": b"[" * 100_000,
    "one.json": json.dumps(GOOD[:1]).encode(),
    "bad.yaml": b"a: [",
    "list.yaml": b"- a\n",
    "keys.yaml": b"learning_rat: 1\nlora_rr: 2\n",
    "again.yaml": b"seed: 1\nseed: 2\n",
    "types.yaml": b"data: good.json\nlora_r: many\n",
    "binary.yaml": b"\xff\xfe\x00",
    "mine.jinja": b"{{ question }}",
    "open.jinja": b"{% for m in messages %}",
}
TRAIN = ["train", "--method", "lora", "--output-dir", "out", "--data"]

BAD: dict[str, tuple[list[str], int, list[str]]] = {
    # data files
    "no such file": ([*TRAIN, "none.json"], 3, ["none.json: no such file"]),
    "a folder": ([*TRAIN, "."], 3, ["is a folder"]),
    "unknown kind": ([*TRAIN, "nothing.xml"], 3, ['unsupported file type ".xml"', ".parquet"]),
    "empty json": ([*TRAIN, "empty.json"], 3, ["empty.json holds nothing", "list of objects"]),
    "empty csv": ([*TRAIN, "empty.csv"], 3, ["holds no rows"]),
    "empty list": ([*TRAIN, "empty-list.json"], 3, ["holds no rows"]),
    "header alone": ([*TRAIN, "header.csv"], 3, ["holds no rows"]),
    "an object": ([*TRAIN, "object.json"], 3, ["holds dict", "list of objects"]),
    "comma at the end": ([*TRAIN, "comma.json"], 3, ["comma.json:2", "comma after the last row"]),
    "cut json": ([*TRAIN, "cut.json"], 3, ["cut.json:2", "malformed json"]),
    "cut jsonl": ([*TRAIN, "cut.jsonl"], 3, ["2 of 3 rows", "cut.jsonl:2", "cut.jsonl:3"]),
    "key twice": ([*TRAIN, "twice.jsonl"], 3, ["twice.jsonl:1", '"text" appears twice']),
    "column twice": ([*TRAIN, "twice.csv"], 3, ["twice.csv:1", '"text" appears twice']),
    "number for text": ([*TRAIN, "number.jsonl"], 3, ["number.jsonl:2", "holds 5, expected text"]),
    "null for text": ([*TRAIN, "null.jsonl"], 3, ["null.jsonl:2", "None"]),
    "list for a row": ([*TRAIN, "list.jsonl"], 3, ["list.jsonl:2", "expected an object"]),
    "column misspelt in one row": ([*TRAIN, "missing.jsonl"], 3, ["missing.jsonl:2", 'no column "output"', "outptu"]),
    "blank instruction": ([*TRAIN, "blank.json"], 3, ["blank.json:1", '"instruction" is empty']),
    "rows of other lengths": ([*TRAIN, "short.csv"], 3, ["2 of 3 rows", "short.csv:3", "short.csv:4", "expected 2 columns"]),
    "open quote": ([*TRAIN, "quote.csv"], 3, ["malformed csv"]),
    "latin-1": ([*TRAIN, "latin.csv"], 3, ["latin.csv:2", "not UTF-8", "iconv"]),
    "utf-16": ([*TRAIN, "utf16.csv"], 3, ["UTF-16", "iconv"]),
    "no parquet": ([*TRAIN, "zip.parquet"], 3, ["damaged or not a parquet file"]),
    "unknown role": ([*TRAIN, "roles.jsonl"], 3, ["roles.jsonl:1", "'wizard'", "known: user"]),
    "no answer": ([*TRAIN, "open.jsonl"], 3, ["open.jsonl:1", "must be the assistant's answer"]),
    "text for messages": ([*TRAIN, "no-list.jsonl"], 3, ["no-list.jsonl:1", "list of messages"]),
    "messages for sharegpt": ([*TRAIN, "from.jsonl"], 3, ["from.jsonl:1", '"from": None']),
    "preferences": ([*TRAIN, "prefer.jsonl"], 3, ["preferences (chosen, rejected)"]),
    "strange columns": ([*TRAIN, "strange.csv"], 3, ["columns a, b", "--text-column a", "--columns instruction=a"]),
    "nested too deep": ([*TRAIN, "deep.json"], 3, ["deep.json:1", "recursion"]),
    "one row": ([*TRAIN, "one.json", "--held-out", "0.9", "--max-length", "2"], 3, ["raise --max-length"]),
    "wrong format": ([*TRAIN, "good.json", "--format", "alpacca"], 2, ["alpacca", "did you mean 'alpaca'"]),
    "format that does not fit": ([*TRAIN, "good.json", "--format", "messages"], 3, ["12 of 12 rows", "list of messages"]),
    "text column that is none": ([*TRAIN, "good.json", "--text-column", "instructon"], 3, ["did you mean 'instruction'"]),
    "columns that are none": ([*TRAIN, "good.json", "--columns", "prompt=ask"], 3, ['no column "ask"']),
    # recipes and flags
    "no recipe": (["train", "none.yaml"], 2, ["none.yaml cannot be read"]),
    "malformed recipe": (["train", "bad.yaml"], 2, ["bad.yaml:1", "malformed yaml"]),
    "a list for a recipe": (["train", "list.yaml"], 2, ["holds a list"]),
    "unknown keys": (["train", "keys.yaml"], 2, ["learning_rat", "'learning_rate'", "lora_rr", "'lora_r'"]),
    "recipe key twice": (["train", "again.yaml"], 2, ["again.yaml:2", "appears twice"]),
    "wrong type in a recipe": (["train", "types.yaml"], 2, ["lora_r='many'", "not a number"]),
    "binary recipe": (["train", "binary.yaml"], 2, ["not UTF-8"]),
    "no data": (["train", "--method", "lora"], 2, ["no data", "--data"]),
    "unknown flag": ([*TRAIN, "good.json", "--learning-rat", "1"], 2, ["No such option", "--learning-rate"]),
    "unknown method": ([*TRAIN, "good.json", "--method", "lora-x"], 2, ["lora-x", "did you mean 'lora'"]),
    "text for a number": ([*TRAIN, "good.json", "--lora-r", "8x"], 2, ["--lora-r='8x'", "not a number"]),
    "fraction for a count": ([*TRAIN, "good.json", "--batch-size", "2.5"], 2, ["not a whole number"]),
    "no steps": ([*TRAIN, "good.json", "--max-steps", "0"], 2, ["max_steps=0"]),
    "unknown schedule": ([*TRAIN, "good.json", "--lr-scheduler-type", "cosin"], 2, ["did you mean 'cosine'"]),
    "held-out above 1": ([*TRAIN, "good.json", "--held-out", "1.5"], 2, ["held_out=1.5"]),
    "no room": (
        ["train", "--data", "good.json", "--output-dir", "out", "--num-virtual-tokens", "300"], 2, ["leaves no room"],
    ),
    "target that is not there": ([*TRAIN, "good.json", "--lora-target-modules", "q_prj"], 1, ['"q_prj"', "q_proj"]),
    "method's field": ([*TRAIN, "good.json", "--option", "use_dorra=true"], 2, ["use_dorra", "'use_dora'"]),
    # templates
    "unknown template": ([*TRAIN, "good.json", "--template", "chatt"], 2, ["chatt", "did you mean 'chat'"]),
    "no chat template": ([*TRAIN, "good.json", "--template", "chat"], 2, ["has no chat template", "human-assistant"]),
    "template without messages": ([*TRAIN, "good.json", "--template", "mine.jinja"], 2, ["does not mention `messages`"]),
    "broken template": ([*TRAIN, "good.json", "--template", "open.jinja"], 2, ["open.jinja", "line 1"]),
    # places
    "output that is a file": ([*TRAIN, "good.json", "--output-dir", "good.json"], 2, ["cannot write to good.json"]),
    "output that cannot be written": ([*TRAIN, "good.json", "--output-dir", "/proc/out"], 2, ["cannot write to /proc/out"]),
    "base that is not there": ([*TRAIN, "good.json", "--base", "./none"], 1, ['base model "./none" cannot be loaded']),
    "resume of nothing sound": ([*TRAIN, "good.json", "--output-dir", "cut-run", "--resume"], 2, ["no recipe.resolved.yaml"]),
    # other verbs
    "validate nothing": (["validate", "none.json"], 3, ["no such file"]),
    "validate without room": (["validate", "good.json", "--max-length", "1"], 2, ["max_length=1"]),
    "eval of an adapter that is not there": (["eval", "--data", "good.json", "--adapter", "none"], 1, ["none"]),
    "eval of bad rows": (["eval", "--data", "number.jsonl"], 3, ["number.jsonl:2"]),
    "eval into no folder": (["eval", "--data", "good.json", "--output", "/proc/out/a.json"], 2, ["cannot write to"]),
    "generate nothing": (["generate", "--prompt", ""], 2, ["prompt is empty"]),
    "generate too cold": (["generate", "--prompt", "a", "--temperature", "-1"], 2, ["--temperature"]),
    "generate with a damaged template": (["generate", "--prompt", "a", "--adapter", "damaged"], 1, ["is not a valid template"]),
    "chat with no such adapter": (["chat", "--adapter", "./none"], 1, ["none"]),
    "merge into a full folder": (["merge", "--adapter", "adapter", "--output-dir", "."], 2, ["already exists"]),
    "merge what cannot be": (["merge", "--adapter", "prompts", "--output-dir", "out"], 1, ["cannot be merged"]),
    "inspect nothing": (["inspect", "none"], 1, ["none"]),
    "inspect a folder without adapter": (["inspect", "cut-run"], 1, ["holds no adapter_config.json"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with every file above, an adapter, one whose template is damaged, one of prompts, and half a run."""
    from tunesmith import PromptTuningConfig

    folder = tmp_path_factory.mktemp("place")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    base = load_base("sprout")
    for name in ("adapter", "damaged"):
        get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2)).save_pretrained(folder / name)
    (folder / "damaged" / "tunesmith_template.json").write_text("{")
    get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(folder / "prompts")
    (folder / "cut-run" / "checkpoint-5").mkdir(parents=True)
    (folder / "cut-run" / "checkpoint-5" / "trainer_state.json").write_text("{}")
    return folder


def contents(folder) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("case", BAD)
def test_one_clear_message_and_nothing_written(case, place, monkeypatch, capsys):
    arguments, code, words = BAD[case]
    monkeypatch.chdir(place)
    before = contents(place)
    assert run(*arguments) == code, capsys.readouterr().err
    err = capsys.readouterr().err
    assert all(word in err for word in words), err
    assert "Traceback" not in err and err.count("error:") <= 1 and len(err) < 2000
    assert contents(place) == before


def test_a_hundred_bad_rows_are_counted_and_twenty_shown(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": {number}}}\n' for number in range(100)))
    assert run("train", "--data", path, "--output-dir", tmp_path / "out") == 3
    err = capsys.readouterr().err
    assert "100 of 100 rows" in err and f"{path}:20" in err and f"{path}:21" not in err and "... and 80 more" in err


def test_a_huge_row_is_read_and_cut(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "word " * 60_000 + "\nshort\n")
    assert run("validate", path) == 0
    assert "1 of 2 rows are longer than 256 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["merge", "train"])
def test_a_full_disk_leaves_nothing_half_written(verb, place, monkeypatch, capsys):
    """As far as a limit on the size of files is like a full disk."""
    monkeypatch.chdir(place)
    before = contents(place)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    arguments = {
        "merge": ["merge", "--adapter", "adapter", "--output-dir", "full"],
        "train": [*TRAIN, "good.json", "--output-dir", "full", "--max-steps", "2", "--lora-r", "64"],
    }[verb]
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code = run(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    err = capsys.readouterr().err
    assert code == 1 and "cannot be written" in err and "Traceback" not in err, err
    new = {name for name in contents(place).keys() - before.keys() if "full" in name}
    assert not {name for name in new if name.endswith((".safetensors", "adapter_config.json"))}, new
