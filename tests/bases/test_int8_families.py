"""Source S1d: LoRA on INT8 bases of the families that it names, OPT and Whisper, in small shapes."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from tests import quantised
from tunesmith import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from tunesmith.bases.quantised import quantised_views

INT8 = {"load_in_8bit": True}


def opt():
    sizes = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 64}
    torch.manual_seed(0)
    return tf.OPTForCausalLM(tf.OPTConfig(**sizes, vocab_size=96, max_position_embeddings=64, pad_token_id=1))


def whisper():
    sizes = {
        "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_mel_bins": 16, "max_source_positions": 32,
    }  # fmt: skip
    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    model = tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(**sizes, vocab_size=96, max_target_positions=32, begin_suppress_tokens=None, **tokens)
    )
    model.generation_config.update(suppress_tokens=None, begin_suppress_tokens=None)
    return model


IDS = torch.randint(4, 96, (2, 7), generator=torch.Generator().manual_seed(1))
HEARD = {"input_features": torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1)), "labels": IDS}
READ = {"input_ids": IDS, "labels": IDS}
# maker, auto class, a batch, trained parameters: r * (in + out) of q and v in each attention
FAMILIES = {
    "opt": (opt, tf.AutoModelForCausalLM, READ, 2 * 2 * 16 * (64 + 64)),
    "whisper": (whisper, tf.AutoModelForSpeechSeq2Seq, HEARD, 6 * 2 * 16 * (64 + 64)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_trains_saves_and_loads(family, tmp_path):
    make, auto, batch, trained = FAMILIES[family]
    make().to(torch.float16).save_pretrained(tmp_path / "base")

    def base():
        config = tf.BitsAndBytesConfig(**INT8)
        return auto.from_pretrained(tmp_path / "base", quantization_config=config, dtype=torch.bfloat16)

    model = prepare_model_for_kbit_training(base())
    before = quantised.stored(model)
    assert sum(1 for _ in quantised_views(model)) == {"opt": 12, "whisper": 32}[family]
    config = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], lora_dropout=0.05, bias="none")
    handle = get_peft_model(model, config).train()
    assert handle.get_nb_trainable_parameters()[0] == trained
    optimiser = torch.optim.AdamW([p for p in handle.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(15):
        loss = handle(**batch).loss
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in handle.adapters.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    quantised.assert_same_stored(quantised.stored(model), before)
    handle.save_pretrained(tmp_path / "adapter")
    asked = {name: value for name, value in batch.items() if name != "labels"}
    found, expected = (
        h.eval().generate(**asked, max_new_tokens=5, do_sample=False)
        for h in (PeftModel.from_pretrained(prepare_model_for_kbit_training(base()), tmp_path / "adapter"), handle)
    )
    assert torch.equal(found, expected)


def test_trained_parameters_of_opt_6_7b():
    """The source's figure, on a model without memory: r=16 on q and v of 32 layers, 4096 wide."""
    config = tf.OPTConfig(
        hidden_size=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32, word_embed_proj_dim=4096
    )
    with torch.device("meta"):
        handle = get_peft_model(tf.OPTForCausalLM(config), LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
    assert handle.get_nb_trainable_parameters()[0] == 8_388_608


def test_trained_parameters_of_llama_2_7b():
    """The figure of the QLoRA example: r=64 on q and v."""
    with torch.device("meta"):
        handle = get_peft_model(tf.LlamaForCausalLM(tf.LlamaConfig()), LoraConfig(r=64, task_type="CAUSAL_LM"))
    assert handle.get_nb_trainable_parameters()[0] == 33_554_432
