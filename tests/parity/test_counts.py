"""The figures that published examples print, on models of the real shapes without weights; initial virtual tokens."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers as tf

import tunesmith as ts
from tests import tiny
from tests.parity.oracle import quiet


def _bloom(**shape):
    return tf.BloomForCausalLM(tf.BloomConfig(n_layer=24, n_head=16, **shape))


MODELS = {
    "bloomz-560m": lambda: _bloom(vocab_size=250880, hidden_size=1024),
    "bloom-1b4-zh": lambda: _bloom(vocab_size=46145, hidden_size=2048),
    "mt0-large": lambda: tf.MT5ForConditionalGeneration(
        tf.MT5Config(
            vocab_size=250112, d_model=1024, d_ff=2816, num_layers=24, num_heads=16, d_kv=64, feed_forward_proj="gated-gelu"
        )
    ),
    "llama-2-7b": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        )
    ),
    "opt-6.7b": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=50272, hidden_size=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32,
            max_position_embeddings=2048, word_embed_proj_dim=4096,
        )
    ),
}  # fmt: skip

PROMPT, LORA = ts.PromptTuningConfig, ts.LoraConfig
PRINTED = {
    "two models on one base": (
        "bloomz-560m", PROMPT(num_virtual_tokens=4, task_type="CAUSAL_LM", prompt_tuning_init="RANDOM"),
        "trainable params: 4,096 || all params: 559,218,688 || trainable%: 0.0007",
    ),
    "LoRA on a sequence-to-sequence model": (
        "mt0-large", LORA(r=8, lora_alpha=32, lora_dropout=0.1, task_type="SEQ_2_SEQ_LM"),
        "trainable params: 2,359,296 || all params: 975,825,920 || trainable%: 0.2418",
    ),
    "LoRA on an 8-bit base": (
        "opt-6.7b", LORA(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], lora_dropout=0.05, task_type="CAUSAL_LM"),
        "trainable params: 8,388,608 || all params: 6,666,862,592 || trainable%: 0.1258",
    ),
    "Chinese prompt tuning": (
        "bloom-1b4-zh", PROMPT(num_virtual_tokens=16, task_type="CAUSAL_LM"),
        "trainable params: 32,768 || all params: 1,303,144,448 || trainable%: 0.0025",
    ),
    "QLoRA": (
        "llama-2-7b", LORA(r=64, lora_alpha=16, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        "trainable params: 33,554,432 || all params: 6,771,970,048 || trainable%: 0.4955",
    ),
}  # fmt: skip


@pytest.mark.parametrize("example", PRINTED)
def test_printed_line_is_the_examples(example, capsys):
    name, config, line = PRINTED[example]
    with torch.device("meta"):
        base = MODELS[name]()
    handle = ts.get_peft_model(base, config)
    handle.print_trainable_parameters()
    assert capsys.readouterr().out == line + "\n"
    assert all(p.device.type == "meta" for p in handle.parameters()), "nothing of that size may be made here"


def test_tied_head_counts_once_unlike_in_the_article():
    with torch.device("meta"):
        tied = ts.get_peft_model(MODELS["mt0-large"](), LORA(task_type="SEQ_2_SEQ_LM"))
    head = tied.bare_base.lm_head.weight
    assert head is tied.bare_base.shared.weight
    assert tied.get_nb_trainable_parameters()[1] + head.numel() == 1_231_940_608  # what the article printed


@pytest.mark.parametrize("kind", ["lora", "prompt"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_counts_and_line_equal_the_references(name, kind, capsys):
    configs = {
        "lora": (LORA(task_type=tiny.task_of(name), r=3), peft.LoraConfig(task_type=tiny.task_of(name), r=3)),
        "prompt": (
            PROMPT(task_type=tiny.task_of(name), num_virtual_tokens=5),
            peft.PromptTuningConfig(task_type=tiny.task_of(name), num_virtual_tokens=5),
        ),
    }[kind]
    lines = []
    for library, config in zip((ts, peft), configs):
        with quiet():
            library.get_peft_model(tiny.make(name), config).print_trainable_parameters()
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1]


# --- initial values of virtual tokens -------------------------------------------------------------------------------------

TEXT = "Write a short and friendly sentence about the sea"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A tokenizer of whole words; the text has nine."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[UNK]": 0, **{word: i + 2 for i, word in enumerate(TEXT.split())}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    tf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(folder)
    return str(folder)


IDS = list(range(2, 11))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(4, IDS[:4]), (9, IDS), (13, IDS + IDS[:4]), (30, (IDS * 4)[:30])],
    ids=["cut off", "as it is", "begun again", "round and round"],
)
@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_text_init_is_cut_off_or_repeated_as_the_reference_does(name, tokens, expected, tokenizer_folder):
    options = {
        "task_type": "CAUSAL_LM", "num_virtual_tokens": tokens, "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": TEXT, "tokenizer_name_or_path": tokenizer_folder,
    }  # fmt: skip
    base = tiny.make(name)
    found = ts.get_peft_model(base, PROMPT(**options)).adapters.default.prompt().detach()
    assert torch.equal(found, base.get_input_embeddings().weight[expected])
    with quiet():
        theirs = peft.get_peft_model(tiny.make(name), peft.PromptTuningConfig(**options))
    assert torch.equal(found, theirs.prompt_encoder.default.embedding.weight)


def test_text_init_of_an_encoder_decoder_fills_the_rows_of_both(tokenizer_folder):
    config = PROMPT(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=6, prompt_tuning_init="TEXT",
        prompt_tuning_init_text=TEXT, tokenizer_name_or_path=tokenizer_folder,
    )  # fmt: skip
    base = tiny.make("t5")
    found = ts.get_peft_model(base, config).adapters.default.prompt().detach()
    assert torch.equal(found, base.get_input_embeddings().weight[(IDS * 2)[:12]])


def test_text_init_does_not_share_memory_with_the_base(tokenizer_folder):
    config = PROMPT(
        task_type="CAUSAL_LM", num_virtual_tokens=9, prompt_tuning_init="TEXT",
        prompt_tuning_init_text=TEXT, tokenizer_name_or_path=tokenizer_folder,
    )  # fmt: skip
    base = tiny.make("llama")
    before = base.get_input_embeddings().weight.clone()
    handle = ts.get_peft_model(base, config)
    torch.nn.init.zeros_(handle.adapters.default.prompt.embedding)
    assert torch.equal(base.get_input_embeddings().weight, before)


def test_sampled_init_is_rows_of_the_vocabulary(llama):
    config = PROMPT(task_type="CAUSAL_LM", num_virtual_tokens=20, prompt_tuning_init="SAMPLE_VOCAB")
    found = ts.get_peft_model(llama, config).adapters.default.prompt().detach()
    table = llama.get_input_embeddings().weight
    rows = [next(i for i, word in enumerate(table) if torch.equal(word, row)) for row in found]
    assert len(set(rows)) > 10


def test_random_init_is_normal_seeded_and_independent_of_the_base(llama):
    config = PROMPT(task_type="CAUSAL_LM", num_virtual_tokens=100)
    torch.manual_seed(1)
    first = ts.get_peft_model(llama, config).adapters.default.prompt().detach()
    torch.manual_seed(1)
    second = ts.get_peft_model(llama, config).adapters.default.prompt().detach()
    assert torch.equal(first, second)
    assert first.shape == (100, 32)
    assert abs(first.mean().item()) < 4 / 3200**0.5  # 4 deviations of the mean
    assert abs(first.std().item() - 1) < 4 / (2 * 3200) ** 0.5


def test_init_on_a_bf16_base_is_kept_in_fp32(llama):
    config = PROMPT(task_type="CAUSAL_LM", num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB")
    found = ts.get_peft_model(llama.to(torch.bfloat16), config).adapters.default.prompt()
    assert found.dtype == torch.float32


def test_embedded_base_takes_a_text_init_by_its_name():
    base = ts.load_base("sprout")
    config = PROMPT(
        task_type="CAUSAL_LM", num_virtual_tokens=8, prompt_tuning_init="TEXT",
        prompt_tuning_init_text="Once upon a time", tokenizer_name_or_path="sprout",
    )  # fmt: skip
    handle = ts.get_peft_model(base, config)
    ids = ts.load_tokenizer("sprout")("Once upon a time")["input_ids"]
    expected = base.get_input_embeddings().weight[(ids * 8)[:8]]
    assert torch.equal(handle.adapters.default.prompt().detach(), expected.float())
    assert handle.peft_config["default"].base_model_name_or_path == "sprout"
