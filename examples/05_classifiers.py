"""Classifiers: a label for a text, and a label for each of its words; each handle trains a head of its own.

Small by default: random BERTs that read words, and texts made here. The one argument that makes it a full-size job is
`--base google-bert/bert-base-multilingual-cased`; `--data` takes a file with the columns `text` and `label` for the first.
"""

import argparse
import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from tunesmith import LoraConfig, TaskType, Trainer, get_peft_model
from tunesmith.data.files import read_texts

parser = argparse.ArgumentParser()
parser.add_argument("--base", help="a folder or a hub id; default: a small random BERT")
parser.add_argument("--data", help="a file with the columns `text` and `label`; default: rows made here")
parser.add_argument("--output-dir", default="classifiers")
settings = parser.parse_args()

NAMES = ["Ana", "Bo", "Chen", "Dara", "Emil", "Fatima"]
PLACES = ["Oslo", "Lima", "Kyoto", "Cairo", "Quito", "Porto"]
GOOD, BAD = ["loves", "enjoys", "praises"], ["hates", "avoids", "fears"]
TAGS = ["other", "person", "place"]

choose = random.Random(0).choice
opinions = [choose(["good", "bad"]) for _ in range(160)]
texts = [f"today {choose(NAMES)} {choose(GOOD if opinion == 'good' else BAD)} {choose(PLACES)}" for opinion in opinions]

if settings.base:
    tokenizer = AutoTokenizer.from_pretrained(settings.base)
else:
    vocabulary = ["[PAD]", "[UNK]", "today", *NAMES, *PLACES, *GOOD, *BAD]
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def base_model(auto_class, num_labels):
    if settings.base:
        return auto_class.from_pretrained(settings.base, num_labels=num_labels)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    torch.manual_seed(0)
    return auto_class.from_config(BertConfig(vocab_size=len(tokenizer), **sizes, num_labels=num_labels))


def train(name, model, rows, collator):
    """Train on most rows; the share of right labels on the rest, before and after."""

    def right(prediction):
        labels = prediction.label_ids
        return {"right": float((prediction.predictions.argmax(-1) == labels)[labels != -100].mean())}

    split = len(rows) * 3 // 4
    arguments = TrainingArguments(
        output_dir=settings.output_dir,
        learning_rate=5e-4 if settings.base else 1e-2,
        num_train_epochs=4,
        per_device_train_batch_size=8,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows[:split],
        eval_dataset=rows[split:],
        data_collator=collator,
        compute_metrics=right,
    )
    before = trainer.evaluate()["eval_right"]
    trainer.train()
    print(f"{name}: {before:.0%} right before, {trainer.evaluate()['eval_right']:.0%} after")
    model.save_pretrained(f"{settings.output_dir}/{name}")  # the adapter and the head that was trained


# A label for each text. task_type says that the head is trained, as a private copy: the base keeps its own.
if settings.data:
    texts, opinions = read_texts(settings.data, "text"), read_texts(settings.data, "label")
classes = sorted(set(opinions))
rows = [{**tokenizer(text, truncation=True), "label": classes.index(opinion)} for text, opinion in zip(texts, opinions)]
config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, lora_dropout=0.1)
model = get_peft_model(base_model(AutoModelForSequenceClassification, len(classes)), config)
model.print_trainable_parameters()
train("opinions", model, rows, DataCollatorWithPadding(tokenizer))

# A label for each word. Of a word in several tokens the first is labelled, the others are -100: no label.
texts = [f"today {choose(NAMES)} {choose(GOOD + BAD)} {choose(PLACES)}" for _ in range(160)]
rows = []
for text in texts:
    encoded = tokenizer(text.split(), is_split_into_words=True)
    owners = encoded.word_ids()
    tags = [TAGS.index("person" if word in NAMES else "place" if word in PLACES else "other") for word in text.split()]
    labels = [-100 if owner is None or owner in owners[:position] else tags[owner] for position, owner in enumerate(owners)]
    rows.append({"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels})
config = LoraConfig(task_type=TaskType.TOKEN_CLS, r=8, lora_alpha=16, lora_dropout=0.1)
model = get_peft_model(base_model(AutoModelForTokenClassification, len(TAGS)), config)
train("names", model, rows, DataCollatorForTokenClassification(tokenizer))
