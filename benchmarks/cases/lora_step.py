"""One training step of LoRA on every linear layer of a decoder: its time, and what it saves for the backward pass."""

from __future__ import annotations

import statistics
import time
from typing import Any

PAGE = "benchmarks/lora_step.md"
ROWS, LENGTH, RANK, LAYERS = 2, 512, 16, 4
STEPS = 7

VARIANTS: dict[str, dict[str, Any]] = {
    "the frozen base alone": {"library": None},
    "Tunesmith, plain operations": {"library": "tunesmith", "plain": True},
    "Tunesmith": {"library": "tunesmith"},
    "peft, its default (fp32 adapters)": {"library": "peft"},
    "peft, at its best (bf16 adapters)": {"library": "peft", "options": {"autocast_adapter_dtype": False}},
}


def run(library: str | None, plain: bool = False, options: dict[str, Any] | None = None) -> dict[str, Any]:
    import torch

    model, trained = make(library, plain, options or {})
    ids = torch.randint(0, 1024, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))

    def step() -> float:
        started = time.perf_counter()
        loss = model(input_ids=ids, use_cache=False).last_hidden_state.float().square().mean()
        loss.backward()
        for parameter in trained:
            parameter.grad = None
        return time.perf_counter() - started

    step(), step()
    seconds = statistics.median(step() for _ in range(STEPS))
    return {"seconds": seconds, "kept_mb": kept_bytes(model, ids) / 2**20, "trained": sum(p.numel() for p in trained)}


def make(library: str | None, plain: bool, options: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The model and its trained parameters; for the base alone the embeddings, whose gradient reaches through every layer."""
    import torch
    from transformers import Qwen2Config, Qwen2Model

    torch.manual_seed(0)
    config = Qwen2Config(  # Qwen2.5-0.5B's, but for layers and vocabulary
        vocab_size=1024, hidden_size=896, intermediate_size=4864, num_hidden_layers=LAYERS, num_attention_heads=14,
        num_key_value_heads=2,
    )  # fmt: skip
    model: Any = Qwen2Model(config).bfloat16().train()
    if library is None:
        model.requires_grad_(False)
        model.embed_tokens.weight.requires_grad_()
        return model, [model.embed_tokens.weight]
    fields = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
    if library == "peft":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(**fields), **options)
    else:
        import tunesmith
        from tunesmith.methods import lora

        model = tunesmith.get_peft_model(model, tunesmith.LoraConfig(**fields), **options)
        if plain:
            lora.applies = lambda *_: False  # type: ignore[assignment]
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


def kept_bytes(model: Any, ids: Any) -> int:
    """Memory that the forward pass keeps for the backward pass, parameters left out, each storage counted once."""
    import torch

    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # alive, so that no other tensor gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, use_cache=False).last_hidden_state.float().square().mean()
    return sum(storage.nbytes() for storage in kept.values())


def report(records: list[dict[str, Any]]) -> str:
    done = {record["variant"]: record for record in records if "error" not in record}
    base = done.get("the frozen base alone")
    lines = [
        "# A training step of LoRA",
        "",
        f"Forward and backward pass of {LAYERS} layers of Qwen2.5-0.5B's shape (random weights, bf16, no head), LoRA of rank "
        f"{RANK} on every linear layer, {ROWS} x {LENGTH} tokens. *Saved* is what the forward pass saves for the backward "
        "pass. The base alone computes only the gradient of its input, the least that any training has to do. Tunesmith's "
        "adapters are fp32, as peft's are by default; peft at its best keeps the trained values themselves in bf16.",
        "",
        "| | step | vs. base alone | saved | vs. base alone | peak memory |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for r in records:
        if "error" in r:
            lines.append(f"| {r['variant']} | failed: {r['error'][0]} | | | | |")
            continue
        over = kept = ""
        if base and r is not base:
            over, kept = f"{r['seconds'] / base['seconds'] - 1:+.0%}", f"{r['kept_mb'] - base['kept_mb']:+.0f} MB"
        cells = (r["variant"], f"{r['seconds']:.3f} s", over, f"{r['kept_mb']:.0f} MB", kept, f"{r['peak_mb']:.0f} MB")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
