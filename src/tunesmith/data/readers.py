"""One reader for each kind of file: rows with their places; faults go to the table, or end the reading."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ..errors import DataError
from .rows import Record, Table, shortened


def _read_csv(path: Path, table: Table) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # the default limit refuses texts of 128 KB
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter=_delimiter(file), strict=True)
        header: list[str] | None = None
        line = 1
        try:
            for cells in reader:
                start, line = line, reader.line_num + 1
                if not cells:
                    continue
                if header is None:
                    header = cells
                    _check_header(path, header)
                elif len(cells) != len(header):
                    table.faults.append(f"{path}:{start}: expected {len(header)} columns, found {len(cells)}")
                else:
                    yield Record(f"{path}:{start}", dict(zip(header, cells)))
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: malformed csv ({error})") from error


def _delimiter(file: TextIO) -> str:
    """The separator of columns: a comma, or a semicolon or tab if the first line has one and no comma."""
    first = next((line for line in file if line.strip()), "")
    file.seek(0)
    return next((mark for mark in ",;\t" if mark in first), ",")


def _check_header(path: Path, header: list[str]) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f'{path}:1: column "{twice[0]}" appears twice; give each column its own name')


def _read_json(path: Path, table: Table) -> Iterator[Record]:
    text = path.read_text(encoding="utf-8-sig")
    position = _skip(text, 0)
    if text[position : position + 1] != "[":
        kind = type(_decoded(text, position, path)[0]).__name__ if text.strip() else "nothing"
        raise DataError(f"{path} holds {kind}, expected a list of objects: [{{...}}, {{...}}]")
    position = _skip(text, position + 1)
    line, counted = 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        value, position = _decoded(text, position, path)
        record = _record(value, f"{path}:{line}", table)
        if record is not None:
            yield record
        position = _skip(text, position)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
            if text[position : position + 1] == "]":
                raise DataError(_malformed(path, json.JSONDecodeError("comma after the last row", text, position)))
        elif text[position : position + 1] != "]":
            raise DataError(_malformed(path, json.JSONDecodeError("expected a comma or the end of the list", text, position)))


def _skip(text: str, position: int) -> int:
    """The position of the next character that is not white space."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _decoded(text: str, position: int, path: Path) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise DataError(_malformed(path, error)) from error
    except (RecursionError, _DuplicateKey) as error:
        raise DataError(f"{path}:{text.count(chr(10), 0, position) + 1}: {error}") from error


def _malformed(path: Path, error: json.JSONDecodeError) -> str:
    return f"{path}:{error.lineno}: malformed json ({error.msg}, column {error.colno})"


class _DuplicateKey(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _DuplicateKey(f'key "{twice}" appears twice in one row; keep one')
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _read_jsonl(path: Path, table: Table) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = _record(_DECODER.decode(line), where, table)
            except json.JSONDecodeError as error:
                table.faults.append(f"{where}: malformed json ({error.msg}, column {error.colno})")
            except (RecursionError, _DuplicateKey) as error:
                table.faults.append(f"{where}: {error}")
            else:
                if record is not None:
                    yield record


def _read_txt(path: Path, table: Table) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield Record(f"{path}:{number}", {"text": line.rstrip("\r\n")})


def _read_parquet(path: Path, table: Table) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow: pip install 'tunesmith[data]'") from error
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path} is damaged or not a parquet file ({reason}); create it again") from error
    for number, row in enumerate(rows, 1):
        yield Record(f"{path}: row {number}", row)


def read_hub(name: str) -> Iterator[Record]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{name}: no such file; to load it as a Hub data set: pip install 'tunesmith[data]'") from error
    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{name}: no such file, and the Hub data set cannot be loaded ({reason})") from error
    for number, row in enumerate(rows, 1):
        yield Record(f"{name}: row {number}", row)


def _record(value: Any, where: str, table: Table) -> Record | None:
    if isinstance(value, str):
        return Record(where, {"text": value})
    if isinstance(value, dict) and value:
        return Record(where, value)
    table.faults.append(f'{where} holds {shortened(value)}, expected an object such as {{"text": ...}}')
    return None


READERS: dict[str, Callable[[Path, Table], Iterator[Record]]] = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
