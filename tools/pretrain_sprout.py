"""Train sprout, the small Llama that Tunesmith ships, from plain text on a CPU.

    python tools/pretrain_sprout.py tokenizer   # byte-level BPE and token files, about 2 minutes
    python tools/pretrain_sprout.py train       # --resume starts from the last checkpoint
    python tools/pretrain_sprout.py export      # weights, tokenizer and configs to the assets folder

Then tools/evaluate_sprout.py measures it and writes its card.
"""

import argparse
import functools
import gzip
import hashlib
import json
import platform
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AttentionInterface, GenerationConfig, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
NEVER_TRAINED = ("math", "prompts")  # too close to what people adapt sprout to
EOT, PAD = "<|endoftext|>", "<|pad|>"
EOT_ID, PAD_ID = 0, 1
# The recipe; with --steps and --seed it determines the run.
CONTEXT = 512  # tokens per window
BATCH = 16  # windows per step
MICRO = 4  # windows per forward pass; 4,505 tokens/s on two Zen cores, with 8 windows 3,407
RATE = 3e-3
WARMUP = 100  # steps
DECAY = 0.3  # of the steps
# GPT-2's pre-tokeniser (Radford et al. 2019, encoder.py) with one change: every digit stands alone.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


# ---------------------------------------------------------------------------------------- data


def documents(path: Path) -> list[str]:
    """The documents of one corpus file, in file order."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8")
    return [d for d in text.split(f"\n{EOT}\n") if d.strip()]


def split(docs: list[str]) -> tuple[list[str], list[str]]:
    """(training, held-out) documents of one class.

    Held out are the documents with the smallest SHA-256, until they reach 1 % of the bytes of
    the class, but at least 100 kB, but at most 10 % (plus the rest of the last document).
    """
    total = sum(len(d.encode()) for d in docs)
    goal = min(max(0.01 * total, 100_000), 0.1 * total)
    held, size = set(), 0
    for _, i in sorted((hashlib.sha256(d.encode()).digest(), i) for i, d in enumerate(docs)):
        if size >= goal:
            break
        held.add(i)
        size += len(docs[i].encode())
    return [d for i, d in enumerate(docs) if i not in held], [docs[i] for i in sorted(held)]


def corpus(folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Class name -> (training, held-out) documents; classes never trained on have no training part."""
    paths = sorted(folder.glob("*.txt.gz"))
    if not paths:
        raise SystemExit(f"no *.txt.gz in {folder}; expected the corpus there, or name its folder with --corpus")
    classes = {}
    for path in paths:
        name = path.name.removesuffix(".txt.gz")
        train, held = split(documents(path))
        classes[name] = ([] if name in NEVER_TRAINED else train, held)
    return classes


