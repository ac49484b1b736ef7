"""Pieces of text to token ids and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..labels import IGNORED
from .templates import Piece


@dataclass
class Encoded:
    """Token ids and labels of a data set.

    Args:
        examples: `input_ids` and `labels` of each row with something to train on.
        lengths: tokens of each row before truncation.
        cut: how many rows were truncated.
        empty: how many rows were skipped because no trained tokens were left.
    """

    examples: list[dict[str, list[int]]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    cut: int = 0
    empty: int = 0

    @property
    def tokens(self) -> int:
        return sum(len(example["input_ids"]) for example in self.examples)


def encode(rows: Sequence[Sequence[Piece]], tokenizer: Any, max_length: int) -> Encoded:
    """Ids and labels of rows; longer ones are truncated to `max_length` tokens, end of text included."""
    result = Encoded()
    for pieces in rows:
        ids, labels = encode_row(pieces, tokenizer)
        result.lengths.append(len(ids))
        result.cut += len(ids) > max_length
        ids, labels = ids[:max_length], labels[:max_length]
        if any(label != IGNORED for label in labels[1:]):
            result.examples.append({"input_ids": ids, "labels": labels})
        else:
            result.empty += 1
    return result


def encode_row(pieces: Sequence[Piece], tokenizer: Any) -> tuple[list[int], list[int]]:
    """`(ids, labels)` of one row: trained tokens are their own labels, and the end of text is always trained.

    The whole text is tokenized at once if the question has the same tokens alone as with its answer. Otherwise, as when a
    space at its end would merge with the answer's first word, each piece is tokenized alone, because generation starts
    from the question's own tokens.
    """
    ids = encode_text("".join(piece.text for piece in pieces), tokenizer)
    labels: list[int] = []
    text = ""
    for piece in pieces:
        text += piece.text
        part = encode_text(text, tokenizer)
        if ids[: len(part)] != part:
            ids, labels = _piece_by_piece(pieces, tokenizer)
            break
        labels += ids[len(labels) : len(part)] if piece.trained else [IGNORED] * (len(part) - len(labels))
    end = tokenizer.eos_token_id
    trained = [label for label in labels if label != IGNORED]
    if end is not None and end not in trained[-2:]:  # a template may write a line break after its end-of-turn mark
        ids, labels = [*ids, end], [*labels, end]
    return ids, labels


def _piece_by_piece(pieces: Sequence[Piece], tokenizer: Any) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    for piece in pieces:
        part = tokenizer(piece.text, add_special_tokens=False)["input_ids"] if ids else encode_text(piece.text, tokenizer)
        ids += part
        labels += part if piece.trained else [IGNORED] * len(part)
    return ids, labels


def encode_text(text: str, tokenizer: Any) -> list[int]:
    """Ids of a text as the model reads it: with one beginning-of-text token if the tokenizer adds it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    begin = getattr(tokenizer, "bos_token_id", None)
    if begin is not None and ids[:1] != [begin] and tokenizer("x")["input_ids"][:1] == [begin]:
        return [begin, *ids]
    return ids
