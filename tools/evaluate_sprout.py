"""Measure the exported sprout and write its model card, every figure generated.

python tools/evaluate_sprout.py measure     # bits per byte and samples -> evaluation.json, about 2 minutes
python tools/evaluate_sprout.py card        # README.md and ATTRIBUTION.md from evaluation.json
"""

import argparse
import json
import math
import string
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretrain_sprout import (
    BATCH,
    CONTEXT,
    DECAY,
    EOT_ID,
    NEVER_TRAINED,
    PAD_ID,
    RATE,
    WARMUP,
    add_folders,
    corpus,
    replace_into,
    write_json,
)

SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}
PROMPTS = (
    "Once upon a time there was a",
    "The old man opened the door and",
    "The heart is a muscle that",
    "The American economy",
    "My fellow citizens,",
    "User: I would like to find a restaurant.\nAssistant:",
    "def is_even(number: int) -> bool:",
)


@torch.no_grad()
def bits_per_byte(model, tokenizer, docs: list[str], stride: int = 256) -> float:
    """Sum of -log2 p(token | context) over all tokens of all documents, divided by their UTF-8 bytes.

    Each document stands alone behind one <|endoftext|>, which is not scored. Windows of CONTEXT tokens
    move on by `stride`, so every token past the first window has CONTEXT - stride to CONTEXT tokens of context.
    """
    inputs, targets = [], []
    for doc in docs:
        ids = [EOT_ID, *tokenizer(doc).input_ids]
        for start in range(0, max(1, len(ids) - 1 - CONTEXT + stride), stride):
            window = torch.full((CONTEXT + 1,), PAD_ID)
            window[: len(ids) - start] = torch.tensor(ids[start : start + CONTEXT + 1])
            target = window[1:].clone()
            target[: CONTEXT - stride if start else 0] = -100
            target[max(0, len(ids) - 1 - start) :] = -100
            inputs.append(window[:-1])
            targets.append(target)
    nats = 0.0
    for i in range(0, len(inputs), 8):
        logits = model(torch.stack(inputs[i : i + 8]), use_cache=False).logits  # (B, T, V)
        nats += F.cross_entropy(logits.flatten(0, 1), torch.cat(targets[i : i + 8]), reduction="sum").item()
    return nats / math.log(2) / sum(len(d.encode()) for d in docs)


@torch.no_grad()
def sample(model, tokenizer, prompt: str, seed: int = 0) -> str:
    """At most 100 tokens behind the prompt, with the sampling settings that the card states."""
    torch.manual_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=100, **SAMPLING)
    return tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)


def measure(args) -> None:
    """Measure the exported weights (computing in float32) and write all that the card needs to evaluation.json."""
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    state = torch.load(args.run / "checkpoint.pt", mmap=True)
    log = [json.loads(line) for line in (args.run / "log.jsonl").read_text().splitlines()]
    classes = json.loads((args.run / "data.json").read_text())
    for name, (_, held) in corpus(args.corpus).items():
        classes[name]["bits_per_byte"] = round(bits_per_byte(model, tokenizer, held), 3)
        print(name, classes[name]["bits_per_byte"], flush=True)
    training = {key: value for key, value in state.items() if key not in ("model", "optimizers")}
    training |= {"tokens": state["step"] * BATCH * CONTEXT}
    training |= {"final_loss": round(sum(line["loss"] for line in log[-50:]) / 50, 3)}
    result = {
        "parameters": model.num_parameters(),
        "model_bytes": (args.out / "model.safetensors").stat().st_size,
        "training": training,
        "classes": classes,
        "samples": [{"prompt": prompt, "text": sample(model, tokenizer, prompt)} for prompt in PROMPTS],
    }
    replace_into(args.out, lambda folder: write_json(folder / "evaluation.json", result))


