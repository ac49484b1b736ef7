"""Handles: a frozen base model seen through adapters.

A `PeftModel` owns adapters and refers to a base that it never changes. Any number of handles can share one base. Each public
call enters the handle's frame, so its active adapters take effect during the call and nowhere else. Its abilities are the
classes in `handle/`; this module combines them and adds loading and saving.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import nn

from . import tested
from .attach.build import build
from .attach.plan import check_config
from .attach.tree import check_name
from .checkpoint import load, save
from .config import PeftConfig, TaskType, read_config
from .errors import AdapterFileError, ConfigError, TargetError, UsageError
from .handle import schedules
from .handle.base_methods import BaseMethods
from .handle.combining import Combining
from .handle.merging import Merging
from .handle.mirror import handle_class
from .handle.proxy import is_proxy
from .handle.shared_base import adopt, handles_of
from .handle.status import Reporting
from .storage.folder import AdapterFolder
from .storage.hub import push_folder


class PeftModel(BaseMethods, Merging, Combining, Reporting):
    """A base model with adapters beside it.

    Args:
        model: the base; its parameters are frozen and otherwise left alone.
        peft_config: the first adapter's configuration.
        adapter_name: the first adapter's name.
        autocast_adapter_dtype: keep adapters of 16-bit bases in fp32 (they compute in the base's type).

    Raises:
        TargetError: the configuration does not fit the base.
        ConfigError: the configuration's task does not fit the base.
    """

    base_class: ClassVar[type | None] = None
    task_class: ClassVar[type]

    _by_task: ClassVar[dict[TaskType, type[PeftModel]]] = {}

    def __init_subclass__(cls, task: TaskType | None = None, **kwargs: Any) -> None:
        """Task classes name their task. (PreTrainedModel's hook, which would rewrite class data, is not called.)"""
        if task is not None:
            cls._by_task[task] = cls

    @classmethod
    def for_task(cls, task: Any) -> type[PeftModel]:
        """The class of handles for a task."""
        return cls._by_task.get(task, PeftModel)

    def __new__(cls, model: nn.Module | None = None, *args: Any, **kwargs: Any) -> PeftModel:
        if cls.base_class is not None:
            return nn.Module.__new__(cls)
        if not isinstance(model, nn.Module):
            raise UsageError(f"{cls.__name__} needs a model as its first argument, got {type(model).__name__}")
        if is_proxy(model):
            raise UsageError(
                "this is a part of another handle, so adapters on it would act in some calls only; attach to the base itself, "
                "handle.bare_base, or add to that handle by add_adapter(name, config)"
            )
        if isinstance(model, PeftModel):
            raise UsageError("this model already has adapters; use model.add_adapter(name, config) to add another")
        return cast(PeftModel, nn.Module.__new__(handle_class(cls, type(model))))

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | None = None,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        if any(handle.merged_adapters for handle in handles_of(model)):
            raise UsageError("another handle's adapters are merged into this base's weights; call its unmerge_adapter() first")
        tested.warn_once()
        self._init_state(model)
        self._forget()
        if peft_config is not None:
            self.add_adapter(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)
        self._join_base()
        self.train(model.training)

    def update_and_allocate(self, global_step: int) -> None:
        """Run AdaLoRA's schedule for this step, for scripts that number the steps themselves; otherwise they are counted.

        Call it after `backward()` and before `zero_grad()`.
        """
        schedules.update_and_allocate(self, global_step)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """The base's `resize_token_embeddings`, which changes the vocabulary for all its handles.

        Raises:
            UsageError: an adapter sits on the embeddings or the output head, which would be replaced.
        """
        base = self.bare_base
        replaced: set[Any] = {base.get_input_embeddings(), base.get_output_embeddings()}
        trees = [handle.tree(name) for handle in self._shared_base.handles for name in handle.peft_config]
        adapted = {path for tree in trees for path, _ in tree.items()}
        faults = [path for path in sorted(adapted) if replaced & set(base.get_submodule(path).modules())]
        if faults:
            raise UsageError(
                f"resizing would replace modules that carry adapters ({', '.join(faults)}); resize first, then attach"
            )
        result = base.resize_token_embeddings(*args, **kwargs)
        base.requires_grad_(False)
        return result

    # --- files ----------------------------------------------------------------------------------------------------

    def load_adapter(
        self,
        model_id: str,
        adapter_name: str = "default",
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> None:
        """Load an adapter from a folder or the Hub; if the name is in use, that adapter's values are replaced.

        Raises:
            AdapterFileError: all faults of the files at once; the handle is then unchanged.
        """
        folder = AdapterFolder.find(model_id, **kwargs)
        self._load(folder, read_config(folder), adapter_name, is_trainable, autocast_adapter_dtype)

    def _load(
        self, folder: AdapterFolder, stored: PeftConfig, name: str, is_trainable: bool, autocast_adapter_dtype: bool
    ) -> None:
        self._require_unmerged(name)
        if name not in self.peft_config:
            check_name(name, self.peft_config)
        try:
            plan, config = self.plan_adapter(stored)
        except (ConfigError, TargetError) as error:
            raise type(error)(f'"{folder.name}"{load.made_for(stored)}: {error}') from error
        config.inference_mode = not is_trainable
        if name in self.peft_config:
            load.check_alike(self.tree(name), self.peft_config[name], plan, config, folder)
            load.into(self.tree(name), config, folder, self.bare_base)
            return
        how = {"full_precision": autocast_adapter_dtype, "materialized": load.is_materialized(config, folder)}
        try:
            tree = build(self.bare_base, config, plan, initialise=False, **how)
        except (RuntimeError, MemoryError) as error:  # absurd sizes in the file
            raise AdapterFileError(f'"{folder.name}" describes an adapter that cannot be built here: {error}') from error
        load.into(tree, config, folder, self.bare_base)
        self.take_adapter(name, config, tree)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> PeftModel:
        """A handle on `model` with the adapter from a folder or Hub repository.

        Args:
            is_trainable: continue training it; by default it is for inference only.
            config: used instead of the one in the folder.
            kwargs: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`.
        """
        folder = AdapterFolder.find(model_id, **kwargs)
        stored = config or read_config(folder)
        check_config(stored)
        handle = (cls.for_task(stored.task_type) if cls is PeftModel else cls)(model)
        try:
            handle._load(folder, stored, adapter_name, is_trainable, autocast_adapter_dtype)
        except BaseException:
            handle._leave_base()
            raise
        return handle

    def save_pretrained(
        self,
        save_directory: str,
        selected_adapters: list[str] | None = None,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        **_: Any,
    ) -> None:
        """Write adapters, and nothing of the base: `default` into the folder, others into `<folder>/<name>/`.

        Each adapter is written completely or not at all. A sharded handle is gathered by all ranks together, so each of
        them must call this (`is_main_process` selects the one that writes), unless `state_dict` holds the gathered values.
        """
        names = tuple(self.peft_config) if selected_adapters is None else self._named(selected_adapters)
        save.write(self, list(names), save_directory, state_dict, is_main_process)

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """`{name in files: tensor}` of one adapter (by default the active one), copied to the CPU."""
        name = adapter_name or self.active_adapter
        self.require_adapter(name)
        return save.tensors(self, name, state_dict)

    def enable_peft_hotswap(self, *_: Any, **__: Any) -> None:
        """Part of transformers' adapter mixin; there is nothing to enable here."""
        raise UsageError("there is nothing to enable: load_adapter replaces the values of a name in use, and switching is free")

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload what `save_pretrained` writes; returns the commit's URL (kwargs: `private`, `token`, `revision`, ...)."""
        return push_folder(self.save_pretrained, repo_id, **kwargs)

    # --- being a module -------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """Attributes that the handle lacks are the base's; the base's methods run with the adapters in effect."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "bare_base" not in self.__dict__ or name.startswith("__"):
                raise
        return self._from_base(name)

    def __reduce__(self) -> tuple[Any, ...]:
        state = {name: value for name, value in self.__dict__.items() if name not in ("_proxies", "_paths")}
        return _empty_handle, (self.task_class, self.base_class), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied or unpickled handle installs its sites on its own base."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()
        schedules.observe_steps(self, self.peft_config.values())
        adopt(self, self._shared_base)
        self._hold_stored()
        self._by_site(tuple(self.peft_config))


def _empty_handle(task_class: type[PeftModel], base_class: type[nn.Module]) -> PeftModel:
    handle: PeftModel = nn.Module.__new__(handle_class(task_class, base_class))
    nn.Module.__init__(handle)
    return handle


class PeftModelForCausalLM(PeftModel, task=TaskType.CAUSAL_LM):
    """Text generation by a decoder."""

    labels_per_token = True


class PeftModelForSeq2SeqLM(PeftModel, task=TaskType.SEQ_2_SEQ_LM):
    """Text generation by an encoder and a decoder."""


class PeftModelForSequenceClassification(PeftModel, task=TaskType.SEQ_CLS):
    """One label per sequence; the head is trained as a private copy."""

    classifies = True


class PeftModelForTokenClassification(PeftModel, task=TaskType.TOKEN_CLS):
    """One label per token; the head is trained as a private copy."""

    labels_per_token = True


class PeftModelForQuestionAnswering(PeftModel, task=TaskType.QUESTION_ANS):
    """Answer spans; the head is trained as a private copy."""


class PeftModelForFeatureExtraction(PeftModel, task=TaskType.FEATURE_EXTRACTION):
    """Hidden states of a base without a head."""


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """A handle on `model` with one new adapter; call it again on the same base for another, independent handle.

    Raises:
        ConfigError, TargetError: the configuration does not fit the model; the model is then unchanged.
    """
    check_config(peft_config)
    return PeftModel.for_task(peft_config.task_type)(
        model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage
    )
