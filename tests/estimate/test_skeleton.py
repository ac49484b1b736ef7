"""Models without weights, by name."""

from __future__ import annotations

import pytest
import torch

from tunesmith.errors import UsageError
from tunesmith.estimate import skeleton


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("Llama-2-13B", 13_015_864_320),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248),
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen2.5-7B", 7_615_616_512),
        ("bigscience/bloomz-560m", 559_214_592),
        ("bloom-1b4-zh", 1_303_111_680),
        ("bigscience/mt0-large", 973_466_624),
        ("facebook/opt-6.7b", 6_658_473_984),
        ("openai/whisper-large", 1_543_304_960),
        ("gpt2", 124_439_808),
        ("Mistral-7B-v0.1", 7_241_732_096),
    ],
)
def test_known_models_have_the_published_sizes(name, parameters):
    model = skeleton.skeleton(skeleton.config_of(name), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_every_known_model_can_be_named():
    for name in skeleton.known_models():
        assert skeleton.config_of(f"someone/{name}").model_type == skeleton.known_models()[name]["model_type"]


def test_an_unknown_base_is_one_sentence():
    with pytest.raises(UsageError, match=r"cannot be fetched from the Hub.*not a known name; did you mean 'Llama-2-7B'"):
        skeleton.config_of("Llama-2-7Z")
