"""Configurations: the ecosystem's field names, checked when made.

The dictionary form (`to_dict`, `from_dict`) is what `adapter_config.json` holds.
"""

from .base import PeftConfig, PeftType, TaskType, config_class, config_text, read_config
from .by_method import add_method, discover_methods, known_method
from .kinds import PromptConfig, Settings, TargetedConfig

__all__ = [
    "PeftConfig",
    "PeftType",
    "PromptConfig",
    "Settings",
    "TargetedConfig",
    "TaskType",
    "add_method",
    "config_class",
    "config_text",
    "discover_methods",
    "known_method",
    "read_config",
]
