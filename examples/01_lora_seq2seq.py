"""LoRA on a sequence-to-sequence model: an mT5 learns to tell complaints from other messages.

Small by default: a tiny random mT5 that reads bytes, and generated messages. The one argument that makes it full-size is
`--base bigscience/mt0-large`; `--data` takes a csv file with the columns `Tweet text` and `Label`.
"""

import argparse
import random

import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    ByT5Tokenizer,
    DataCollatorForSeq2Seq,
    MT5Config,
    Trainer,
    TrainingArguments,
)

from tunesmith import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from tunesmith.data.files import read_texts

parser = argparse.ArgumentParser()
parser.add_argument("--base", help="a folder or a model id on the Hub; default: a tiny random mT5")
parser.add_argument("--data", help="a csv file with the columns `Tweet text` and `Label`; default: generated rows")
parser.add_argument("--output-dir", default="complaints")
settings = parser.parse_args()


def rows():
    """`(messages, labels)`."""
    if settings.data:
        return read_texts(settings.data, "Tweet text"), read_texts(settings.data, "Label")
    things = ["phone", "train", "order", "bill", "flight", "parcel", "screen", "hotel"]
    good, bad = ["great", "lovely", "on time", "perfect"], ["broken", "late", "awful", "lost"]
    choose = random.Random(0).choice
    labels = [choose(["complaint", "no complaint"]) for _ in range(160)]
    return [f"My {choose(things)} is {choose(bad if label == 'complaint' else good)}" for label in labels], labels


torch.manual_seed(0)
if settings.base:
    tokenizer = AutoTokenizer.from_pretrained(settings.base)
    model = AutoModelForSeq2SeqLM.from_pretrained(settings.base)
    learning_rate, epochs, targets = 1e-3, 5, None  # None: the usual targets of the architecture, q and v
else:
    tokenizer = ByT5Tokenizer()
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4, "vocab_size": len(tokenizer)}
    model = AutoModelForSeq2SeqLM.from_config(
        MT5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0, tie_word_embeddings=True)
    )
    model.save_pretrained(f"{settings.output_dir}/base")
    learning_rate, epochs, targets = 5e-3, 25, "all-linear"  # a random base needs more training

peft_config = LoraConfig(
    task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1, target_modules=targets
)
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()

messages, labels = rows()
asked = [f"Tweet text : {message} Label : " for message in messages]
examples = [{**tokenizer(text), "labels": tokenizer(label)["input_ids"]} for text, label in zip(asked, labels)]
split = len(examples) * 4 // 5


def accuracy(model):
    """The fraction of held-out rows that get exactly the right answer."""
    inputs = tokenizer(asked[split:], padding=True, return_tensors="pt").to(model.device)
    with torch.no_grad():
        outputs = model.eval().generate(**inputs, max_new_tokens=16)
    answers = tokenizer.batch_decode(outputs, skip_special_tokens=True)
    return sum(answer == label for answer, label in zip(answers, labels[split:])) / len(answers)


print(f"accuracy before: {accuracy(model):.0%}")
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=settings.output_dir,
        learning_rate=learning_rate,
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    ),
    train_dataset=examples[:split],
    data_collator=DataCollatorForSeq2Seq(tokenizer, model=model.bare_base),
)
trainer.train()
model.save_pretrained(settings.output_dir)  # only the adapter; model.push_to_hub("my_awesome_peft_model") works too

config = PeftConfig.from_pretrained(settings.output_dir)
base = AutoModelForSeq2SeqLM.from_pretrained(settings.base or f"{settings.output_dir}/base")
loaded = PeftModel.from_pretrained(base, settings.output_dir)
print(f"accuracy after: {accuracy(loaded):.0%} (a {config.peft_type.value} adapter, reloaded)")