def make_tokenizer(args) -> None:
    """Train the BPE on the training documents, then write them as one uint16 stream, <|endoftext|> before each."""
    classes = corpus(args.corpus)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[EOT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((d for train, _ in classes.values() for d in train), trainer)
    assert bpe.token_to_id(EOT) == EOT_ID and bpe.token_to_id(PAD) == PAD_ID

    folder = args.run / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    config = {"bos_token": EOT, "eos_token": EOT, "pad_token": PAD, "model_max_length": CONTEXT}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", config)

    sizes = {}
    with open(args.run / "tokens.u16", "wb") as stream:
        for name, (train, held) in classes.items():
            count = 0
            for i in range(0, len(train), 256):
                for enc in bpe.encode_batch(train[i : i + 256]):
                    np.array([EOT_ID, *enc.ids], dtype=np.uint16).tofile(stream)
                    count += 1 + len(enc.ids)
            sizes[name] = {
                "train_documents": len(train),
                "train_bytes": sum(len(d.encode()) for d in train),
                "train_tokens": count,
                "held_out_documents": len(held),
                "held_out_bytes": sum(len(d.encode()) for d in held),
            }
            print(name, sizes[name], flush=True)
    write_json(args.run / "data.json", sizes)


# ---------------------------------------------------------------------------------------- model


def blocked_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """Causal attention softmax(Q K^T * scaling) V by blocks of 128 queries, each against its past only.

    The same numbers as SDPA; compiled, on two Zen cores, forward and backward take 46 ms instead of
    94 ms (8 x 10 heads x 512 x 32, bf16). Shapes: query (B, H, T, D), key and value (B, H_kv, T, D).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)  # (B, H, T, D)
    query, out, size = query * scaling, [], 128
    future = torch.full((size, size), float("-inf"), dtype=query.dtype).triu(1)
    for start in range(0, query.shape[2], size):
        stop = start + size
        scores = query[:, :, start:stop] @ key[:, :, :stop].transpose(-1, -2)  # (B, H, size, stop)
        scores = torch.cat([scores[..., :start], scores[..., start:] + future], -1)
        out.append(scores.float().softmax(-1).to(value.dtype) @ value[:, :, :stop])
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None  # (B, T, H, D)


def new_model(seed: int) -> LlamaForCausalLM:
    """The untrained model: 7,950,400 parameters, every linear and embedding drawn from N(0, 0.02^2)."""
    torch.manual_seed(seed)
    AttentionInterface.register("blocked", blocked_attention)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=320,
        num_hidden_layers=6,
        num_attention_heads=10,
        num_key_value_heads=5,
        head_dim=32,
        intermediate_size=832,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=EOT_ID,
        eos_token_id=EOT_ID,
        pad_token_id=PAD_ID,
        attn_implementation="blocked",
    )
    return LlamaForCausalLM(config)


# ---------------------------------------------------------------------------------------- training


def rate(step: int, steps: int) -> float:
    """Learning rate: warm-up, stable, linear decay to zero over the last DECAY of the steps (WSD, arXiv:2404.06395)."""
    return RATE * min(1.0, (step + 1) / WARMUP, (steps - step) / (DECAY * steps))


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, windows: int) -> tuple[int, np.ndarray]:
    """(offset of the first window, order of the windows), new in each epoch."""
    rng = np.random.default_rng((seed, epoch))
    return int(rng.integers(CONTEXT)), rng.permutation(windows)


def batch(tokens: np.ndarray, step: int, seed: int) -> torch.Tensor:
    """The windows of one step, (BATCH, CONTEXT + 1); a function of seed and step alone, so that runs resume exactly."""
    per_epoch = (len(tokens) - 2 * CONTEXT) // CONTEXT
    rows = []
    for index in range(step * BATCH, (step + 1) * BATCH):
        epoch, place = divmod(index, per_epoch)
        offset, order = epoch_order(seed, epoch, per_epoch)
        start = offset + int(order[place]) * CONTEXT
        rows.append(tokens[start : start + CONTEXT + 1].astype(np.int64))
    return torch.from_numpy(np.stack(rows))


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms.

    Muon (kellerjordan.github.io/posts/muon) has its update scaled to AdamW's RMS (arXiv:2502.16982), so that one
    learning rate serves both.
    """
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [model.model.embed_tokens.weight, *(p for p in model.parameters() if p.ndim == 1)]
    return [
        torch.optim.Muon(hidden, lr=RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def resume(run: Path, steps: int, model, opts) -> tuple[list[int], float]:
    """Load checkpoint.pt, cut the log back to it; (steps at which the run was resumed, this one last; seconds spent)."""
    state = torch.load(run / "checkpoint.pt")
    done, planned = state["step"], state["steps"]
    if steps != planned and done > (1 - DECAY) * min(steps, planned):
        raise SystemExit(f"--steps {steps}: the checkpoint (step {done}) decays towards {planned}; pass --steps {planned}")
    model.load_state_dict(state["model"])
    for opt, saved in zip(opts, state["optimizers"], strict=True):
        opt.load_state_dict(saved)
    log = run / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:done]))
    return [*state["resumed_at"], done], state["seconds"]


