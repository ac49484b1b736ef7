"""Many adapters in one batch: adapters of three methods train together in one pass through the base, then generate together.

Small by default: the embedded base. The one argument that makes it full-size is `--base` with any causal model.
"""

import argparse

import torch

from tunesmith import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model, load_base, load_tokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--base", default="sprout", help="sprout, a folder or a model id on the Hub")
parser.add_argument("--steps", type=int, default=40)
settings = parser.parse_args()

torch.manual_seed(0)
base, tokenizer = load_base(settings.base, dtype=torch.float32), load_tokenizer(settings.base)
TASK = {"task_type": "CAUSAL_LM"}
model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **TASK), adapter_name="sea")
model.add_adapter("hill", IA3Config(target_modules="all-linear", feedforward_modules=[], **TASK))
model.add_adapter("town", PromptTuningConfig(num_virtual_tokens=8, **TASK))

ENDINGS = {
    "sea": " the waves and the open sea.",
    "hill": " the hill and the windy path.",
    "town": " the town and its busy street.",
}
names = [name for name in ENDINGS for _ in range(2)]
starts = ["This morning I walked to", "We looked out of the window at"] * 3
texts = [start + ENDINGS[name] for start, name in zip(starts, names)]

tokenizer.padding_side = "right"
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
batch = tokenizer(texts, padding=True, return_tensors="pt")
labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

model.set_adapter(list(ENDINGS))  # all three train; each row uses its own
rates = {"sea": 2e-3, "hill": 2e-2, "town": 1e-1}
groups = [{"params": list(model.tree(name).parameters()), "lr": rate} for name, rate in rates.items()]
optimizer = torch.optim.AdamW(groups)
for step in range(settings.steps):
    loss = model(**batch, labels=labels, adapter_names=names).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (0, settings.steps - 1):
        print(f"step {step + 1}: loss {loss.item():.2f} across three adapters")

# The same prompt in one batch, continued by the base and by each adapter.
model.eval()
question = tokenizer(["This morning I walked to"] * 4, return_tensors="pt")
adapters = ["__base__", *ENDINGS]
answers = model.generate(**question, adapter_names=adapters, max_new_tokens=10, do_sample=False)
for name, answer in zip(adapters, tokenizer.batch_decode(answers, skip_special_tokens=True)):
    print(f"{name:9} {' '.join(answer.split())}")
