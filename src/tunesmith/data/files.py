"""Rows of a person's data file: csv, json, jsonl or txt, with errors that name the file and the line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, did_you_mean

Row = dict[str, Any]


def read_texts(path: str | Path, column: str | None = None) -> list[str]:
    """The text of every row, in order.

    Args:
        path: a csv, json (a list of objects), jsonl or txt (one text per line) file, UTF-8.
        column: which column or key holds the text; may be left out when there is only one.

    Raises:
        DataError: the file is missing, empty, not UTF-8 or malformed, or rows lack the column; says where.
    """
    path = Path(path)
    rows = list(_rows(path))
    if not rows:
        raise DataError(f"{path} holds no rows; give a file with one text per row")
    column = column or _only_column(path, rows[0][1])
    if path.suffix.lower() == ".csv" and column not in rows[0][1]:
        raise DataError(_no_column(path, column, rows[0][1]))
    texts, faults = [], []
    for line, row in rows:
        value = row.get(column)
        if column not in row:
            faults.append(_no_column(f"{path}:{line}", column, row))
        elif not isinstance(value, str) or not value.strip():
            faults.append(f'{path}:{line}: column "{column}" holds {value!r}, expected text')
        else:
            texts.append(value)
    if faults:
        more = f"\n... and {len(faults) - 5} more rows" if len(faults) > 5 else ""
        raise DataError("\n".join(faults[:5]) + more)
    return texts


def check_folder(folder: Path) -> None:
    """Make sure that results can be written into `folder`, before any work is done.

    Raises:
        ConfigError: it is a file, or may not be written to.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".tunesmith-probe"
        probe.touch()
        probe.unlink()
        if made:
            folder.rmdir()
    except OSError as error:
        raise ConfigError(f"cannot write into {folder} ({error.strerror}); give another --output-dir") from error


def _no_column(where: object, column: str, row: Row) -> str:
    return f'{where}: no column "{column}"; columns: {", ".join(row)}{did_you_mean(column, row)}'


def _only_column(path: Path, row: Row) -> str:
    if len(row) == 1:
        return next(iter(row))
    raise DataError(f"{path} has the columns {', '.join(row)}; say which one holds the text: --text-column {next(iter(row))}")


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    """`(line or row number, row)`."""
    if not path.is_file():
        raise DataError(f"{path}: no such file" if not path.exists() else f"{path} is a folder; give a data file")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f'{path}: unknown kind of file "{path.suffix}"; use {", ".join(_READERS)}')
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 ({error.reason} at byte {error.start}); convert the file") from error


def _read_csv(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(f"{path}:{reader.line_num}: expected {len(reader.fieldnames or ())} columns")
                yield reader.line_num, row
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: malformed csv ({error})") from error


def _read_json(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: malformed json ({error.msg})") from error
    if not isinstance(values, list):
        raise DataError(f"{path} holds a {type(values).__name__}, expected a list of objects")
    for number, value in enumerate(values, 1):
        yield number, _as_row(value, f"{path}: row {number}")


def _read_jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: malformed json ({error.msg})") from error
            yield number, _as_row(value, f"{path}:{number}")


def _read_txt(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, {"text": line.rstrip("\r\n")}


def _as_row(value: Any, where: str) -> Row:
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, dict) and value:
        return value
    raise DataError(f'{where} holds {value!r}, expected an object such as {{"text": ...}}')


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Row]]]] = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".txt": _read_txt,
}
