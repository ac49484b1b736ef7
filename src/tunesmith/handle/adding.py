"""New adapters for a handle."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from ..assets import public_name
from ..attach.build import build
from ..attach.plan import Plan, match
from ..attach.tasks import check_config, check_task, fitting_task
from ..attach.tree import AdapterTree, check_name
from ..config import PeftConfig, PromptConfig
from ..errors import UsageError
from ..registry import adapter_type
from ..runtime import site, virtual_tokens
from . import replacing, schedules
from .switching import Switching

logger = logging.getLogger(__name__)


class Adding(Switching):
    """The part of a handle that adds new adapters."""

    def add_adapter(
        self,
        adapter_name: Any,
        peft_config: Any = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        """Create a new adapter. The first one becomes active; later ones are inactive until `set_adapter`.

        Args:
            adapter_name, peft_config: also the other way round, as transformers' `add_adapter` has them.
            low_cpu_mem_usage: as in the ecosystem's call; adapters are made where their modules are in either case.

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

    def plan_adapter(
        self, config: PeftConfig, held: Collection[str] | None = None, current_names: bool = False
    ) -> tuple[Plan, PeftConfig]:
        """Everything that can be wrong with `config` on this base is found here; the config returned is a filled-in copy.

        Args:
            held: of an adapter that is loaded: paths of modules of which its file holds tensors; see `match`.
            current_names: see `match`, too.
        """
        config, misfit = config.checked(), []
        if held is not None and (task := fitting_task(self.bare_base, config)) != config.task_type:
            if config.task_type is not None:
                misfit.append(f"task_type={config.task_type}, which {type(self.bare_base).__name__} is not for")
            config.task_type = task
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
        plan, config = match(self.bare_base, config, held, current_names)
        plan.unmatched += misfit
        return plan, config

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

    def _replace_adapter(self, name: str, config: PeftConfig, tree: AdapterTree) -> None:
        """Put an adapter that has been built in the place of the one of this name; it trains if that one did.

        Where only values differ, the old adapter takes them. Otherwise tensors of the same name and shape stay the same
        objects, so that an optimizer goes on with them, and a warning says that it does not hold the others.
        """
        old, before = self.tree(name), self.peft_config[name]
        trained = any(parameter.requires_grad for parameter in old.parameters())
        begins = before.inference_mode and not config.inference_mode and name in self._active
        if replacing.alike(old, before, tree, config):
            replacing.take_values(old, tree)
            before.inference_mode = config.inference_mode
        else:
            lost = replacing.keep_parameters(old, tree)
            schedules.go_on(old, tree)
            self.take_adapter(name, config, tree)
            if lost and trained:
                logger.warning('"%s" was replaced by one of other shapes while it trained; make its optimizer anew', name)
        self.tree(name).requires_grad_(trained or begins)
