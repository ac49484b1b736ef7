"""Recognises a data set's format and turns its rows into conversations: lists of `{"role": ..., "content": ...}`.

messages            {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
sharegpt            {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}
alpaca              {"instruction": ..., "input": ..., "output": ...}
prompt-completion   {"prompt": ..., "completion": ...}
text                {"text": ...}; a conversation of one part, all of which is trained
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, did_you_mean
from .files import column_of, no_column, raise_faults, read_table
from .rows import Record, Row, Table, shortened

Message = dict[str, str]

ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system",
}  # fmt: skip
PAIRS = [("prompt", "completion"), ("prompt", "response"), ("question", "answer")]


@dataclass(frozen=True)
class Example:
    """One row as a conversation, and its place in its file."""

    where: str
    messages: list[Message]


@dataclass
class Examples:
    """A data set in one format.

    Args:
        format: which of `FORMATS`.
        total: how many rows the file has, faulty ones included.
        faults: a sentence for each row that cannot be used.
    """

    path: str
    format: str
    examples: list[Example] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return len(self.examples) + len(self.faults)


def good_examples(
    path: str | Path,
    *,
    text_column: str | None = None,
    columns: dict[str, str] | None = None,
    format: str | None = None,
    skip_bad_rows: bool = False,
) -> Examples:
    """`read_examples`, and one error for all faulty rows, unless they are to be skipped and others are good.

    Raises:
        DataError, ConfigError: as there, or rows are faulty.
    """
    found = read_examples(path, text_column=text_column, columns=columns, format=format)
    if not skip_bad_rows or not found.examples:
        raise_faults(found.faults, found.total, "fix or remove them, or skip them with --skip-bad-rows")
    return found


def read_examples(
    path: str | Path, *, text_column: str | None = None, columns: dict[str, str] | None = None, format: str | None = None
) -> Examples:
    """The rows of a data file as conversations; faulty rows are returned, not raised.

    Args:
        text_column: train on this column as plain text.
        columns: `{name here: name in the file}`, for files whose columns have other names.
        format: which of `FORMATS`; None infers it from the columns.

    Raises:
        DataError: the file cannot be read at all, or its format is not recognised.
        ConfigError: `format` is unknown.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f'format "{format}" is unknown{did_you_mean(format, FORMATS)}; use {", ".join(FORMATS)}')
    table = read_table(path)
    if columns:
        table = _renamed(table, columns)
    if text_column is not None or (format is None and len(table.columns) <= 1 and not set(table.columns) & NESTED):
        format = "text"
    format = format or recognise(table)
    result = Examples(table.path, format, faults=list(table.faults))
    if format == "text":
        texts, faults = column_of(table, text_column or ("text" if "text" in table.columns else None))
        result.examples = [Example(where, [{"role": "assistant", "content": text}]) for where, text in texts]
        result.faults += faults
        return result
    for record in table.records:
        try:
            result.examples.append(Example(record.where, FORMATS[format](record.row)))
        except RowFault as fault:
            result.faults.append(f"{record.where}: {fault}")
    return result


def recognise(table: Table) -> str:
    """The format of a data set, by its columns.

    Raises:
        DataError: no format has such columns.
    """
    names = set(table.columns)
    if {"chosen", "rejected"} <= names:
        raise DataError(f"{table.path} holds preferences (chosen, rejected); training needs rows with one answer each")
    if "messages" in names:
        return "messages"
    if "conversations" in names:
        return "sharegpt"
    if {"instruction", "output"} <= names:
        return "alpaca"
    if any({prompt, completion} <= names for prompt, completion in PAIRS):
        return "prompt-completion"
    if "text" in names:
        return "text"
    first = table.columns[0]
    raise DataError(
        f"{table.path} has the columns {', '.join(table.columns)}, which match no known format; choose the text "
        f"column (--text-column {first}), or say what each one is (--columns instruction={first},output=...)"
    )


def _renamed(table: Table, columns: dict[str, str]) -> Table:
    found = table.columns
    missing = [name for name in columns.values() if name not in found]
    if missing:
        raise DataError(no_column(table.path, missing[0], found))
    back = {there: here for here, there in columns.items()}

    def row(record: Record) -> Row:
        kept = {name: value for name, value in record.row.items() if name in back or name not in columns}
        return {back.get(name, name): value for name, value in kept.items()}

    return Table(table.path, [Record(record.where, row(record)) for record in table.records], table.faults)


# --- rows of each format ----------------------------------------------------------------------------------------------------


class RowFault(ValueError):
    """A row cannot be used, and why."""


def _text(row: Row, name: str, may_be_empty: bool = False) -> str:
    if name not in row:
        raise RowFault(f'no column "{name}"; columns: {", ".join(map(str, row))}{did_you_mean(name, map(str, row))}')
    value = row[name]
    if value is None and may_be_empty:
        return ""
    if not isinstance(value, str):
        raise RowFault(f'"{name}" holds {shortened(value)}, expected text')
    if not may_be_empty and not value.strip():
        raise RowFault(f'"{name}" is empty')
    return value


def _alpaca(row: Row) -> list[Message]:
    instruction, given = _text(row, "instruction"), _text({"input": "", **row}, "input", may_be_empty=True)
    asked = f"{instruction}\n{given}" if given.strip() else instruction
    system = _text({"system": "", **row}, "system", may_be_empty=True)
    user = {"role": "user", "content": asked, "instruction": instruction, "input": given}
    start = [{"role": "system", "content": system}] if system.strip() else []
    return [*start, user, {"role": "assistant", "content": _text(row, "output")}]


def _pair(row: Row) -> list[Message]:
    prompt, completion = next((pair for pair in PAIRS if pair[0] in row and pair[1] in row), PAIRS[0])
    if isinstance(row.get(prompt), list) and isinstance(row.get(completion), list):
        return _conversation([*row[prompt], *row[completion]], "role", "content")
    return [{"role": "user", "content": _text(row, prompt)}, {"role": "assistant", "content": _text(row, completion)}]


def _messages(row: Row) -> list[Message]:
    return _conversation(row.get("messages"), "role", "content")


def _sharegpt(row: Row) -> list[Message]:
    said = _conversation(row.get("conversations"), "from", "value")
    system = _text({"system": "", **row}, "system", may_be_empty=True)
    return [{"role": "system", "content": system}, *said] if system.strip() else said


def _conversation(turns: Any, role_key: str, content_key: str) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise RowFault(f"holds {shortened(turns)} instead of a list of messages")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise RowFault(f'message {number} is {shortened(turn)}, expected {{"{role_key}": ..., "{content_key}": ...}}')
        role = turn.get(role_key)
        if role not in ROLES:
            raise RowFault(f'message {number} has "{role_key}": {shortened(role)}; known: {", ".join(ROLES)}')
        try:
            messages.append({"role": ROLES[role], "content": _text(turn, content_key)})
        except RowFault as fault:
            raise RowFault(f"message {number}: {fault}") from fault
    if messages[-1]["role"] != "assistant":
        raise RowFault(f"ends with a {messages[-1]['role']} message; the last one must be the assistant's answer")
    return messages


def _plain(row: Row) -> list[Message]:
    return [{"role": "assistant", "content": _text(row, "text")}]


NESTED = {"messages", "conversations"}
FORMATS: dict[str, Callable[[Row], list[Message]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _pair,
    "text": _plain,
}
