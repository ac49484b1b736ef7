"""New adapters for a handle."""

from __future__ import annotations

from typing import Any

from ..assets import public_name
from ..attach.build import build
from ..attach.plan import Plan, check_config, check_task, match
from ..attach.tree import AdapterTree, check_name
from ..config import PeftConfig, PromptConfig
from ..errors import UsageError
from ..registry import adapter_type
from ..runtime import site, virtual_tokens
from . import schedules
from .switching import Switching


class Adding(Switching):
    """The part of a handle that adds new adapters."""

    def add_adapter(self, adapter_name: Any, peft_config: Any, autocast_adapter_dtype: bool = True, **_: Any) -> None:
        """Create a new adapter. The first one becomes active; later ones are inactive until `set_adapter`.

        Raises:
            AdapterNameError: the name is taken or unsafe.
            TargetError, ConfigError: the configuration does not fit the base.
        """
        if isinstance(adapter_name, PeftConfig):  # transformers' mixin has the arguments the other way round
            adapter_name, peft_config = peft_config if isinstance(peft_config, str) else "default", adapter_name
        check_name(adapter_name, self.peft_config)
        check_config(peft_config)
        plan, config = self.plan_adapter(peft_config)
        tree = build(
            self.bare_base,
            config,
            plan,
            full_precision=autocast_adapter_dtype,
            initialise=True,
            materialized=config.inference_mode,
        )
        self.take_adapter(adapter_name, config, tree)

    def plan_adapter(self, config: PeftConfig) -> tuple[Plan, PeftConfig]:
        """Everything that can be wrong with `config` on this base is found here; the config returned is a filled-in copy."""
        config = type(config)(**vars(config))
        check_task(self.bare_base, config)
        if isinstance(config, PromptConfig):
            kind = adapter_type(config)
            if not kind.in_cache:
                virtual_tokens.fill_in(config, self.bare_base)
            kind.prepare(config, self.bare_base)
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = public_name(getattr(self.bare_base, "name_or_path", None))
        if self.merged_adapters and getattr(config, "init_from_weight", False):
            raise UsageError(
                "such an adapter is initialized from the base's weights, which hold merged adapters now; "
                "call unmerge_adapter() first"
            )
        return match(self.bare_base, config)

    def take_adapter(self, name: str, config: PeftConfig, tree: AdapterTree) -> None:
        """Add an adapter that has been built to this handle."""
        for path, _ in tree.items():
            site.install(self.bare_base.get_submodule(path))
        tree.train(self.training)
        self.adapters[name] = tree
        self.peft_config[name] = config
        self._forget()
        schedules.observe_steps(self, [config])
        tree.requires_grad_(False)
        if not self._active:
            self.set_adapter(name)
