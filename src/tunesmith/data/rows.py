"""What a data file holds: rows with their places, and a sentence for each row that could not be read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


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


def shortened(value: object, length: int = 60) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."
