"""Rows of csv, json, jsonl, parquet and txt files and of Hub data sets; errors name the file and the line."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ..errors import ConfigError, DataError, bullet_list, did_you_mean

Row = dict[str, Any]
HUB_NAME = re.compile(r"[\w-]+/[\w.-]+")


@dataclass(frozen=True)
class Record:
    """One row and where it stands, as errors name it: `prompts.csv:12`."""

    where: str
    row: Row


@dataclass
class Table:
    """What a data file holds: the rows that could be read, and a sentence for each that could not."""

    path: str
    records: list[Record] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        """Every column that any row has, in the order in which they first appear."""
        return list(dict.fromkeys(name for record in self.records for name in record.row))


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
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".tunesmith-probe"
        probe.touch()
        probe.unlink()
        if made:
            folder.rmdir()
    except OSError as error:
        raise ConfigError(f"cannot write to {folder} ({error.strerror}); choose another --output-dir") from error


def no_column(where: object, column: str, columns: Any) -> str:
    """The sentence for a missing column, with the nearest one."""
    return f'{where}: no column "{column}"; columns: {", ".join(map(str, columns))}{did_you_mean(column, columns)}'


def shortened(value: object, length: int = 60) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


# --- one reader for each kind of file -----------------------------------------------------------------------------------


def _records(path: Path, table: Table) -> Iterator[Record]:
    if not path.is_file():
        if path.exists():
            raise DataError(f"{path} is a folder; give a data file")
        if HUB_NAME.fullmatch(str(path)) and path.suffix.lower() not in _READERS:
            return _read_hub(str(path))
        raise DataError(f"{path}: no such file")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f'{path}: unsupported file type "{path.suffix}"; use {", ".join(_READERS)}')
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


def _read_hub(name: str) -> Iterator[Record]:
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


_READERS: dict[str, Callable[[Path, Table], Iterator[Record]]] = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
