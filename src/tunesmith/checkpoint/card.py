"""The model card that goes with an adapter."""

from __future__ import annotations

from ..config import PeftConfig, TaskType

_PIPELINES = {
    TaskType.CAUSAL_LM: "text-generation",
    TaskType.SEQ_2_SEQ_LM: "text2text-generation",
    TaskType.SEQ_CLS: "text-classification",
    TaskType.TOKEN_CLS: "token-classification",
    TaskType.QUESTION_ANS: "question-answering",
    TaskType.FEATURE_EXTRACTION: "feature-extraction",
}


def card_text(config: PeftConfig) -> str:
    """A card in the Hub's format: YAML that the Hub reads, then how to load the adapter."""
    base = config.base_model_name_or_path or ""
    method = str(getattr(config.peft_type, "value", config.peft_type)).lower().replace("_", "-")
    lines = ["---", "library_name: peft"]
    lines += [f"base_model: {base}"] if base else []
    lines += ["tags:", *([f"- base_model:adapter:{base}"] if base else []), f"- {method}", "- tunesmith"]
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
