"""The embedded base model: small, complete, and a language model."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tunesmith import load_base, load_tokenizer
from tunesmith.assets import FOLDER, public_name, resolve

PROSE = (
    "The rain had stopped by morning, and the old woman opened the window to let the air in. "
    "She had lived in the house for many years, and she knew the sound of every door."
)


@pytest.fixture(scope="module")
def sprout():
    return load_base("sprout", dtype=torch.float32).eval(), load_tokenizer("sprout")


def test_is_at_most_16_megabytes_of_bf16():
    folder = FOLDER / "sprout"
    assert (folder / "model.safetensors").stat().st_size <= 16_000_000
    assert load_base("sprout", dtype="auto").dtype == torch.bfloat16


def test_comes_with_a_card_and_the_attributions_its_data_asks_for():
    folder = FOLDER / "sprout"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert all(word in card for word in ("bits per byte", "licence", "steps", "Limits"))
    assert "CC BY" in (folder / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("text", ["Hello, world!", "  two  spaces\n\n\ttab", "你好世界", "naïve café 🌱", "x = [1, 23]", ""])
def test_tokenizer_gives_every_text_back(text, sprout):
    _, tokenizer = sprout
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_padding_is_not_the_end(sprout):
    model, tokenizer = sprout
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.chat_template is None


def test_predicts_english_far_better_than_its_alphabet(sprout):
    model, tokenizer = sprout
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(PROSE)["input_ids"]]])
    with torch.no_grad():
        nats = model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert nats / math.log(2) / len(PROSE.encode()) < 1.8  # bits per byte; random letters take 4.7


def test_writes_words_that_its_prompt_did_not_hold(sprout):
    model, tokenizer = sprout
    torch.manual_seed(0)
    inputs = tokenizer("The old man opened the door and", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=True, temperature=0.7, top_p=0.9)
    words = tokenizer.decode(ids[0]).split()
    assert len(set(words)) > 15
    common = {
        "the",
        "and",
        "of",
        "to",
        "a",
        "he",
        "his",
        "was",
        "in",
        "it",
        "had",
        "that",
        "with",
        "her",
        "she",
        "I",
        "for",
        "on",
    }
    assert len(common & set(words[7:])) >= 3


def test_name_and_folder_translate_both_ways():
    assert public_name(resolve("sprout")) == "sprout"
    assert resolve("someone/else") == "someone/else" and public_name("someone/else") == "someone/else"
    assert public_name(None) is None
