"""The model card that goes with an adapter."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..config import PeftConfig, TaskType
from ..storage.folder import CARD_FILE, write_folder, write_text

_PIPELINES = {
    TaskType.CAUSAL_LM: "text-generation",
    TaskType.SEQ_2_SEQ_LM: "text2text-generation",
    TaskType.SEQ_CLS: "text-classification",
    TaskType.TOKEN_CLS: "token-classification",
    TaskType.QUESTION_ANS: "question-answering",
    TaskType.FEATURE_EXTRACTION: "feature-extraction",
}


def write_card(config: PeftConfig, directory: str) -> None:
    """Write a folder's card; of one that is there, only what the Hub reads is brought up to date.

    Raises:
        AdapterFileError: the folder cannot be written to.
    """
    folder, text = Path(directory), card_text(config)
    if (folder / CARD_FILE).is_file():
        from huggingface_hub import ModelCard

        card = ModelCard.load(folder / CARD_FILE, ignore_metadata_errors=True)
        card.data.library_name = "peft"
        card.data.base_model = config.base_model_name_or_path or card.data.base_model
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *_tags(config)]))
        if isinstance(config.task_type, TaskType) and not card.data.pipeline_tag:
            card.data.pipeline_tag = _PIPELINES[config.task_type]
        text = str(card)
    write_folder(folder, {CARD_FILE: partial(write_text, text)})


def _tags(config: PeftConfig) -> list[str]:
    base = config.base_model_name_or_path
    return [*([f"base_model:adapter:{base}"] if base else []), _method(config), "tunesmith"]


def _method(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type)).lower().replace("_", "-")


def card_text(config: PeftConfig) -> str:
    """A card in the Hub's format: YAML that the Hub reads, then how to load the adapter."""
    base, method = config.base_model_name_or_path or "", _method(config)
    lines = ["---", "library_name: peft"]
    lines += [f"base_model: {base}"] if base else []
    lines += ["tags:", *(f"- {tag}" for tag in _tags(config))]
    if isinstance(config.task_type, TaskType):
        lines.append(f"pipeline_tag: {_PIPELINES[config.task_type]}")
    lines += ["---", "", f"# {method} adapter" + (f" for {base}" if base else ""), ""]
    lines += ["Trained with Tunesmith. It acts beside its base model, which is loaded separately.", ""]
    lines += [
        "```python",
        "from tunesmith import PeftModel",
        "",
        'model = PeftModel.from_pretrained(base, "this/folder")',
        "```",
    ]
    return "\n".join(lines) + "\n"
