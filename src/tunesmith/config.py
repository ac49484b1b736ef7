"""Configurations: the ecosystem's field names, checked when made.

The dictionary form (`to_dict`, `from_dict`) is what `adapter_config.json` holds.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import logging
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, TypeVar

from typing_extensions import dataclass_transform

from .checks import is_off, means_off, not_an_expression, not_positive, unknown_key, wrong_types
from .default_targets import DEFAULT_TARGETS
from .errors import ConfigError, did_you_mean
from .seen_as import SeenAs
from .storage.folder import CONFIG_FILE, AdapterFolder, write_folder, write_text

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
    # Fields that the ecosystem's configuration of this method does not have: written only where they are used.
    ours_alone: ClassVar[tuple[str, ...]] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """By the type itself: pickle wants the class of what it calls by default to be `__class__`."""
        return object.__new__, (type(self),), self.__dict__

    def __post_init__(self) -> None:
        if self.method is not None:
            self.peft_type = PeftType(self.method) if self.method in PeftType.__members__ else self.method
        if self.task_type is not None and not isinstance(self.task_type, TaskType):
            known = [task.value for task in TaskType]
            if self.task_type not in known:
                raise ConfigError(
                    f"task_type={self.task_type!r} is unknown; allowed: {', '.join(known)}"
                    + did_you_mean(str(self.task_type).upper(), known)
                )
            self.task_type = TaskType(self.task_type)
        faults = list(wrong_types(self)) or list(self.faults())
        if faults:
            raise ConfigError(f"{type(self).__name__}: " + "; ".join(faults))

    def faults(self) -> list[str]:
        """What is wrong with the values; each method adds its own sentences."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values under the ecosystem's names, sets as sorted lists."""
        values = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if name not in self.ours_alone or not is_off(value)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> PeftConfig:
        """The config of the method that `values["peft_type"]` names.

        A key this version does not know is ignored with one warning when its value means "off", else an error names
        the feature: never silently a different model.
        """
        values = {**values, **overrides}
        if not values.get("peft_type"):
            raise ConfigError('the configuration has no "peft_type", so its method is unknown')
        target = _by_method[known_method(values["peft_type"])]
        if cls is not PeftConfig and not issubclass(target, cls):
            raise ConfigError(f"this is a {values['peft_type']} configuration, not a {cls.__name__}")
        values = target.understood(values)
        names = {f.name for f in dataclasses.fields(target) if f.init}
        unknown = {key: value for key, value in values.items() if key not in names and key not in _INFORMATIVE}
        used = {k: v for k, v in unknown.items() if not is_off(v) and v not in target.not_supported.get(k, ())}
        if used:
            raise ConfigError("; ".join(unknown_key(key, target, value) for key, value in used.items()))
        strange = sorted(set(unknown) - set(target.not_supported))
        if strange:
            logger.warning("ignoring unknown keys that are switched off: %s", ", ".join(strange))
        return target(**{key: value for key, value in values.items() if key in names})

    @classmethod
    def understood(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The values of a file, less what the ecosystem writes into it without meaning it."""
        return values

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> PeftConfig:
        """Read `adapter_config.json` from a folder or the Hub (kwargs: `revision`, `token`, `cache_dir`, ...)."""
        return read_config(AdapterFolder.find(pretrained_model_name_or_path, subfolder=subfolder, **kwargs), cls)

    def save_pretrained(self, save_directory: str, **_: Any) -> None:
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


_by_method: dict[str, type[PeftConfig]] = {}  # by the method's name in files; `registry.register` fills it


def add_method(name: str, config: type[PeftConfig]) -> None:
    """Files whose `peft_type` is `name` are read as this configuration from now on."""
    _by_method[name] = config


@functools.cache
def discover_methods() -> None:
    """Import every file of `methods/`, each of which registers its method."""
    methods = importlib.import_module(f"{__package__}.methods")
    for module in pkgutil.iter_modules(methods.__path__):
        importlib.import_module(f"{methods.__name__}.{module.name}")


def known_method(name: object) -> str:
    """The name of a method as files spell it.

    Raises:
        ConfigError: no method of that name is registered; lists those that are.
    """
    discover_methods()
    key = str(getattr(name, "value", name))
    if key not in _by_method:
        raise ConfigError(
            f'peft_type "{key}" is not known to this version of Tunesmith; known: {", ".join(sorted(_by_method))}'
            + did_you_mean(key, sorted(_by_method))
            + "; if it is a method of your own, import the module that registers it first"
        )
    return key


def config_text(config: PeftConfig) -> str:
    """The configuration as its file holds it: for inference, under public names."""
    return json.dumps({**config.to_dict(), "inference_mode": True}, indent=2, sort_keys=True) + "\n"


# Written by the ecosystem for information; they never change the model.
_INFORMATIVE = ("peft_version", "transformers_version", "tunesmith_version")


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


@dataclass(frozen=True)
class Settings:
    """What one module's adapter is built with. A method whose modules can differ derives a frozen dataclass with its fields."""

    def __str__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return ", ".join(f"{name}={value}" for name, value in values.items() if value is not None)


@config_class
class TargetedConfig(PeftConfig):
    """Fields of methods that act on chosen modules of the base.

    Args:
        target_modules: list of name endings, one regular expression that matches whole paths, or "all-linear";
            None takes the architecture's usual targets.
        exclude_modules: names or a regular expression to leave out.
        layers_to_transform: index or indices of the layers to adapt; needs names such as `layers.3.`.
        layers_pattern: name(s) of the layer list, where the path holds several numbers.
        modules_to_save: modules trained in full, as private copies (task heads).
        fan_in_fan_out: the targeted weights are stored `(in, out)`; GPT-2's `Conv1D` is recognised without it.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
                setattr(self, name, set(value))
        if self.layers_to_transform == []:
            self.layers_to_transform = None
        super().__post_init__()

    def faults(self) -> list[str]:
        found = super().faults()
        if self.target_modules is not None and not self.target_modules and not self.may_target_nothing:
            found.append("target_modules is empty; name at least one module or leave it out")
        if self.layers_pattern and self.layers_to_transform is None:
            found.append("layers_pattern needs layers_to_transform")
        if (
            self.layers_to_transform is not None
            and isinstance(self.target_modules, str)
            and self.target_modules != "all-linear"
        ):
            found.append("layers_to_transform needs target_modules as a list; a regular expression names its layers itself")
        expressions = {name: [getattr(self, name)] for name in ("target_modules", "exclude_modules")}
        for name, keys in {**expressions, **self.pattern_keys()}.items():
            for key in keys:
                if isinstance(key, str) and (reason := not_an_expression(key)):
                    found.append(f'{name}: "{key}" is not a valid regular expression ({reason})')
        return found

    @property
    def may_target_nothing(self) -> bool:
        """Whether an empty `target_modules` makes sense, because something else is adapted."""
        return False

    def resolve_targets(self, model_type: str | None) -> None:
        """Fill in `target_modules` where the user names none."""
        if self.target_modules is None:
            usual = DEFAULT_TARGETS.get(model_type or "")
            self.target_modules = set(usual) if usual else "all-linear"

    def chosen(self, paths: list[str]) -> list[str]:
        """Those of the matched modules that get an adapter, where a method takes only some."""
        return paths

    def settings(self, path: str) -> Settings:
        """What the adapter at `path` is built with."""
        return Settings()

    def pattern_keys(self) -> dict[str, list[str]]:
        """`{field: keys}` of every per-module pattern, so that keys which match nothing are found."""
        return {}


@config_class
class PromptConfig(PeftConfig):
    """Fields of methods that put virtual tokens in front of the input.

    Args:
        num_virtual_tokens: number of virtual tokens.
        token_dim, num_transformer_submodules, num_attention_heads, num_layers: filled in from the base.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    is_prompt_learning: ClassVar[bool] = True

    @property
    def trains_encoder(self) -> bool:
        """Whether an encoder computes the virtual tokens while they are trained."""
        return False

    def faults(self) -> list[str]:
        return [*super().faults(), *not_positive({"num_virtual_tokens": self.num_virtual_tokens}, may_lack=False)]