def provenance(folder: Path, heading: str) -> str:
    """One section of the corpus's PROVENANCE.md."""
    return (folder / "PROVENANCE.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0].strip()


def sources(folder: Path) -> list[dict[str, str]]:
    """The rows of PROVENANCE.md's table "Sources", without the classes never trained on."""
    lines = provenance(folder, "Sources").splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    named = [dict(zip(head, row, strict=True)) for row in rows]
    return [row for row in named if row["file"].removesuffix(".txt.gz") not in NEVER_TRAINED]


def table(head: list[str], rows: list[list]) -> str:
    """A Markdown table, numbers to the right."""
    marks = ["---:" if isinstance(cell, int | float) else "---" for cell in rows[0]]
    cells = [[f"{c:,}" if isinstance(c, int) else f"{c:.3f}" if isinstance(c, float) else c for c in r] for r in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, marks, *cells])


def card(args) -> None:
    """README.md and ATTRIBUTION.md beside the model: prose from tools/sprout_card/, figures from evaluation.json."""
    facts = json.loads((args.out / "evaluation.json").read_text())
    run, classes, rows = facts["training"], facts["classes"], sources(args.corpus)
    trained = {name: c for name, c in classes.items() if name not in NEVER_TRAINED}
    licences = {name: [r["licence"] for r in rows if r["file"] == f"{name}.txt.gz"] for name in trained}
    texts = {
        "data": table(
            ["class", "documents", "bytes", "tokens", "licences of the sources"],
            [
                [n, c["train_documents"], c["train_bytes"], c["train_tokens"], "; ".join(dict.fromkeys(licences[n]))]
                for n, c in trained.items()
            ],
        ),
        "bits": table(
            ["class", "class in training data", "held-out documents", "held-out bytes", "bits per byte"],
            [
                [n, "yes" if n in trained else "no", c["held_out_documents"], c["held_out_bytes"], c["bits_per_byte"]]
                for n, c in sorted(classes.items(), key=lambda item: item[0] in NEVER_TRAINED)
            ],
        ),
        "samples": "\n\n".join(
            f"{json.dumps(s['prompt'])}\n\n```text\n{s['prompt']}{s['text'].rstrip()}\n```" for s in facts["samples"]
        ),
        "sources": table(
            ["class", "source", "commit", "licence"],
            [[r["file"].removesuffix(".txt.gz"), r["source (project, commit below)"], r["commit"], r["licence"]] for r in rows],
        ),
        "notices": provenance(args.corpus, "Attribution and notices"),
        "changes": provenance(args.corpus, "What was changed"),
        "licence_texts": (args.corpus / "LICENSES.txt").read_text(),
    }
    numbers = {
        "parameters": f"{facts['parameters']:,}",
        "model_bytes": f"{facts['model_bytes']:,}",
        "steps": f"{run['steps']:,}",
        "plain_steps": run["steps"],
        "tokens": f"{run['tokens'] / 1e6:.1f}",
        "epochs": f"{run['tokens'] / sum(c['train_tokens'] for c in trained.values()):.2f}",
        "minutes": f"{run['seconds'] / 60:.0f}",
        "train_bytes": f"{sum(c['train_bytes'] for c in trained.values()) / 1e6:.1f}",
        "final_loss": run["final_loss"],
        "machine": run["machine"],
        "resumed_at": ", ".join(f"{step:,}" for step in run["resumed_at"]) or "none",
        "seed": run["seed"],
        "batch": BATCH,
        "rate": RATE,
        "warmup": WARMUP,
        "decay": f"{DECAY:.0%}",
    }

    def write(folder):
        for name in ("README.md", "ATTRIBUTION.md"):
            template = string.Template((Path(__file__).parent / "sprout_card" / name).read_text())
            (folder / name).write_text(template.substitute(numbers | texts))

    replace_into(args.out, write)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"measure": measure, "card": card}
    parser.add_argument("command", choices=commands)
    add_folders(parser)
    args = parser.parse_args()
    commands[args.command](args)


if __name__ == "__main__":
    main()
