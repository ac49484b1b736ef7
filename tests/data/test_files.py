from __future__ import annotations

import pytest

from tunesmith import DataError
from tunesmith.data.files import read_texts


@pytest.mark.parametrize(
    ("name", "content", "column"),
    [
        ("a.csv", 'text,other\n"one, two",x\nthree,y\n', "text"),
        ("a.csv", "\ufefftext\none, two\nthree\n".replace("one, two", '"one, two"'), None),
        ("a.json", '[{"text": "one, two"}, {"text": "three"}]', None),
        ("a.json", '["one, two", "three"]', None),
        ("a.jsonl", '{"text": "one, two", "n": 1}\n\n{"text": "three", "n": 2}\n', "text"),
        ("a.txt", "one, two\n\nthree\n", None),
    ],
)
def test_reads_every_kind_of_file(name, content, column, tmp_path):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert read_texts(path, column) == ["one, two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"text\n\xff\xfe\n", ["a.csv:2", "not UTF-8"]),
        ("a.csv", b"text,b\none,two,three\n", ["a.csv:2", "2 columns"]),
        ("a.csv", b'text\n"one\n', ["malformed csv"]),
        ("a.csv", b"", ["no rows"]),
        ("a.csv", b"text,b\n  ,x\n", ["a.csv:2", "expected text"]),
        ("a.json", b'{"text": "one"}', ["dict", "list of objects"]),
        ("a.json", b'[{"text": "one"},]', ["malformed json"]),
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', ["a.jsonl:2", "malformed json"]),
        ("a.jsonl", b'{"text": "one"}\n{"txt": "two"}\n', ["a.jsonl:2", 'no column "text"']),
        ("a.jsonl", b'{"text": "one"}\n{"text": null}\n', ["a.jsonl:2", "None"]),
        ("a.jsonl", b"3\n", ["a.jsonl:1", "expected an object"]),
        ("a.xml", b"<a/>", ["unsupported file type", ".csv"]),
    ],
)
def test_bad_files_say_what_and_where(name, content, words, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_texts(path, "text")
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_columns_are_parted_as_spreadsheets_of_any_country_part_them(mark, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f'\ufeffpregunta{mark}respuesta\n¿Qué?{mark}"Uno; dos, tres"\n', encoding="utf-8")
    assert read_texts(path, "respuesta") == ["Uno; dos, tres"]
    assert read_texts(path, "pregunta") == ["¿Qué?"]


def test_a_column_of_texts_with_semicolons_is_one_column(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt\nFirst; then\nOnce more\n")
    assert read_texts(path, "prompt") == ["First; then", "Once more"]
