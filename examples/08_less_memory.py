"""Where a training step's memory goes, and how to reduce it, for example to fit T0_3B on a small GPU.

Counts the bytes of everything that a step holds: base, adapter, gradients, optimiser, and tensors saved for the backward pass.
Small by default: a tiny random T5. The one argument that makes it full-size is `--base bigscience/T0_3B`.
"""

import argparse

import torch
from transformers import AutoModelForSeq2SeqLM, T5Config

from tunesmith import LoraConfig, TaskType, get_peft_model

parser = argparse.ArgumentParser()
parser.add_argument("--base", help="a folder or a model id on the Hub; default: a tiny random T5")
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--length", type=int, default=128)
settings = parser.parse_args()


def base_of(dtype):
    if settings.base:
        return AutoModelForSeq2SeqLM.from_pretrained(settings.base, dtype=dtype)
    torch.manual_seed(0)
    sizes = {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 4, "num_heads": 4, "vocab_size": 1000}
    return AutoModelForSeq2SeqLM.from_config(T5Config(**sizes, decoder_start_token_id=0)).to(dtype)


def storage_bytes(tensors):
    """Bytes of all storages, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}.values())


def step(model, batch):
    """One training step; `(bytes saved for the backward pass, bytes of optimiser state)`."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = []

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.append(tensor)
        return tensor

    rows = torch.randint(2, 1000, (batch, settings.length), generator=torch.Generator().manual_seed(1))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=rows, labels=rows[:, :16].contiguous()).loss
    needed = storage_bytes(kept)
    kept.clear()
    loss.backward()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return needed, storage_bytes(states)


print(f"{'':44}{'base':>9}{'adapter':>9}{'backward':>10}{'total':>9}   MB")
for name, dtype, method, checkpointing, batch in [
    ("full fine-tuning, fp32", torch.float32, None, False, settings.batch),
    ("LoRA, fp32", torch.float32, "LoRA", False, settings.batch),
    ("LoRA, base in bfloat16", torch.bfloat16, "LoRA", False, settings.batch),
    ("  + gradient checkpointing", torch.bfloat16, "LoRA", True, settings.batch),
    ("  + gradient accumulation, quarter batch", torch.bfloat16, "LoRA", True, settings.batch // 4),
]:
    model = base_of(dtype)
    if method:
        config = LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, r=8, lora_alpha=32, lora_dropout=0.1)
        model = get_peft_model(model, config)
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    needed, states = step(model, batch)
    trained = storage_bytes([parameter for parameter in model.parameters() if parameter.requires_grad])
    frozen = storage_bytes([parameter for parameter in model.parameters() if not parameter.requires_grad])
    parts = [frozen, 2 * trained + states, needed]  # trainable parameters, their gradients, optimiser state
    print(f"{name:44}" + "".join(f"{part / 1e6:9.2f}" for part in parts) + f"{sum(parts) / 1e6:10.2f}")
