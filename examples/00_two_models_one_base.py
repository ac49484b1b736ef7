# %% [markdown]
# # Two models, one base
#
# Prompt tuning trains only a few virtual tokens before the input, here four. **One** frozen base, in memory once, becomes two
# models: a prompt writer and a quote writer.
#
# Small by default: the embedded base *sprout* and its demo data, with no downloads. The one argument that makes it full-size is
# `--base bigscience/bloomz-560m`.

# %%
import argparse
import math
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

import tunesmith
from tunesmith import PeftModel, PromptTuningConfig, PromptTuningInit, TaskType, Trainer, get_peft_model
from tunesmith.data.files import read_texts

demo = Path(tunesmith.__file__).parent / "assets" / "demo"
parser = argparse.ArgumentParser()
parser.add_argument("--base", default="sprout", help="sprout, a folder or a model id on the Hub")
parser.add_argument("--data", default=str(demo / "prompts.csv"), help="a file with a `prompt` column")
parser.add_argument("--quotes", default=str(demo / "quotes.jsonl"), help="a file with a `quote` column")
parser.add_argument("--output-dir", default="two-models")
settings, _ = parser.parse_known_args()  # a notebook kernel has its own arguments

# %% [markdown]
# ## The base, and what it writes without an adapter

# %%
model_name = tunesmith.resolve(settings.base)
tokenizer = AutoTokenizer.from_pretrained(model_name)
foundational_model = AutoModelForCausalLM.from_pretrained(model_name)


def get_outputs(model, text, max_new_tokens=40):
    inputs = tokenizer(text, return_tensors="pt")
    outputs = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        repetition_penalty=1.5,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.batch_decode(outputs, skip_special_tokens=True)[0]


input_prompt = "I want you to act as a motivational coach. "
input_sentences = "There are two things that matter:"
print(get_outputs(foundational_model, input_prompt))
print(get_outputs(foundational_model, input_sentences))

# %% [markdown]
# ## The data: 50 prompts and 25 quotes for training, 20 of each held out

# %%
prompts = [tokenizer(text) for text in read_texts(settings.data, "prompt")[:70]]
sentences = [tokenizer(text) for text in read_texts(settings.quotes, "quote")[:45]]
train_prompts, test_prompts = prompts[:50], prompts[50:]
train_sentences, test_sentences = sentences[:25], sentences[25:]

# %% [markdown]
# ## Two handles on one base
#
# Neither changes the base, and neither affects the other.

# %%
generation_config = PromptTuningConfig(
    task_type=TaskType.CAUSAL_LM,  # text generation
    prompt_tuning_init=PromptTuningInit.RANDOM,  # random initial virtual tokens
    num_virtual_tokens=4,
    tokenizer_name_or_path=model_name,
)
set_seed(0)
peft_model_prompt = get_peft_model(foundational_model, generation_config)
peft_model_sentences = get_peft_model(foundational_model, generation_config)
peft_model_prompt.print_trainable_parameters()
peft_model_sentences.print_trainable_parameters()

# %% [markdown]
# ## Training


# %%
def create_trainer(model, rows, learning_rate):
    arguments = TrainingArguments(
        output_dir=settings.output_dir,
        use_cpu=True,
        learning_rate=learning_rate,  # much higher than for full fine-tuning
        num_train_epochs=5,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
    trainer.remove_callback(PrinterCallback)  # it prints every log entry
    return trainer


def perplexity(trainer, rows):
    return math.exp(trainer.evaluate(rows)["eval_loss"])


scale = 10 if settings.base == "sprout" else 1  # a small base needs a higher learning rate
jobs = {
    "prompts": (create_trainer(peft_model_prompt, train_prompts, 0.003 * scale), test_prompts),
    "sentences": (create_trainer(peft_model_sentences, train_sentences, 0.0035 * scale), test_sentences),
}
for name, (trainer, test_rows) in jobs.items():
    before = perplexity(trainer, test_rows)
    trainer.train()
    trainer.model.save_pretrained(f"{settings.output_dir}/{name}")
    print(f"{name}: held-out perplexity {before:.1f} before, {perplexity(trainer, test_rows):.1f} after")

# %% [markdown]
# ## Reloading: two models, one base in memory

# %%
loaded_model_prompt = PeftModel.from_pretrained(foundational_model, f"{settings.output_dir}/prompts", is_trainable=False)
loaded_model_sentences = PeftModel.from_pretrained(foundational_model, f"{settings.output_dir}/sentences", is_trainable=False)
print("prompts:  ", get_outputs(loaded_model_prompt, input_prompt))
print("sentences:", get_outputs(loaded_model_sentences, input_sentences))
print("base:     ", get_outputs(foundational_model, input_sentences))

weights = Path(settings.output_dir, "prompts", "adapter_model.safetensors").stat().st_size
shared = loaded_model_prompt.bare_base is loaded_model_sentences.bare_base is foundational_model
print(f"each adapter file: {weights / 1024:.1f} KB; the base is in memory once: {shared}")
