"""An adapter and its base in one call: the adapter's configuration names the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from .assets import resolve
from .bases.quantised import stored_faults
from .bases.stored_base import check_stored
from .config import PeftConfig, TaskType, read_config
from .errors import ConfigError, UsageError, bullet_list, did_you_mean
from .model import PeftModel
from .storage.folder import AdapterFolder

_AUTO_CLASSES = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
    None: "AutoModel",
}
_TOKENIZER_FILE = "tokenizer_config.json"
# Options of `AutoPeftModel.from_pretrained`: of the adapter alone, of the adapter and the base, and (for errors) usual ones.
_OF_ADAPTER = (
    "subfolder",
    "autocast_adapter_dtype",
    "key_mapping",
    "low_cpu_mem_usage",
    "ephemeral_gpu_offload",
    "torch_device",
)
_OF_BOTH = ("token", "cache_dir", "force_download", "local_files_only")
_OPTIONS = (
    *_OF_ADAPTER, *_OF_BOTH, "adapter_name", "is_trainable", "config", "revision", "dtype", "torch_dtype", "device_map",
    "max_memory", "offload_folder", "quantization_config", "attn_implementation", "trust_remote_code",
)  # fmt: skip


def load_base(
    name_or_path: str, task_type: TaskType | str | None = TaskType.CAUSAL_LM, *, mapped: Any = None, **kwargs: Any
) -> Any:
    """The base model of that name, folder or Hub id; "sprout" is the embedded one.

    Args:
        task_type: decides which of transformers' auto classes loads it.
        mapped: the class that loads it, where the task does not decide.
        kwargs: go to transformers' `from_pretrained` (`dtype`, `device_map`, `revision`, ...).

    Raises:
        UsageError: it cannot be loaded, does not fit its own configuration, or an option is unknown.
    """
    import transformers

    auto = getattr(transformers, _AUTO_CLASSES[TaskType(task_type) if task_type else None])
    folder = Path(resolve(name_or_path))
    if folder.is_dir():
        check_stored(folder)
    with _explained(name_or_path, kwargs):
        model = (mapped or auto).from_pretrained(resolve(name_or_path), **kwargs)
    faults = [f"{path}: {fault}" for path, fault in stored_faults(model)]
    if faults:
        raise UsageError(f'base model "{name_or_path}" does not fit its configuration:\n' + bullet_list(faults))
    return model


def base_folder(name_or_path: str) -> Path:
    """The folder that holds a base model's files; a Hub id is downloaded."""
    folder = Path(resolve(name_or_path))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    with _explained(name_or_path):
        try:
            return Path(
                snapshot_download(name_or_path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
            )
        except (HfHubHTTPError, HFValidationError) as error:
            raise ValueError(str(error)) from error


def load_tokenizer(name_or_path: str, **kwargs: Any) -> Any:
    """The tokenizer that belongs to a base model; "sprout" is the embedded one's."""
    from transformers import AutoTokenizer

    with _explained(name_or_path):
        return AutoTokenizer.from_pretrained(resolve(name_or_path), **kwargs)


@contextmanager
def _explained(name_or_path: str, options: Mapping[str, Any] = MappingProxyType({})) -> Iterator[None]:
    """Loading errors in one sentence."""
    try:
        yield
    except TypeError as error:  # transformers gives what it does not know to the model's class
        unknown = next((name for name in options if f"unexpected keyword argument '{name}'" in str(error)), None)
        if unknown is None:
            raise
        raise UsageError(
            f'"{unknown}" is no option for loading the base model "{name_or_path}"{did_you_mean(unknown, _OPTIONS)}'
        ) from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f'base model "{name_or_path}" cannot be loaded: {reason}\n'
            'give "sprout" (embedded), a folder written by save_pretrained, or a Hub id (which needs network access)'
        ) from error


class AutoPeftModel:
    """`from_pretrained(adapter)` loads the base that the adapter names, then the adapter on it."""

    task_type: ClassVar[Any] = None

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError(f"{type(self).__name__} cannot be instantiated; call {type(self).__name__}.from_pretrained(adapter)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """The adapter on the base that it names; a tokenizer in its folder with more tokens than the base resizes the base.

        Args:
            config: used instead of the one in the adapter's folder.
            revision: of the adapter; the base's is in the configuration.
            import_allowlist: without effect: classes of transformers alone are loaded by name.
            kwargs: `subfolder`, `autocast_adapter_dtype` and others of the adapter (`_OF_ADAPTER`) go to
                `PeftModel.from_pretrained`; `token`, `cache_dir` and others of downloads (`_OF_BOTH`) to both; the rest
                (`dtype`, `device_map`, `quantization_config`, ...) to the base's `from_pretrained`.

        Raises:
            ConfigError: the adapter names no base, or was made for another task.
            UsageError: the base cannot be loaded, or an option is unknown.
        """
        if kwargs.get("use_auth_token") is not None:
            kwargs.setdefault("token", kwargs["use_auth_token"])
        kwargs.pop("use_auth_token", None)
        of_base = {name: value for name, value in kwargs.items() if name not in _OF_ADAPTER}
        of_adapter = {name: value for name, value in kwargs.items() if name in _OF_ADAPTER or name in _OF_BOTH}
        where = {**of_adapter, "revision": revision}
        autocast = where.pop("autocast_adapter_dtype", True)
        key_mapping = where.pop("key_mapping", None)
        folder = AdapterFolder.find(pretrained_model_name_or_path, **where)
        config = config or read_config(folder)
        task = cls.task_type or config.task_type
        if cls.task_type and isinstance(config.task_type, TaskType) and config.task_type != cls.task_type:
            raise ConfigError(f"the adapter was made for {config.task_type.value}; {cls.__name__} loads {cls.task_type.value}")
        if not config.base_model_name_or_path:
            message = "the adapter's config names no base model; load the base and call PeftModel.from_pretrained(base, ...)"
            raise ConfigError(message)
        mapped = None if task else _mapped(config)
        base = load_base(config.base_model_name_or_path, task, mapped=mapped, revision=config.revision or "main", **of_base)
        _make_room(base, folder, pretrained_model_name_or_path, where)
        return PeftModel.from_pretrained(
            base, pretrained_model_name_or_path, adapter_name, is_trainable, config, autocast, key_mapping=key_mapping, **where
        )


def _mapped(config: PeftConfig) -> Any:
    """The class of the base of an adapter without a task, where its configuration names one of transformers."""
    import transformers

    mapping = config.auto_mapping or {}
    name, library = mapping.get("base_model_class"), str(mapping.get("parent_library"))
    if not name or library.partition(".")[0] != "transformers":
        return None
    return getattr(transformers, str(name), None)


def _make_room(base: Any, folder: AdapterFolder, name_or_path: str, where: Mapping[str, Any]) -> None:
    """Resize the embeddings of a base for the tokens that the tokenizer beside an adapter has more than they."""
    if folder.locate(_TOKENIZER_FILE) is None or not hasattr(base, "resize_token_embeddings"):
        return
    options = {
        name: value for name, value in where.items() if name in (*_OF_BOTH, "revision", "subfolder") and value is not None
    }
    try:
        tokens = len(load_tokenizer(name_or_path, **options))
    except (UsageError, ImportError):  # not a tokenizer of transformers; tensors of other sizes are refused in any case
        return
    if tokens > len(base.get_input_embeddings().weight):
        base.resize_token_embeddings(tokens)


class AutoPeftModelForCausalLM(AutoPeftModel):
    task_type = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    task_type = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    task_type = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(AutoPeftModel):
    task_type = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    task_type = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    task_type = TaskType.FEATURE_EXTRACTION
