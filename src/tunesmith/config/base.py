"""Configurations: the ecosystem's field names, checked when made.

The dictionary form (`to_dict`, `from_dict`) is what `adapter_config.json` holds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

from typing_extensions import Self, dataclass_transform

from ..checks import is_off, is_switch, means_off, task_name, unknown_key, whose_file, wrong_types
from ..errors import ConfigError, did_you_mean
from ..seen_as import SeenAs
from ..storage.folder import CONFIG_FILE, AdapterFolder, write_folder, write_text
from .by_method import config_type

logger = logging.getLogger(__name__)


class PeftType(str, Enum):
    """Names of methods as adapter files spell them; `tunesmith.registry.all_methods()` says which ones are built in."""

    LORA = "LORA"
    PROMPT_TUNING = "PROMPT_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    P_TUNING = "P_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    ADALORA = "ADALORA"
    IA3 = "IA3"
    LOHA = "LOHA"
    LOKR = "LOKR"
    VERA = "VERA"
    OFT = "OFT"
    BOFT = "BOFT"
    HRA = "HRA"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    LN_TUNING = "LN_TUNING"
    BOTTLENECK = "BOTTLENECK"
    BITFIT = "BITFIT"


class TaskType(str, Enum):
    """What the adapted model is for; decides the handle's class."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


C = TypeVar("C", bound="type[PeftConfig]")


@dataclass_transform()
def config_class(cls: C) -> C:
    """Make `cls` a dataclass whose constructor answers an unknown keyword with the nearest real one."""
    dataclass(cls)
    init: Callable[..., None] = vars(cls)["__init__"]
    names = [f.name for f in dataclasses.fields(cls) if f.init]

    @functools.wraps(init)
    def checked(self: PeftConfig, *args: Any, **kwargs: Any) -> None:
        kwargs = {key: value for key, value in kwargs.items() if key in names or not means_off(cls, key, value)}
        wrong = [key for key in kwargs if key not in names]
        if wrong:
            raise ConfigError("; ".join(unknown_key(key, cls, kwargs[key]) for key in wrong))
        init(self, *args, **kwargs)

    cls.__init__ = checked  # type: ignore[method-assign]
    return cls


