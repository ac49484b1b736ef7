"""Handles: a frozen base model seen through adapters.

A `PeftModel` owns adapters and refers to a base that it never changes. Any number of handles can share one base. Each public
call enters the handle's frame, so its active adapters take effect during the call and nowhere else. Its abilities are the
classes in `handle/`; this module combines them and adds loading and saving.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from torch import nn

from . import tested
from .attach.build import build
from .attach.tasks import check_config, fitting_task
from .attach.tree import check_name
from .bases.prepare import require_input_gradients
from .checkpoint import embeddings, given, load, save
from .checkpoint.card import write_card
from .checkpoint.former import translated
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
        others: Any = self._shared_base.handles
        for handle in others:
            handle._forget()
        return result

    # --- files ----------------------------------------------------------------------------------------------------

    def load_adapter(
        self,
        model_id: str,
        adapter_name: str = "default",
        is_trainable: bool = False,
        torch_device: Any = None,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> load.LoadResult:
        """Load an adapter from a folder or the Hub; one whose name is in use is replaced, whatever its method and shapes.

        A replaced adapter computes what a fresh load computes, and goes on training if it trained. Its tensors of unchanged
        name and shape stay the same objects for an optimizer; a warning tells of others.

        Args:
            is_trainable: continue training it, once it is active.
            torch_device: without effect, since an adapter is placed where its base is.
            autocast_adapter_dtype: keep adapters of 16-bit bases in fp32.
            kwargs: of the download, and what has no effect; `storage/options.py` lists them with the reasons.

        Raises:
            AdapterFileError: all faults of the files at once; the handle is then unchanged.
            ConfigError: an option is unknown, or the configuration asks for what this version lacks.
        """
        key_mapping = kwargs.pop("key_mapping", None)
        folder = AdapterFolder.find(model_id, **kwargs)
        return self._load(folder, read_config(folder), adapter_name, is_trainable, autocast_adapter_dtype, key_mapping)

    def _load(
        self,
        folder: AdapterFolder,
        config: PeftConfig,
        name: str,
        is_trainable: bool,
        autocast_adapter_dtype: bool,
        key_mapping: dict[str, str] | None,
    ) -> load.LoadResult:
        self._require_unmerged(name)
        in_use = self.peft_config.get(name)
        if in_use is None:
            check_name(name, self.peft_config)
        folder, config = translated(self.bare_base, folder, config, key_mapping)
        stored = load.Stored.read(folder, config)
        try:
            plan, config = self.plan_adapter(stored.config, stored.paths(self.bare_base))
        except (ConfigError, TargetError) as error:
            raise type(error)(f'"{folder.name}"{load.made_for(config)}: {error}') from error
        stored.tensors, plan.stored = embeddings.taken(stored.tensors, config, plan, self.bare_base)
        config.inference_mode = not is_trainable and (in_use is None or in_use.inference_mode)
        in_training = in_use is not None and self.tree(name).trains_encoder  # which tokens alone cannot replace
        materialized = not in_training and load.is_materialized(config, folder)
        how = {"full_precision": autocast_adapter_dtype, "materialized": materialized}
        try:
            tree = build(self.bare_base, config, plan, initialise=False, **how)
        except (RuntimeError, MemoryError) as error:  # absurd sizes in the file
            raise AdapterFileError(f'"{folder.name}" describes an adapter that cannot be built here: {error}') from error
        result = load.into(tree, config, stored, self.bare_base, plan)
        if in_use is None:
            self.take_adapter(name, config, tree)
        else:
            self._replace_adapter(name, config, tree)
        return result

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

        The file's tensors decide: if each has its place, what the configuration says beyond them (targets that the base
        lacks, another task) is one warning.

        Args:
            is_trainable: continue training it; by default it is for inference only.
            config: used instead of the one in the folder.
            autocast_adapter_dtype: keep adapters of 16-bit bases in fp32.
            kwargs: `key_mapping` (`{regular expression: replacement}` for the names of the file's tensors, see
                `checkpoint/former.py`); of the download (`subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`,
                ...), and what scripts give although the base is loaded already (`torch_dtype`, `device_map`, ...): without
                effect, for the reasons in `storage/options.py`.

        Raises:
            AdapterFileError, TargetError: the files do not fit the base; the base is then unchanged.
            ConfigError: an option is unknown, or the configuration asks for what this version lacks.
        """
        key_mapping = kwargs.pop("key_mapping", None)
        folder = AdapterFolder.find(model_id, **kwargs)
        stored = config or read_config(folder)
        check_config(stored)
        handle = (cls.for_task(fitting_task(model, stored)) if cls is PeftModel else cls)(model)
        try:
            handle._load(folder, stored, adapter_name, is_trainable, autocast_adapter_dtype, key_mapping)
        except BaseException:
            handle._leave_base()
            raise
        return handle

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        save_function: Callable[..., Any] = torch.save,
    ) -> None:
        """Write adapters: `default` into the folder, others into `<folder>/<name>/`, each completely or not at all.

        A sharded handle is gathered by all ranks together, so each of them must call this (`is_main_process` selects the
        one that writes), unless `state_dict` holds the gathered values.

        Args:
            safe_serialization: write `adapter_model.safetensors`; False writes `adapter_model.bin`.
            save_embedding_layers: write the base's embeddings and output head, too; "auto" does where the vocabulary has
                another size than the published base's, and of embeddings called `embed_tokens` or `lm_head` that are
                targets. Read again, values that differ from the base's act as private ones of the handle.
            path_initial_model_for_weight_conversion: a folder with the adapter as it was before training: one that
                started from parts of the weights (PiSSA, OLoRA) is then written as a plain LoRA of twice the rank.
            state_dict: the values to write in place of the handle's own; names as in `load_state_dict`.
            save_function: what writes `adapter_model.bin`.

        Raises:
            AdapterFileError: values are missing or in parts on other processes, or the folder cannot be written.
            UsageError: what is asked for does not exist on this base or for this method.
        """
        names = tuple(self.peft_config) if selected_adapters is None else self._named(selected_adapters)
        request = save.Request(
            state_dict,
            save_embedding_layers,
            path_initial_model_for_weight_conversion,
            None if safe_serialization else save_function,
            is_main_process,
        )
        save.write(self, list(names), save_directory, request)

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """`{name in files: tensor}` of one adapter (by default the active one), copied to the CPU."""
        name = adapter_name or self.active_adapter
        self.require_adapter(name)
        return save.tensors(self, name, save.Request(state_dict, embeddings=False))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module; adapters' tensors may have the names of peft's `state_dict()`, of files, or of wrapped models.

        Raises:
            AdapterFileError: nothing in a `state_dict` belongs here, or two of its names stand for one tensor.
        """
        renamed = given.under_own_names(self, state_dict)
        if renamed and not strict and not renamed.keys() & self.state_dict().keys():
            raise AdapterFileError(
                f'state_dict has none of this handle\'s tensors (it begins with "{next(iter(state_dict))}"), so nothing was '
                "loaded; give the values of an adapter with the same name and targets"
            )
        return super().load_state_dict(renamed, strict=strict, assign=assign)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> torch.Tensor:
        """The virtual tokens of an adapter as files hold them, `(tokens, dim)`, on the CPU.

        Raises:
            UsageError: the adapter has no virtual tokens.
        """
        self.require_adapter(adapter_name)
        if self.tree(adapter_name).prompt is None:
            raise UsageError(f'"{adapter_name}" has no virtual tokens; get_adapter_state_dict gives its tensors')
        return self.get_adapter_state_dict(adapter_name)["prompt_embeddings"]

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write the active adapter's model card into a folder; of a card that is there, only the metadata is changed."""
        write_card(self.active_peft_config, output_dir)

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Let the inputs of `model`'s layers require gradients, which reentrant gradient checkpointing needs."""
        require_input_gradients(model)

    def enable_peft_hotswap(self, target_rank: int = 128, check_compiled: str = "error") -> None:
        """Part of transformers' adapter mixin; there is nothing to enable here."""
        raise UsageError("there is nothing to enable: load_adapter replaces the values of a name in use, and switching is free")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload adapter",
        create_pr: bool = False,
    ) -> str:
        """Upload what `save_pretrained` writes as one commit; returns the commit's URL."""
        return push_folder(
            self.save_pretrained,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )

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
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """A handle on `model` with one new adapter; call it again on the same base for another, independent handle.

    Args:
        mixed: without effect: adapters of several methods act together in every handle.
        autocast_adapter_dtype: keep adapters of 16-bit bases in fp32 (they compute in the base's type).
        revision: of the base on the Hub; written into the adapter's configuration in place of the one there.
        low_cpu_mem_usage: without effect: an adapter is built once, in its place.

    Raises:
        ConfigError, TargetError: the configuration does not fit the model; the model is then unchanged.
    """
    check_config(peft_config)
    if revision is not None:
        peft_config = copy.copy(peft_config)
        peft_config.revision = revision
    return PeftModel.for_task(peft_config.task_type)(model, peft_config, adapter_name, autocast_adapter_dtype)
