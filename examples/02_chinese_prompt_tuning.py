"""Chinese prompt tuning: a prompt initialised from text, trained on the answers but not on the questions.

Small by default: the embedded base (which knows no Chinese and sees the characters as bytes) and generated rows. The one
argument that makes it full-size is `--base Langboat/bloom-1b4-zh`; `--data` takes rows with instruction, input and output, such
as shibing624/alpaca-zh.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

from tunesmith import PeftModel, PromptTuningConfig, PromptTuningInit, TaskType, Trainer, get_peft_model, resolve
from tunesmith.data.files import read_table

parser = argparse.ArgumentParser()
parser.add_argument("--base", default="sprout", help="sprout, a folder or a model id on the Hub")
parser.add_argument("--data", help="a file or Hub dataset with instruction, input and output; default: generated rows")
parser.add_argument("--output-dir", default="prompt_tuning_zh")
settings = parser.parse_args()


def rows():
    if settings.data:
        return [record.row for record in read_table(settings.data).records[:10000]]
    capitals = {"中国": "北京", "法国": "巴黎", "日本": "东京", "英国": "伦敦", "西班牙": "马德里", "意大利": "罗马"}
    asked = ["请写出这个国家的首都。", "首都叫什么名字？", "告诉我它的首都。"]
    return [
        {"instruction": question, "input": country, "output": f"{country}的首都是{capital}。"}
        for question in asked
        for country, capital in capitals.items()
    ]


model_id_or_path = resolve(settings.base)
tokenizer = AutoTokenizer.from_pretrained(model_id_or_path)
model = AutoModelForCausalLM.from_pretrained(model_id_or_path)
MAX_LEN = 256


def process_function(example):
    """Labels for the answer and the end-of-text token only; -100 masks the question."""
    question = "\n".join(["Human: " + example["instruction"], example["input"]]).strip() + "\n\nAssistant: "
    instruction = tokenizer(question)["input_ids"]
    response = tokenizer(example["output"] + tokenizer.eos_token)["input_ids"]
    return {
        "input_ids": (instruction + response)[:MAX_LEN],
        "attention_mask": [1] * len(instruction + response[: MAX_LEN - len(instruction)]),
        "labels": ([-100] * len(instruction) + response)[:MAX_LEN],
    }


dataset = [process_function(example) for example in rows()]
test, train = dataset[::6], [row for number, row in enumerate(dataset) if number % 6]

# The prompt is initialised from this text. A larger `num_virtual_tokens` repeats its tokens, a smaller one truncates them.
text = "下面是一段人和机器的对话. 请根据人类输入的内容继续对话."
config = PromptTuningConfig(
    task_type=TaskType.CAUSAL_LM,
    prompt_tuning_init=PromptTuningInit.TEXT,
    prompt_tuning_init_text=text,
    num_virtual_tokens=len(tokenizer(text)["input_ids"]),
    tokenizer_name_or_path=model_id_or_path,
)
peft_model = get_peft_model(model, config)
peft_model.print_trainable_parameters()


def trainer_of(handle):
    arguments = TrainingArguments(
        output_dir=settings.output_dir,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8 if settings.data else 2,  # few rows: smaller batches, more steps
        learning_rate=3e-2 if settings.base == "sprout" else 3e-3,
        num_train_epochs=1 if settings.data else 3,
        logging_steps=10,
        save_steps=500 if settings.data else 8,
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    # DataCollatorForSeq2Seq keeps the labels. DataCollatorForLanguageModeling would replace them with the whole text.
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    return Trainer(model=handle, args=arguments, train_dataset=train, eval_dataset=test, data_collator=collator)


trainer = trainer_of(peft_model)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
print(f"held-out loss on the answers: {before:.2f} before, {after:.2f} after")

# A checkpoint holds the adapter, not the base: it loads on any copy of the base, and training resumes from it.
checkpoint = sorted(Path(settings.output_dir).glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))[0]
peft_model = PeftModel.from_pretrained(model, str(checkpoint), is_trainable=True)
resumed = trainer_of(peft_model)
resumed.train(resume_from_checkpoint=str(checkpoint))
print(f"resumed from {checkpoint.name}: {resumed.evaluate()['eval_loss']:.2f}, the same as without interruption")

ipt = tokenizer("Human: {}\n{}".format("考试有哪些技巧？", "").strip() + "\n\nAssistant: ", return_tensors="pt")
outputs = peft_model.eval().generate(**ipt.to(peft_model.device), max_new_tokens=60, do_sample=True)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