@config_class
class PeftConfig:
    """Fields every method shares.

    Args:
        task_type: a `TaskType` or its name; None for models without a task class (images, audio, own modules).
        base_model_name_or_path: filled in by `get_peft_model` from the base.
        revision: revision of the base on the Hub.
        inference_mode: adapters made with True do not train.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, Any] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    __class__ = SeenAs("PeftConfig")

    method: ClassVar[str | None] = None
    is_prompt_learning: ClassVar[bool] = False
    usual_learning_rate: ClassVar[float] = 2e-3  # what a training job takes when the user names none
    # Keys of the ecosystem's files that this version cannot act on, with the values (beyond `is_off`) that mean "off".
    not_supported: ClassVar[dict[str, tuple[Any, ...]]] = {}
    # Fields that the ecosystem's configuration of this method does not have, or has in its last releases: written where used.
    ours_alone: ClassVar[tuple[str, ...]] = ()
    # What a file held beside the fields: without effect here, and written again.
    unknown: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def __reduce__(self) -> tuple[Any, ...]:
        """By the type itself: pickle wants the class of what it calls by default to be `__class__`."""
        return object.__new__, (type(self),), self.__dict__

    def __post_init__(self) -> None:
        if self.method is not None:
            self.peft_type = PeftType(self.method) if self.method in PeftType.__members__ else self.method
        if self.task_type is not None and not isinstance(self.task_type, TaskType):
            name, known = task_name(self.task_type), [task.value for task in TaskType]
            if name is None:
                raise ConfigError(
                    f"task_type={self.task_type!r} is unknown; allowed: {', '.join(known)}"
                    + did_you_mean(str(self.task_type).upper(), known)
                )
            self.task_type = TaskType(name)
        faults = list(wrong_types(self)) or list(self.faults())
        if faults:
            raise ConfigError(f"{type(self).__name__}: " + "; ".join(faults))

    def faults(self) -> list[str]:
        """What is wrong with the values; each method adds its own sentences."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values under the ecosystem's names, sets as sorted lists."""
        values = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        values = {name: value for name, value in values.items() if name not in self.ours_alone or not is_off(value)}
        return {**self.unknown, **values}

    def checked(self) -> Self:
        """A copy, checked again because fields may have been set since."""
        values = dict(vars(self))
        unknown = values.pop("unknown", {})
        return type(self)(**values)._with(unknown)

    def _with(self, unknown: Mapping[str, Any]) -> Self:
        if unknown:
            self.__dict__["unknown"] = dict(unknown)
        return self

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> PeftConfig:
        """The config of the method that `values["peft_type"]` names.

        Keys of a later release, whose defaults nobody can know here, are kept and told of in one warning; so is a task that
        is none. What is known to change the computation and is not supported is an error, and so is a switch that is on.

        Raises:
            ConfigError: the method or a feature is not one of this version's, or a value is not allowed.
        """
        values = {**values, **overrides}
        if not values.get("peft_type"):
            raise ConfigError(f'the configuration has no "peft_type", so its method is unknown{whose_file(values)}')
        target: type[PeftConfig] = config_type(values["peft_type"])
        if cls is not PeftConfig and not issubclass(target, cls):
            raise ConfigError(f"this is a {values['peft_type']} configuration, not a {cls.__name__}")
        values = target.understood(values)
        names = {f.name for f in dataclasses.fields(target) if f.init}
        misspelt = [key for key in overrides if key not in names]
        if misspelt:
            raise ConfigError("; ".join(unknown_key(key, target, overrides[key]) for key in misspelt))
        fields = {key: value for key, value in values.items() if key in names}
        unknown = {
            key: value
            for key, value in values.items()
            if key not in names and key not in _INFORMATIVE and not means_off(target, key, value)
        }
        used = [key for key, value in unknown.items() if key in target.not_supported or is_switch(key, value)]
        if used:
            raise ConfigError("; ".join(unknown_key(key, target, unknown[key]) for key in used))
        strange = [f"{key}={value!r}" for key, value in sorted(unknown.items())]
        task = fields.get("task_type")
        if task is not None and task_name(task) is None:
            strange.append(f"task_type={fields.pop('task_type')!r}")
        if strange:
            logger.warning(
                "unknown to this version of Tunesmith, and without effect: %s (the file was written by %s)",
                ", ".join(strange),
                next((f"{key.partition('_')[0]} {values[key]}" for key in _INFORMATIVE if values.get(key)), "another tool"),
            )
        return target(**fields)._with(unknown)

    @classmethod
    def understood(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The values of a file, less what the ecosystem writes into it without meaning it."""
        return values

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> PeftConfig:
        """Read `adapter_config.json` from a folder or the Hub (kwargs: see `storage/options.py`)."""
        return read_config(AdapterFolder.find(pretrained_model_name_or_path, subfolder=subfolder, **kwargs), cls)

    def save_pretrained(self, save_directory: str) -> None:
        """Write `adapter_config.json` into `save_directory`, whole or not at all."""
        write_folder(save_directory, {CONFIG_FILE: functools.partial(write_text, config_text(self))})


def read_config(folder: AdapterFolder, cls: type[PeftConfig] = PeftConfig) -> PeftConfig:
    """The configuration of the adapter in `folder`.

    Raises:
        AdapterFileError: its file is missing or is not a JSON object.
        ConfigError: its values are not allowed, or ask for a feature this version does not have.
    """
    values = folder.values()
    try:
        return cls.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{folder.locate(CONFIG_FILE)}: {error}") from error


def config_text(config: PeftConfig) -> str:
    """The configuration as its file holds it: for inference, under public names."""
    return json.dumps({**config.to_dict(), "inference_mode": True}, indent=2, sort_keys=True) + "\n"


# Written by the ecosystem for information, or about the running process; they never change the model.
_INFORMATIVE = ("peft_version", "tunesmith_version", "transformers_version", "runtime_config")


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, tuple):
        return list(value)
    return value