def train(args) -> None:
    """Next-token prediction on packed windows -> checkpoint.pt, log.jsonl (loss in nats per token, wall seconds).

    Until the decay begins the run does not depend on --steps: --resume may name another number.
    """
    torch.set_num_threads(args.threads)
    tokens = np.memmap(args.run / "tokens.u16", dtype=np.uint16, mode="r")
    model = new_model(args.seed)
    opts = optimizers(model)
    resumed_at, seconds = resume(args.run, args.steps, model, opts) if args.resume else ([], 0.0)
    began = time.time() - seconds

    @functools.partial(torch.compile, dynamic=False)
    def loss_of(window):  # (MICRO, CONTEXT + 1) -> ()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(input_ids=window[:, :-1], use_cache=False).last_hidden_state  # (B, T, C)
            logits = model.lm_head(hidden)  # (B, T, V)
        return F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())

    def save(step):
        state = {"step": step, "steps": args.steps, "seed": args.seed, "seconds": time.time() - began}
        state["resumed_at"] = resumed_at
        state["machine"] = f"{processor()}, {args.threads} threads, torch {torch.__version__}"
        state |= {"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts]}
        torch.save(state, args.run / "checkpoint.tmp")
        (args.run / "checkpoint.tmp").rename(args.run / "checkpoint.pt")

    saved_at = time.time()
    with open(args.run / "log.jsonl", "a" if args.resume else "w") as log:
        for step in range(resumed_at[-1] if resumed_at else 0, args.steps):
            loss, lr = 0.0, rate(step, args.steps)
            for micro in batch(tokens, step, args.seed).split(MICRO):
                part = loss_of(micro) * (MICRO / BATCH)
                part.backward()
                loss += part.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt in opts:
                for group in opt.param_groups:
                    group["lr"] = lr
                opt.step()
                opt.zero_grad()
            line = {"step": step + 1, "loss": round(loss, 4), "tokens": (step + 1) * BATCH * CONTEXT}
            line |= {"seconds": round(time.time() - began, 1), "lr": round(lr, 7)}
            print(json.dumps(line), file=log, flush=True)
            if time.time() - saved_at > args.save_every:
                save(step + 1)
                saved_at = time.time()
    save(args.steps)


# ---------------------------------------------------------------------------------------- what is shipped


def replace_into(folder: Path, write) -> None:
    """Let `write(temporary folder)` make files, then rename each into `folder`: no reader sees half of one."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".sprout-") as tmp:
        write(Path(tmp))
        for path in sorted(Path(tmp).iterdir()):
            path.chmod(0o644)
            path.rename(folder / path.name)


def export(args) -> None:
    """The checkpoint's weights in bf16, with tokenizer and configs, as `from_pretrained` reads them."""
    state = torch.load(args.run / "checkpoint.pt")
    model = new_model(args.seed)
    model.load_state_dict(state["model"])
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=EOT_ID, eos_token_id=EOT_ID, pad_token_id=PAD_ID)

    def write(folder):
        model.save_pretrained(folder)
        shutil.copytree(args.run / "tokenizer", folder, dirs_exist_ok=True)
        assert (folder / "model.safetensors").stat().st_size <= 16_000_000

    replace_into(args.out, write)
    print(f"step {state['step']} of {state['steps']} -> {args.out}")


# ---------------------------------------------------------------------------------------- command line


def processor() -> str:
    """The processor's name, or the architecture where /proc/cpuinfo does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def write_json(path: Path, data) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def add_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", type=Path, default=ROOT.parent / "shared/data/corpus", help="folder of *.txt.gz")
    parser.add_argument("--run", type=Path, default=ROOT / ".sprout", help="token files, checkpoint and log")
    parser.add_argument("--out", type=Path, default=ROOT / "src/tunesmith/assets/sprout", help="what is shipped")
    parser.add_argument("--threads", type=int, default=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"tokenizer": make_tokenizer, "train": train, "export": export}
    parser.add_argument("command", choices=commands)
    add_folders(parser)
    parser.add_argument("--steps", type=int, default=2500, help="all steps, decay included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=180, help="seconds between checkpoints")
    parser.add_argument("--resume", action="store_true", help="resume from checkpoint.pt")
    args = parser.parse_args()
    commands[args.command](args)


if __name__ == "__main__":
    main()
