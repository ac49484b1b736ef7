"""An adapter and its base in one call: the adapter's configuration names the base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from .assets import resolve
from .bases.quantised import stored_faults
from .bases.stored_base import check_stored
from .config import TaskType, read_config
from .errors import ConfigError, UsageError, bullet_list
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


def load_base(name_or_path: str, task_type: TaskType | str | None = TaskType.CAUSAL_LM, **kwargs: Any) -> Any:
    """The base model of that name, folder or Hub id; "sprout" is the embedded one.

    kwargs go to transformers' `from_pretrained` (`dtype`, `device_map`, `revision`, ...).
    """
    import transformers

    auto = getattr(transformers, _AUTO_CLASSES[TaskType(task_type) if task_type else None])
    folder = Path(resolve(name_or_path))
    if folder.is_dir():
        check_stored(folder)
    with _explained(name_or_path):
        model = auto.from_pretrained(resolve(name_or_path), **kwargs)
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
def _explained(name_or_path: str) -> Iterator[None]:
    """Loading errors in one sentence."""
    try:
        yield
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
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """kwargs go to the base's `from_pretrained` (`dtype`, `device_map`, `quantization_config`, ...).

        Raises:
            ConfigError: the adapter names no base, or was made for another task.
        """
        where: dict[str, Any] = {"revision": revision, "subfolder": subfolder, "token": token}
        config = read_config(AdapterFolder.find(pretrained_model_name_or_path, **where))
        task = cls.task_type or config.task_type
        if cls.task_type and isinstance(config.task_type, TaskType) and config.task_type != cls.task_type:
            raise ConfigError(f"the adapter was made for {config.task_type.value}; {cls.__name__} loads {cls.task_type.value}")
        if not config.base_model_name_or_path:
            message = "the adapter's config names no base model; load the base and call PeftModel.from_pretrained(base, ...)"
            raise ConfigError(message)
        base = load_base(config.base_model_name_or_path, task, revision=config.revision or "main", **kwargs)
        return PeftModel.from_pretrained(base, pretrained_model_name_or_path, adapter_name, is_trainable, **where)


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
