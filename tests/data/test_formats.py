"""Forms of data: which one a file has, and its rows."""

from __future__ import annotations

import json

import pytest

from tunesmith import DataError
from tunesmith.data.formats import read_examples

FORMS = {
    "alpaca": {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    "messages": {"messages": [{"role": "user", "content": "Add.\n1 and 2"}, {"role": "assistant", "content": "3"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Add.\n1 and 2"}, {"from": "gpt", "value": "3"}]},
    "prompt-completion": {"prompt": "Add.\n1 and 2", "completion": "3"},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_recognised_and_says_the_same(form, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(FORMS[form]) + "\n")
    found = read_examples(path)
    assert found.format == form and not found.faults
    said = [(message["role"], message["content"]) for message in found.examples[0].messages]
    assert said == [("user", "Add.\n1 and 2"), ("assistant", "3")]


def test_an_alpaca_row_may_lack_its_input_and_have_a_system_text(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": "Add.", "output": "3", "system": "Count."}, {**FORMS["alpaca"], "input": ""}]))
    first, second = read_examples(path).examples
    assert [message["role"] for message in first.messages] == ["system", "user", "assistant"]
    assert first.messages[1]["content"] == second.messages[0]["content"] == "Add."


def test_columns_can_have_other_names(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("task,answer,output\nAdd.,3,ignored\n")
    found = read_examples(path, columns={"instruction": "task", "output": "answer"})
    assert found.format == "alpaca" and found.examples[0].messages[-1]["content"] == "3"
    with pytest.raises(DataError, match=r'no column "tsk"; columns: task, answer, output; did you mean .task'):
        read_examples(path, columns={"instruction": "tsk"})


def test_parquet_rows_are_read_and_numbered(tmp_path):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path = tmp_path / "rows.parquet"
    parquet.write_table(arrow.table({"prompt": ["a", "b"], "completion": ["c", None]}), path)
    found = read_examples(path)
    assert found.format == "prompt-completion" and len(found.examples) == 1
    assert found.faults == [f'{path}: row 2: "completion" holds None, expected text']


def test_every_faulty_row_is_told_with_its_line(tmp_path):
    path = tmp_path / "rows.json"
    rows = [
        FORMS["alpaca"],
        {"instruction": "", "output": "3"},
        {"instruction": "Add."},
        {"instruction": "Add.", "output": 3},
        7,
    ]
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]")
    found = read_examples(path)
    assert len(found.examples) == 1 and found.total == 5
    text = "\n".join(found.faults)
    for line, words in {
        3: '"instruction" is empty',
        4: 'no column "output"',
        5: "holds 3, expected text",
        6: "holds 7",
    }.items():
        assert f"{path}:{line}" in text and words in text
