"""Handles: a frozen base model seen through adapters.

A `PeftModel` owns adapters and refers to a base that it never changes. Any number of handles share one base. Each public
call enters the handle's frame, so its active adapters act during the call and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from . import preflight, prompting, scheduled, segments, site, tested
from .assets import public_name
from .attach import AdapterTree, build, check_name
from .bases import architecture
from .bases.quantised import logical_size
from .checkpoint import load_adapter, save_adapters
from .checkpoint.files import AdapterFolder
from .checkpoint.hub import push_folder
from .combinable import Combinable
from .config import PeftConfig, PromptConfig, TaskType
from .errors import AdapterFileError, AdapterNameError, ConfigError, TargetError, UsageError, did_you_mean
from .frame import Frame
from .framed import Framed
from .framing import Framing
from .match import Plan, check_config, check_task, match
from .merge import Originals
from .mergeable import Mergeable
from .mirror import handle_class
from .record import records
from .registry import adapter_type
from .status import Reporting


class PeftModel(Framing, Mergeable, Combinable, Reporting, nn.Module):
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

    # What virtual tokens must know of the task; see prompting.Entrance.
    labels_per_token: ClassVar[bool] = False
    classifies: ClassVar[bool] = False
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
        from . import tasks  # noqa: F401  (names the task classes)

        return cls._by_task.get(task, PeftModel)

    def __new__(cls, model: nn.Module | None = None, *args: Any, **kwargs: Any) -> PeftModel:
        if cls.base_class is not None:
            return nn.Module.__new__(cls)
        if not isinstance(model, nn.Module):
            raise UsageError(f"{cls.__name__} needs a model first, got {type(model).__name__}")
        if isinstance(model, PeftModel):
            raise UsageError("this model has adapters already; use model.add_adapter(name, config) for one more")
        return nn.Module.__new__(handle_class(cls, type(model)))

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | None = None,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        if any(handle._merged for handle in getattr(records.get(model), "handles", ())):
            raise UsageError("another handle's adapters are merged into this base's weights; call its unmerge_adapter() first")
        tested.warn_once()
        nn.Module.__init__(self)
        self._modules["base_model"] = model  # add_module refuses the names of properties
        self.adapters = nn.ModuleDict()
        self.peft_config: dict[str, PeftConfig] = {}
        self._active: tuple[str, ...] = ()
        self._disabled = False
        self._merged: dict[str, Originals] = {}
        self._accepts = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self._checkpointing: list[Any] = architecture.may_recompute(model)
        self._entrance = prompting.entrance_of(
            model, frozenset(self._accepts), labels_per_token=self.labels_per_token, classifies=self.classifies
        )
        self._forget()
        if peft_config is not None:
            self.add_adapter(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)
        self._register()
        self.train(model.training)

    @property
    def base_model(self) -> Any:
        """The base itself, as it was given."""
        return self._modules["base_model"]

    def tree(self, name: str) -> AdapterTree:
        """The tensors of one adapter."""
        found: Any = self.adapters[name]
        return found

    def get_base_model(self) -> nn.Module:
        """The base itself, as it was given."""
        return self.base_model

    # --- calls ----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's forward with the active adapters acting; same arguments, same result type.

        Args:
            adapter_names: for each row the name of the adapter that acts on it (in place of the active ones), or
                "__base__" for none; of any methods, in training and in evaluation.
            cu_seq_lens_q: where texts start and end that are packed into one row, `(texts + 1,)`; none attends to another.
        """
        names = kwargs.pop("adapter_names", None)
        return self._forward_within(self._frame if names is None else self._mixed(names, args, kwargs), *args, **kwargs)

    def _forward_within(self, frame: Frame, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get(segments.BOUNDARIES) is not None:
            kwargs.update(zip(self._accepts, args))
            args, (frame, kwargs) = (), self._packed(frame, kwargs)
        if preflight.is_due(self, frame):
            result = preflight.checked_forward(self, frame, *args, **kwargs)
        else:
            result = self._forward(frame, *args, **kwargs)
        return scheduled.with_penalties(result, frame.penalties) if self.training and frame.penalties else result

    def _forward(self, frame: Frame, *args: Any, **kwargs: Any) -> Any:
        with self._entered(frame):
            if not frame.prompts:
                return self.base_model(*args, **self._without_tasks(kwargs))
            kwargs.update(zip(self._accepts, args))
            return self.base_model(**self._with_virtual_tokens(kwargs, frame))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base's `generate` with the active adapters acting; same arguments, same result.

        Virtual tokens are no part of the result, and `max_length` counts without them. `adapter_names` is one name
        for each row, as in `forward`.
        """
        if kwargs.get(segments.BOUNDARIES) is not None:
            raise UsageError(
                f"generate goes on with one text in each row; pad texts into rows and leave {segments.BOUNDARIES} out"
            )
        names = kwargs.pop("adapter_names", None)
        frame = self._frame if names is None else self._mixed(names, args, kwargs)
        with self._entered(frame):
            if frame.prompts:
                args, kwargs = self._generation_inputs(args, kwargs, frame)
            return self.base_model.generate(*args, **self._without_tasks(kwargs))

    def _call_base(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Any other method of the base, with the adapters acting; modules it returns act with them, too."""
        with self._entered():
            result = getattr(self.base_model, name)(*args, **kwargs)
        if isinstance(result, nn.Module) and name in ("get_encoder", "get_decoder"):
            return Framed(self, result)
        return result

    def update_and_allocate(self, global_step: int) -> None:
        """Run AdaLoRA's schedule for this step, where a script numbers the steps itself; no training loop has to.

        To be called after `backward()` and before `zero_grad()`. The number of optimiser steps is counted without it.
        """
        scheduled.update_and_allocate(self, global_step)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """The base's `resize_token_embeddings`, which gives all its handles another vocabulary.

        Raises:
            UsageError: an adapter sits on the embeddings or the output head, which would be replaced under it.
        """
        base = self.base_model
        replaced: set[Any] = {base.get_input_embeddings(), base.get_output_embeddings()}
        trees = [handle.tree(name) for handle in self._record.handles for name in handle.peft_config]
        adapted = {path for tree in trees for path, _ in tree.items()}
        faults = [path for path in sorted(adapted) if replaced & set(base.get_submodule(path).modules())]
        if faults:
            raise UsageError(
                f"resizing would replace modules that carry adapters ({', '.join(faults)}); resize first, then attach"
            )
        result = base.resize_token_embeddings(*args, **kwargs)
        base.requires_grad_(False)
        return result

    # --- virtual tokens -------------------------------------------------------------------------------------------

    def _with_virtual_tokens(self, inputs: dict[str, Any], frame: Frame) -> dict[str, Any]:
        if all(prompt.in_cache for prompt, _ in frame.prompts):
            return self._without_tasks(inputs)
        task_ids, inputs = inputs.get("task_ids"), self._without_tasks(inputs)
        mixture = frame.mixture
        counts = [prompting.virtual_counts(part) for part in (mixture.frames if mixture else [frame])]
        real = mixture.real(counts, mixture.size) if mixture else None
        if prompting.is_continuation(inputs):
            return prompting.continued(inputs, max(counts), self._entrance, real)
        if mixture is None:
            virtual = prompting.virtual_tokens(frame, task_ids)
        else:
            virtual = prompting.virtual_tokens_by_rows(mixture, task_ids)
        return prompting.extend(inputs, virtual, self.base_model.get_input_embeddings(), self._entrance, real)

    def _packed(self, frame: Frame, inputs: dict[str, Any], even: int = 1) -> tuple[Frame, dict[str, Any]]:
        """The frame of a packed call, and the base's keyword arguments, with virtual tokens in front of each text."""
        task_ids, inputs, virtual = inputs.get("task_ids"), self._without_tasks(inputs), None
        with self._entered(frame):
            if frame.mixture is None and prompting.virtual_counts(frame):
                virtual = prompting.virtual_tokens(frame, task_ids)
                prompting.check_length(segments.Segments.of(inputs).longest, virtual.shape[-2], self._entrance)
            return segments.packed(self.base_model, frame, inputs, virtual, even)

    def _without_tasks(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the base takes: `task_ids` are for this handle's adapters, if one of them asks for such."""
        if "task_ids" not in inputs or not any(getattr(tree.prompt, "by_task", False) for tree in self.adapters.values()):
            return inputs
        return {name: value for name, value in inputs.items() if name != "task_ids"}

    def _generation_inputs(self, args: tuple, kwargs: dict[str, Any], frame: Frame) -> tuple[tuple, dict]:
        if all(prompt.in_cache for prompt, _ in frame.prompts):
            return args, self._with_virtual_tokens(kwargs, frame)
        if args:
            kwargs["input_ids"], *rest = args
            args = (None, *rest)
        ids = kwargs.pop("input_ids", kwargs.pop("inputs", None))
        kwargs = prompting.generation_inputs(self.base_model, ids, kwargs)
        named = ("attention_mask", "inputs_embeds", "token_type_ids", "task_ids")
        inputs = {"input_ids": ids, **{name: kwargs.pop(name) for name in named if kwargs.get(name) is not None}}
        inputs = self._with_virtual_tokens({k: v for k, v in inputs.items() if v is not None}, frame)
        inputs.pop("position_ids", None)  # generate counts them from the mask itself
        if ids is not None and not self._entrance.encoder_decoder:
            inputs["input_ids"] = ids  # for the result and for processors that look at the text so far
        return args, {**kwargs, **inputs}

    # --- adapters -------------------------------------------------------------------------------------------------

    def add_adapter(self, adapter_name: Any, peft_config: Any, autocast_adapter_dtype: bool = True, **_: Any) -> None:
        """Make a new adapter beside the others. The first one becomes active; later ones wait for `set_adapter`.

        Raises:
            AdapterNameError: the name is taken or unsafe.
            TargetError, ConfigError: the configuration does not fit the base.
        """
        if isinstance(adapter_name, PeftConfig):  # transformers' mixin has the arguments the other way round
            adapter_name, peft_config = peft_config if isinstance(peft_config, str) else "default", adapter_name
        check_name(adapter_name, self.peft_config)
        check_config(peft_config)
        plan, config = self._plan(peft_config)
        finished = config.inference_mode
        tree = build(self.base_model, config, plan, full_precision=autocast_adapter_dtype, initialise=True, finished=finished)
        self._take(adapter_name, config, tree)

    def _plan(self, config: PeftConfig) -> tuple[Plan, PeftConfig]:
        """Everything that can be wrong with `config` on this base is found here; the config is a filled-in copy."""
        config = type(config)(**vars(config))
        check_task(self.base_model, config)
        if isinstance(config, PromptConfig):
            kind = adapter_type(config)
            if not kind.in_cache:
                prompting.fill_in(config, self.base_model)
            kind.prepare(config, self.base_model)
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = public_name(getattr(self.base_model, "name_or_path", None))
        if self._merged and getattr(config, "starts_from_weight", False):
            raise UsageError(
                "such an adapter starts from the base's weights, which hold merged adapters now; call unmerge_adapter() first"
            )
        return match(self.base_model, config), config

    def _take(self, name: str, config: PeftConfig, tree: AdapterTree) -> None:
        """Make a finished adapter this handle's own."""
        for path, _ in tree.items():
            site.install(self.base_model.get_submodule(path))
        tree.train(self.training)
        self.adapters[name] = tree
        self.peft_config[name] = config
        self._forget()
        scheduled.watch(self, [config])
        tree.requires_grad_(False)
        if not self._active:
            self.set_adapter(name)

    def load_adapter(
        self,
        model_id: str,
        adapter_name: str = "default",
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> None:
        """Load an adapter from a folder or the hub; under a name in use, its values are replaced.

        Raises:
            AdapterFileError: all faults of the files at once; the handle is then as it was.
        """
        folder = AdapterFolder.find(model_id, **kwargs)
        self._load(folder, folder.config(), adapter_name, is_trainable, autocast_adapter_dtype)

    def _load(
        self, folder: AdapterFolder, stored: PeftConfig, name: str, is_trainable: bool, autocast_adapter_dtype: bool
    ) -> None:
        if name in self._merged:
            raise UsageError(f'"{name}" is merged into the weights; call unmerge_adapter() first')
        if name not in self.peft_config:
            check_name(name, self.peft_config)
        try:
            plan, config = self._plan(stored)
        except (ConfigError, TargetError) as error:
            raise type(error)(f'"{folder.name}"{load_adapter.made_for(stored)}: {error}') from error
        config.inference_mode = not is_trainable
        if name in self.peft_config:
            load_adapter.check_alike(self.tree(name), self.peft_config[name], plan, config, folder)
            load_adapter.into(self.tree(name), config, folder, self.base_model)
            return
        finished = load_adapter.is_finished(config, folder)
        try:
            tree = build(
                self.base_model, config, plan, full_precision=autocast_adapter_dtype, initialise=False, finished=finished
            )
        except (RuntimeError, MemoryError) as error:  # absurd sizes in the file
            raise AdapterFileError(f'"{folder.name}" describes an adapter that cannot be built here: {error}') from error
        load_adapter.into(tree, config, folder, self.base_model)
        self._take(name, config, tree)

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
        """A handle on `model` with the adapter of a folder or hub repository.

        Args:
            is_trainable: go on training it; by default it only acts.
            config: taken in place of the one in the folder.
            kwargs: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`.
        """
        folder = AdapterFolder.find(model_id, **kwargs)
        stored = config or folder.config()
        check_config(stored)
        handle = (cls.for_task(stored.task_type) if cls is PeftModel else cls)(model)
        try:
            handle._load(folder, stored, adapter_name, is_trainable, autocast_adapter_dtype)
        except BaseException:
            handle._detach()
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

        Each adapter is written whole or not at all. A sharded handle is gathered by all ranks together, so each of them
        must call this, `is_main_process` says which one writes; or `state_dict` holds its gathered values.
        """
        names = tuple(self.peft_config) if selected_adapters is None else self._named(selected_adapters)
        save_adapters.write(self, list(names), save_directory, state_dict, is_main_process)

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """`{name in files: tensor}` of one adapter (by default the active one), copied to the CPU."""
        name = adapter_name or self.active_adapter
        self._known(name)
        return save_adapters.tensors(self, name, state_dict)

    def enable_peft_hotswap(self, *_: Any, **__: Any) -> None:
        """Part of transformers' adapter mixin; there is nothing to enable here."""
        raise UsageError("nothing to prepare: load_adapter under a name in use replaces its values, and switching is free")

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload what `save_pretrained` writes; returns the commit's address (kwargs: `private`, `token`, `revision`, ...)."""
        return push_folder(self.save_pretrained, repo_id, **kwargs)

    def set_adapter(self, adapter_name: str | list[str] | tuple[str, ...], inference_mode: bool = False) -> None:
        """Make these adapters the active ones; they alone train (unless loaded or set for inference)."""
        names = self._named(adapter_name)
        before, self._active = self._active, names
        self._settle()
        for name in {*before, *names} & self.peft_config.keys():
            trains = name in names and not inference_mode and not self.peft_config[name].inference_mode
            self.tree(name).requires_grad_(trains)

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Remove adapters; when no active one is left, the first remaining one becomes active."""
        names = self._named(adapter_name)
        for name in names:
            if name in self._merged:
                raise UsageError(f'"{name}" is merged into the weights; call unmerge_adapter() first')
        self._active = tuple(name for name in self._active if name not in names)
        for name in names:
            del self.adapters[name], self.peft_config[name]
        self._forget()
        if not self._active:
            self.set_adapter(tuple(self.peft_config)[:1])

    @property
    def active_adapter(self) -> str:
        """Name of the active adapter; the first, when several are."""
        return self._active[0] if self._active else ""

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active)

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapter]

    @property
    def peft_type(self) -> Any:
        return self.active_peft_config.peft_type

    @property
    def has_active_enabled_adapter(self) -> bool:
        return bool(self._acting())

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the handle computes exactly what its base does."""
        before, merged = self._disabled, list(self._merged)
        self.disable_adapters()
        try:
            yield
        finally:
            self._disabled = before
            self._settle()
            if merged:
                self.merge_adapter([name for name in merged if name in self.peft_config], requantize=True)

    def disable_adapters(self) -> None:
        """As `disable_adapter()`, until `enable_adapters()`."""
        self.unmerge_adapter()
        self._disabled = True
        self._settle()

    def enable_adapters(self) -> None:
        self._disabled = False
        self._settle()

    # --- counts and looks -----------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """`(trainable, all)` parameter counts; shared parameters count once."""
        sizes = [(logical_size(p), p.requires_grad) for p in self.parameters()]
        return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """`trainable params: 4,096 || all params: 559,218,688 || trainable%: 0.0007`"""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")

    def _get_name(self) -> str:
        """The base's class name: transformers' Trainer tells by it whether smoothed labels are to be shifted."""
        return self.base_model._get_name()

    # --- being a module -------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """What the handle lacks is the base's; the base's methods run with the adapters acting."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_model" not in self.__dict__.get("_modules", {}):
                raise
        value = getattr(self.base_model, name)
        if inspect.ismethod(value) and value.__self__ is self.base_model:
            return Framed(self, value)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty_handle, (self.task_class, self.base_class), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied or unpickled handle sets its sites on its own base."""
        super().__setstate__(state)
        self._forget()
        scheduled.watch(self, self.peft_config.values())
        self._checkpointing = architecture.may_recompute(self.base_model)
        records[self.base_model] = self._record
        self._record.handles.add(self)
        self._take_up_stored()
        self._adapters_by_site(tuple(self.peft_config))

    def _known(self, name: str) -> None:
        if name not in self.peft_config:
            known = ", ".join(f'"{known}"' for known in list(self.peft_config)[:20]) or "none"
            more = f" and {len(self.peft_config) - 20} more" if len(self.peft_config) > 20 else ""
            raise AdapterNameError(
                f'no adapter "{name}"{did_you_mean(str(name), self.peft_config)}; adapters here: {known}{more}'
            )

    def _named(self, names: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
        """One name or several as a tuple that has each of them once; all of them are here."""
        found = tuple(dict.fromkeys(names if isinstance(names, (list, tuple)) else [names]))
        for name in found:
            self._known(name)
        return found


def _empty_handle(task_class: type[PeftModel], base_class: type[nn.Module]) -> PeftModel:
    handle = nn.Module.__new__(handle_class(task_class, base_class))
    nn.Module.__init__(handle)
    return handle
