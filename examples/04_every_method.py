"""Every method on one small task: train, save, reload, compare the outputs; all on the same base.

Small by default: a tiny random GPT-2 that reads bytes. The one argument that makes it full-size is `--base` (sprout, or a
causal model on the Hub with biases and an attention that the methods support, such as `openai-community/gpt2`); `--data` takes
a text file.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, ByT5Tokenizer, GPT2Config

import tunesmith as ts
from tunesmith.data.files import read_texts

parser = argparse.ArgumentParser()
parser.add_argument("--base", help="sprout, a folder or a model id on the Hub; default: a tiny random GPT-2")
parser.add_argument("--data", default=str(Path(ts.__file__).parent / "assets/demo/quotes.jsonl"), help="one text per row")
parser.add_argument("--text-column", default="quote")
parser.add_argument("--steps", type=int, default=25)
settings = parser.parse_args()

torch.manual_seed(0)
if settings.base:
    base, tokenizer = ts.load_base(settings.base), ts.load_tokenizer(settings.base)
else:
    tokenizer = ByT5Tokenizer()
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": len(tokenizer)}
    base = AutoModelForCausalLM.from_config(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, pad_token_id=0))
texts = read_texts(settings.data, settings.text_column)[:8]
ids = [tokenizer(text)["input_ids"][:48] for text in texts]
batch = {"input_ids": torch.tensor([row[: min(map(len, ids))] for row in ids])}  # (8, T): texts of equal length
batch["labels"] = batch["input_ids"]
common = batch["input_ids"].unique()[:64].tolist()

TASK = {"task_type": "CAUSAL_LM"}
LINEAR = {**TASK, "target_modules": "all-linear"}
METHODS = {
    "LoRA": ts.LoraConfig(r=8, lora_alpha=16, **LINEAR),
    "prefix tuning (P-Tuning v2)": ts.PrefixTuningConfig(num_virtual_tokens=8, **TASK),
    "prompt tuning": ts.PromptTuningConfig(num_virtual_tokens=8, **TASK),
    "P-tuning": ts.PromptEncoderConfig(num_virtual_tokens=8, encoder_hidden_size=32, **TASK),
    "IA3": ts.IA3Config(**TASK),
    "bottleneck, Houlsby": ts.BottleneckConfig(bottleneck_size=8, **TASK),
    "bottleneck, parallel": ts.BottleneckConfig(bottleneck_size=8, style="parallel", **TASK),
    "rsLoRA": ts.LoraConfig(r=8, use_rslora=True, **LINEAR),
    "DoRA": ts.LoraConfig(r=8, use_dora=True, **LINEAR),
    "LoRA, PiSSA initialisation": ts.LoraConfig(r=8, init_lora_weights="pissa", **LINEAR),
    "LoRA, OLoRA initialisation": ts.LoraConfig(r=8, init_lora_weights="olora", **LINEAR),
    "AdaLoRA": ts.AdaLoraConfig(init_r=8, target_r=4, total_step=settings.steps, tinit=2, tfinal=5, **LINEAR),
    "VeRA": ts.VeraConfig(r=32, target_modules=["c_attn"] if not settings.base else None, **TASK),
    "LoHa": ts.LoHaConfig(r=8, **LINEAR),
    "LoKr": ts.LoKrConfig(r=8, **LINEAR),
    "OFT": ts.OFTConfig(oft_block_size=8, **LINEAR),
    "BOFT": ts.BOFTConfig(boft_block_size=8, **LINEAR),
    "HRA": ts.HRAConfig(r=8, **LINEAR),
    "LN tuning": ts.LNTuningConfig(**TASK),
    "BitFit": ts.BitFitConfig(**TASK),
    "trainable tokens": ts.TrainableTokensConfig(token_indices=common, **TASK),
    "multitask prompt tuning": ts.MultitaskPromptTuningConfig(num_virtual_tokens=8, num_tasks=2, **TASK),
    "LLaMA-Adapter": ts.AdaptionPromptConfig(adapter_len=8, adapter_layers=2, **TASK),
}

print(f"{'method':30}{'parameters':>11}{'file':>11}{'loss before':>13}{'after':>8}")
for name, config in METHODS.items():
    torch.manual_seed(0)
    try:
        model = ts.get_peft_model(base, config)
    except ts.TargetError as error:  # BitFit has nothing to train on a base without biases
        print(f"{name:30}{str(error).splitlines()[-1]}")
        continue
    inputs = batch | ({"task_ids": torch.arange(len(texts)) % 2} if name.startswith("multitask") else {})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=2 * config.usual_learning_rate)
    losses = []
    for _ in range(settings.steps):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        size = Path(folder, "adapter_model.safetensors").stat().st_size / 1024
        loaded = ts.PeftModel.from_pretrained(base, folder)
        torch.testing.assert_close(loaded.eval()(**inputs).logits, model.eval()(**inputs).logits)
    count = model.get_nb_trainable_parameters()[0]
    print(f"{name:30}{count:11,}{size:8.1f} KB{losses[0]:13.3f}{losses[-1]:8.3f}", flush=True)
