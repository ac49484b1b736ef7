"""Checks of a configuration's values: each gives a sentence for what is wrong."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from .errors import did_you_mean


def unknown_key(key: str, cls: type, value: Any) -> str:
    """The sentence for a `key` that `cls` does not have, with the nearest field or the reason."""
    if key in getattr(cls, "not_supported", ()):
        return f"{cls.__name__}: {key}={value!r} is not supported by this version of Tunesmith; leave it out"
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    return f'{cls.__name__} has no field "{key}"{did_you_mean(key, names)}'


def means_off(cls: type, key: str, value: Any) -> bool:
    """Whether a known but unsupported key says that its feature is not used (scripts spell out such defaults)."""
    off: dict[str, tuple[Any, ...]] = getattr(cls, "not_supported", {})
    return key in off and (is_off(value) or value in off[key])


def is_off(value: Any) -> bool:
    """Whether a value of an unknown key means that its feature is not used."""
    return value is None or value is False or value in ("", 0, [], {}, "none")


# What people and tools write for a task, without case, spaces and punctuation.
_TASKS = {
    "CAUSAL_LM": ("causal", "causallm", "causallanguagemodeling", "textgeneration"),
    "SEQ_2_SEQ_LM": ("seq2seq", "seq2seqlm", "conditionalgeneration", "text2textgeneration"),
    "SEQ_CLS": ("seqcls", "sequencecls", "seqclassification", "sequenceclassification", "textclassification"),
    "TOKEN_CLS": ("tokencls", "tokenclassification"),
    "QUESTION_ANS": ("qa", "questionans", "questionanswer", "questionanswering"),
    "FEATURE_EXTRACTION": ("featureextraction",),
}


def task_name(written: Any) -> str | None:
    """The ecosystem's name of a task that is written otherwise ("causal_lm", "TaskType.CAUSAL_LM"); None if it is none."""
    key = re.sub(r"[\W_]", "", str(getattr(written, "value", written)).lower()).removeprefix("tasktype")
    return next((name for name, others in _TASKS.items() if key in others), None)


def whose_file(values: Mapping[str, Any]) -> str:
    """`; it looks like ...`: what an `adapter_config.json` without a method is, or nothing."""
    if "lora_parameters" in values or "fine_tune_type" in values:
        return "; it looks like one of mlx-lm, whose tensors have other names and are transposed"
    if "model_class" in values or "adapter_residual_before_ln" in values:
        return "; it looks like one of AdapterHub, which `adapters` loads"
    if "architectures" in values or "model_type" in values:
        return "; it looks like a whole model's, which AutoModel...from_pretrained loads"
    return ""


def is_switch(key: str, value: Any) -> bool:
    """Whether an unknown key switches a feature on; the ecosystem's configurations leave `use_...` off by default."""
    return key.startswith("use_") and not is_off(value)


def wrong_types(config: Any) -> Iterator[str]:
    """A sentence for each field whose value is not of the annotated type (files can hold anything)."""
    kind: Any = type(config)
    hints = _type_hints(kind)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not _fits(value, hints[field.name]):
            yield f"{field.name}={value!r} must be of type {str(field.type).replace(' | ', ' or ')}"


_type_hints = functools.cache(typing.get_type_hints)


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or origin is typing.Literal:
        return hint is Any or value in inner
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin in (list, set):
        return isinstance(value, (list, tuple, set, frozenset)) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def not_an_expression(text: str) -> str | None:
    try:
        re.compile(text)
    except re.error as error:
        return str(error)
    return None


def not_positive(values: Mapping[str, int | None], may_lack: bool = True) -> Iterator[str]:
    """Counts that are not; with `may_lack`, None is one that is not given."""
    for name, value in values.items():
        if value is None and may_lack:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            yield f"{name}={value!r} must be a whole number of at least 1"


def not_finite(values: Mapping[str, float]) -> Iterator[str]:
    for name, value in values.items():
        if not math.isfinite(value):
            yield f"{name}={value!r} must be a finite number"


def not_probability(values: Mapping[str, float]) -> Iterator[str]:
    for name, value in values.items():
        if not 0.0 <= value < 1.0:
            yield f"{name}={value!r} must be at least 0 and below 1"
