"""Text classification and token classification: each handle trains its own head.

Small by default: tiny random BERTs that read words, and generated texts. The one argument that makes it full-size is
`--base google-bert/bert-base-multilingual-cased`; `--data` takes a file with the columns `text` and `label` for the first task.
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
parser.add_argument("--base", help="a folder or a model id on the Hub; default: a tiny random BERT")
parser.add_argument("--data", help="a file with the columns `text` and `label`; default: generated rows")
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
    """Train on three quarters of the rows; print the accuracy on the rest, before and after."""

    def accuracy(prediction):
        labels = prediction.label_ids
        return {"accuracy": float((prediction.predictions.argmax(-1) == labels)[labels != -100].mean())}

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
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    print(f"{name}: accuracy {before:.0%} before, {trainer.evaluate()['eval_accuracy']:.0%} after")
    model.save_pretrained(f"{settings.output_dir}/{name}")  # the adapter and the trained head


# Text classification. The task_type makes the head trainable, as a private copy: the base keeps its own.
if settings.data:
    texts, opinions = read_texts(settings.data, "text"), read_texts(settings.data, "label")
classes = sorted(set(opinions))
rows = [{**tokenizer(text, truncation=True), "label": classes.index(opinion)} for text, opinion in zip(texts, opinions)]
config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, lora_dropout=0.1)
model = get_peft_model(base_model(AutoModelForSequenceClassification, len(classes)), config)
model.print_trainable_parameters()
train("opinions", model, rows, DataCollatorWithPadding(tokenizer))

# Token classification. If a word has several tokens, the first is labelled; the others get -100 (no label).
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
