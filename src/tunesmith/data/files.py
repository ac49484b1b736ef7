"""Rows of csv, json, jsonl, parquet and txt files and of Hub data sets; errors name the file and the line."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, bullet_list, did_you_mean
from .readers import READERS, read_hub
from .rows import Record, Table, shortened

HUB_NAME = re.compile(r"[\w-]+/[\w.-]+")


def raise_faults(faults: list[str], rows: int, advice: str = "") -> None:
    """One error for all faulty rows; nothing where there are none.

    Args:
        advice: what else can be done, if some rows are good.

    Raises:
        DataError: the first 20 faults, and how many more there are.
    """
    advice = f"\n{advice}" if advice and len(faults) < rows else ""
    if len(faults) == 1:
        raise DataError(faults[0] + advice)
    if faults:
        raise DataError(f"{len(faults)} of {rows} rows cannot be used:\n{bullet_list(faults)}{advice}")


def read_table(path: str | Path) -> Table:
    """All rows of a data file (UTF-8), or of a data set on the Hub (`owner/name`, its train split).

    Raises:
        DataError: the file is missing, of an unknown kind, empty, not UTF-8 or broken as a whole.
    """
    file, table = Path(path), Table(str(path))
    try:
        table.records = list(_records(file, table))
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(file, error)) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    if not table.records and not table.faults:
        raise DataError(f"{path} holds no rows; give a file with one example per row")
    return table


def read_texts(path: str | Path, column: str | None = None) -> list[str]:
    """The text of every row, in order.

    Args:
        path: a data file; a txt file holds one text per line.
        column: which column or key holds the text; may be left out when there is only one.

    Raises:
        DataError: the file cannot be read, or rows lack the column; says where.
    """
    table = read_table(path)
    texts, faults = column_of(table, column)
    raise_faults([*table.faults, *faults], len(table.records) + len(table.faults))
    return [text for _, text in texts]


def column_of(table: Table, column: str | None = None) -> tuple[list[tuple[str, str]], list[str]]:
    """`([(where, text)], faults)` of one column that holds texts.

    Raises:
        DataError: no row has the column, or none is named and there are several.
    """
    columns = table.columns
    if column is None and len(columns) > 1:
        raise DataError(
            f"{table.path} has the columns {', '.join(columns)}; choose the one that holds the text: --text-column {columns[0]}"
        )
    column = column or (columns[0] if columns else "text")
    if table.records and column not in columns:
        raise DataError(no_column(table.path, column, columns))
    texts, faults = [], []
    for record in table.records:
        value = record.row.get(column)
        if column not in record.row:
            faults.append(no_column(record.where, column, record.row))
        elif not isinstance(value, str) or not value.strip():
            faults.append(f'{record.where}: column "{column}" holds {shortened(value)}, expected text')
        else:
            texts.append((record.where, value))
    return texts, faults


def check_new_folder(folder: Path) -> None:
    """`check_folder` for a result that is never mixed with older files.

    Raises:
        ConfigError: it is not empty, is a file, or cannot be written to.
    """
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise ConfigError(f"{folder} already exists; choose another --output-dir")
    check_folder(folder)


def check_folder(folder: Path) -> None:
    """Make sure that results can be written into `folder`, before any work is done.

    Raises:
        ConfigError: it is a file, or cannot be written to.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".tunesmith-", dir=there):  # a name of its own: other processes check, too
            pass
    except OSError as error:
        raise ConfigError(f"cannot write to {folder} ({error.strerror}); choose another --output-dir") from error


def no_column(where: object, column: str, columns: Any) -> str:
    """The sentence for a missing column, with the nearest one."""
    return f'{where}: no column "{column}"; columns: {", ".join(map(str, columns))}{did_you_mean(column, columns)}'


def _records(path: Path, table: Table) -> Iterator[Record]:
    if not path.is_file():
        if path.exists():
            raise DataError(f"{path} is a folder; give a data file")
        if HUB_NAME.fullmatch(str(path)) and path.suffix.lower() not in READERS:
            return read_hub(str(path))
        raise DataError(f"{path}: no such file")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f'{path}: unsupported file type "{path.suffix}"; use {", ".join(READERS)}')
    return reader(path, table)


def _not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return f"{path}:1: not UTF-8 but UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {path.name} > utf8-{path.name}"
    line = data[: _first_bad_byte(data)].count(b"\n") + 1
    return f"{path}:{line}: not UTF-8 ({error.reason}); convert it: iconv -f LATIN1 -t UTF-8 {path.name} > utf8-{path.name}"


def _first_bad_byte(data: bytes) -> int:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return len(data)
