"""Adapters that bring their base, and what they cannot bring."""

from __future__ import annotations

import tunesmith as ts
from tests.bad_input import edit_config, one_error
from tunesmith import ConfigError


def test_adapter_that_names_no_base_cannot_bring_it(saved):
    edit_config(saved, base_model_name_or_path=None)
    with one_error(ConfigError, "names no base model", r"load the base and call PeftModel.from_pretrained"):
        ts.AutoPeftModelForCausalLM.from_pretrained(saved)


def test_auto_class_of_another_task(saved):
    with one_error(ConfigError, "was made for CAUSAL_LM; AutoPeftModelForSeq2SeqLM loads SEQ_2_SEQ_LM"):
        ts.AutoPeftModelForSeq2SeqLM.from_pretrained(saved)
