"""What configurations of several methods share: targets in the base, or virtual tokens in front of the input."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from ..checks import not_an_expression, not_positive
from ..default_targets import DEFAULT_TARGETS
from .base import PeftConfig, config_class


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

    @classmethod
    def understood(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Files of early releases name a pattern of layers beside an empty list of them, which means all layers."""
        if values.get("layers_to_transform") in (None, []):
            return {**values, "layers_pattern": None}
        return values

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
