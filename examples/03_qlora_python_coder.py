"""QLoRA: a 4-bit base learns to write Python, is merged, and runs in 4 bits again.

Small by default: the embedded base *sprout* and the tasks in `python_tasks.jsonl`, with no downloads. The one argument that
makes it full-size is `--base meta-llama/Llama-2-7b-hf`, with 18,000 rows from the Hub; `--data` takes your own file with the
columns instruction, input and output.

It needs `pip install "tunesmith[quant,tensorboard]" datasets`; `03_qlora_python_coder.yaml` is the same training as a recipe.
"""

import argparse
import math
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainingArguments

from tunesmith import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PackedCollator,
    Trainer,
    get_peft_model,
    prepare_model_for_kbit_training,
    resolve,
)

parser = argparse.ArgumentParser()
parser.add_argument("--base", default="sprout", help="sprout, a folder or a model id on the Hub")
parser.add_argument("--data", help="a json file; default: python_tasks.jsonl for sprout, rows from the Hub for other bases")
parser.add_argument("--output-dir", default="python-coder")
parser.add_argument("--hub-repo", help="push the merged model to this repository (owner/name)")
settings = parser.parse_args()

model_id = resolve(settings.base)
small = settings.base == "sprout"
adapter_folder, merged_folder = f"{settings.output_dir}/adapter", f"{settings.output_dir}/merged"
max_seq_length = 256 if small else 2048
torch.manual_seed(42)

# The rows, in the same prompt format as at inference.


def format_instruction(sample):
    return f"""### Instruction:
Use the Task below and the Input given to write the Response, which is a programming code that can solve the Task:

### Task:
{sample["instruction"]}

### Input:
{sample["input"]}

### Response:
{sample["output"]}"""


hub_rows = "iamtarun/python_code_instructions_18k_alpaca"
data = settings.data or (str(Path(__file__).with_name("python_tasks.jsonl")) if small else None)
dataset = load_dataset("json", data_files=data, split="train") if data else load_dataset(hub_rows, split="train")
dataset = dataset.shuffle(seed=42)
print(f"{len(dataset)} rows, such as:\n{format_instruction(dataset[0])}\n")

tokenizer = AutoTokenizer.from_pretrained(model_id)
tokenizer.pad_token = tokenizer.eos_token
tokenizer.padding_side = "right"


def tokens(sample):
    ids = tokenizer(format_instruction(sample) + tokenizer.eos_token, truncation=True, max_length=max_seq_length)["input_ids"]
    return {"input_ids": ids}


examples = dataset.map(tokens, remove_columns=dataset.column_names)
held_out = examples.select(range(min(16, len(examples) // 4)))
examples = examples.select(range(len(held_out), len(examples)))

# The base in 4 bits: NF4 with double quantisation (scales in 8 bits), computing in bfloat16.

bnb_config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
model = AutoModelForCausalLM.from_pretrained(model_id, quantization_config=bnb_config, dtype=torch.bfloat16, use_cache=False)
model = prepare_model_for_kbit_training(model, widen=False)  # embeddings and head stay in 16 bits: less memory, faster

peft_config = LoraConfig(task_type="CAUSAL_LM", r=64, lora_alpha=16, lora_dropout=0.1, bias="none")
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()

# Training. The texts of a batch are packed into one row, without padding and without attending to each other.


def perplexity(model):
    model.eval()
    with torch.no_grad():
        losses = [model(**PackedCollator()([row])).loss.item() for row in held_out]
    return math.exp(sum(losses) / len(losses))


args = TrainingArguments(
    output_dir=settings.output_dir,
    num_train_epochs=4 if small else 1,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    gradient_checkpointing=True,
    optim="paged_adamw_32bit",
    learning_rate=2e-3 if small else 2e-4,
    weight_decay=0.001,
    max_grad_norm=0.3,
    warmup_steps=0.03,
    lr_scheduler_type="cosine",
    logging_steps=25,
    save_strategy="epoch",
    report_to="tensorboard",
    disable_tqdm=True,
    seed=42,
)
before = perplexity(model)
trainer = Trainer(model=model, args=args, train_dataset=examples, data_collator=PackedCollator())
trainer.train()
trainer.save_model(adapter_folder)
tokenizer.save_pretrained(adapter_folder)
print(f"perplexity on {len(held_out)} held-out rows: {before:.2f} before, {perplexity(model):.2f} after")
print(f"training curves: tensorboard --logdir {settings.output_dir}")
del model, trainer

# Merge the adapter into the base: a plain 16-bit model.

model = AutoPeftModelForCausalLM.from_pretrained(adapter_folder, low_cpu_mem_usage=True, return_dict=True, dtype=torch.float16)
merged_model = model.merge_and_unload()
merged_model.save_pretrained(merged_folder, safe_serialization=True)
tokenizer.save_pretrained(merged_folder)
print(f"merged: {merged_folder}")
if settings.hub_repo:
    merged_model.push_to_hub(settings.hub_repo)
    tokenizer.push_to_hub(settings.hub_repo)
del model, merged_model

# Load the merged model in 4 bits and give it a task.

tokenizer = AutoTokenizer.from_pretrained(merged_folder)
model = AutoModelForCausalLM.from_pretrained(merged_folder, quantization_config=bnb_config, dtype=torch.bfloat16)
prompt = format_instruction({"instruction": "Write a function in Python that adds 5.", "input": "x = 6", "output": ""})
inputs = tokenizer(prompt, return_tensors="pt", truncation=True)
outputs = model.generate(**inputs, max_new_tokens=100, do_sample=True, top_p=0.9, temperature=0.5)
print(f"{prompt}{tokenizer.decode(outputs[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True)}")
