"""Preferences: a reward model, and a policy trained by DPO against its own base, which is in memory only once.

Small by default: the embedded base and generated pairs. The one argument that makes it full-size is `--base` with any causal
model on the Hub; `--data` takes rows with prompt, chosen and rejected.

DPO (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7) compares the policy with a reference model. Here the
reference is the policy without its adapter: `disable_adapter()` gives the base bit for bit, so no second copy is needed.
"""

import argparse
import itertools

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

from tunesmith import LoraConfig, TaskType, get_peft_model, load_base, load_tokenizer, resolve
from tunesmith.data.files import read_table

parser = argparse.ArgumentParser()
parser.add_argument("--base", default="sprout", help="sprout, a folder or a model id on the Hub")
parser.add_argument("--data", help="a file with prompt, chosen and rejected; default: generated pairs")
parser.add_argument("--output-dir", default="preferences")
settings = parser.parse_args()


def pairs():
    """`(prompt, chosen, rejected)`: friendly answers are preferred to curt ones."""
    if settings.data:
        return [
            tuple(record.row[name] for name in ("prompt", "chosen", "rejected")) for record in read_table(settings.data).records
        ]
    asked = ["Can you help me?", "Is the shop open?", "Where is the station?", "What time is it?"]
    greetings = ["Of course, with pleasure.", "Thank you for asking, gladly.", "Certainly, happy to help."]
    curt = ["No.", "Find out.", "Not my problem."]
    return [(f"User: {a}\nAssistant: ", g, c) for (a, g, c) in itertools.product(asked, greetings, curt)]


torch.manual_seed(0)
tokenizer = load_tokenizer(settings.base)
rows = pairs()
test, train = rows[::4], [row for index, row in enumerate(rows) if index % 4]
lora = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


def batch_of(texts):
    """Token ids and attention mask, padded on the right."""
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    longest = max(map(len, ids))
    masks = [[1] * len(row) + [0] * (longest - len(row)) for row in ids]
    padded = [row + [tokenizer.eos_token_id] * (longest - len(row)) for row in ids]
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(masks)}


def fit(model, loss_of, epochs, learning_rate):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(train)).split(8):
            loss_of([train[i] for i in index.tolist()]).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()


# --- a reward model: one score per text, higher for the preferred one -------------------------------------------------------

scorer = AutoModelForSequenceClassification.from_pretrained(resolve(settings.base), num_labels=1)
scorer.config.pad_token_id = tokenizer.eos_token_id
reward = get_peft_model(scorer, LoraConfig(task_type=TaskType.SEQ_CLS, **lora))


def reward_margins(rows):
    scores = reward(**batch_of([p + c for p, c, _ in rows] + [p + r for p, _, r in rows])).logits[:, 0]  # (2 * rows,)
    return scores[: len(rows)] - scores[len(rows) :]


def accuracy(margins):
    with torch.no_grad():
        return f"{(margins(test) > 0).float().mean().item():.0%}"


before = accuracy(reward_margins)
fit(reward, lambda rows: -logsigmoid(reward_margins(rows)).mean(), epochs=2, learning_rate=1e-3)
print(f"reward model: {before} of held-out pairs ranked correctly before, {accuracy(reward_margins)} after")
reward.save_pretrained(f"{settings.output_dir}/reward")

# --- a policy: one base, with the adapter as the model, without it as the reference -----------------------------------------

policy = get_peft_model(load_base(settings.base), LoraConfig(task_type=TaskType.CAUSAL_LM, **lora))


def answer_log_probabilities(rows, answers):
    """The policy's log-probability of each complete answer, `(rows,)`."""
    batch = batch_of([row[0] + answer for row, answer in zip(rows, answers)])
    logits = policy(**batch).logits[:, :-1].float()
    chosen = batch["input_ids"][:, 1:]
    each = logits.log_softmax(-1).gather(-1, chosen[..., None])[..., 0]  # (rows, T - 1)
    mask = batch["attention_mask"][:, 1:].clone()
    for index, row in enumerate(rows):
        mask[index, : len(tokenizer(row[0])["input_ids"]) - 1] = 0  # the prompt does not count
    return (each * mask).sum(-1)


def policy_margins(rows, beta=0.1):
    """How much more the policy prefers the chosen answer than the reference does."""
    answers = [row[1] for row in rows], [row[2] for row in rows]
    now = [answer_log_probabilities(rows, side) for side in answers]
    with torch.no_grad(), policy.disable_adapter():
        reference = [answer_log_probabilities(rows, side) for side in answers]
    return beta * ((now[0] - reference[0]) - (now[1] - reference[1]))


def shown():
    with torch.no_grad():
        return f"{policy_margins(test).mean().item():.2f}"


before = shown()
fit(policy, lambda rows: -logsigmoid(policy_margins(rows)).mean(), epochs=2, learning_rate=1e-3)
print(f"policy: mean margin {before} before, {shown()} after; {accuracy(policy_margins)} of held-out pairs ranked correctly")
policy.save_pretrained(f"{settings.output_dir}/policy")
