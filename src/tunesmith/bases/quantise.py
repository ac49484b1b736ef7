"""A dense checkpoint into a 4-bit one, tensor by tensor: what is in memory is one tensor and one shard of what is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from ..bases.architecture import is_stored_quantised
from ..errors import UsageError
from ..storage.folder import write_folder
from .stored_base import weight_files

COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja",
)  # fmt: skip


def quantise_folder(
    source: Path,
    target: Path,
    *,
    quant_type: str = "nf4",
    double_quant: bool = True,
    compute_dtype: str = "bfloat16",
    shard_bytes: int = 2 * 2**30,
) -> dict[str, int]:
    """Write `target`, which transformers loads as a 4-bit model; whole or not at all.

    The numbers are those that loading `source` with a `BitsAndBytesConfig` gives, bit for bit.

    Args:
        source: a folder with `config.json` and safetensors files of a causal language model.
        target: a folder that is not there yet, or is empty.
        double_quant: quantise the scales, too, which saves 0.4 bits per weight.
        shard_bytes: how large a file of the result becomes at most (a single tensor may be larger).

    Returns:
        `{"modules": quantised, "before": bytes, "after": bytes}`.

    Raises:
        UsageError: something is missing or damaged, or `target` holds files.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} is not empty; give a new folder, or empty this one")
    files = weight_files(source)
    if not files:
        raise UsageError(f"{source} holds no safetensors files; save the model with save_pretrained first")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )  # fmt: skip
    config, turned = _quantised_modules(source, settings)
    config.quantization_config = settings
    where = _placed(files)
    missing = [path for path in turned if f"{path}.weight" not in where]
    if missing:
        raise UsageError(
            f"the files do not hold {missing[0]}.weight ({len(missing)} of {len(turned)} such weights are missing): they name "
            "their tensors otherwise than the model does; load it with a BitsAndBytesConfig and call save_pretrained"
        )
    shards = _shards(where, turned, shard_bytes)
    placed: dict[str, str] = {}
    writers: dict[str, Callable[[Path], object]] = {}
    for number, names in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        writers[name] = partial(_write_shard, names, where, turned, settings, placed)
    if len(shards) > 1:
        writers["model.safetensors.index.json"] = partial(_write_index, placed)
    writers["config.json"] = lambda path: path.write_text(config.to_json_string(), encoding="utf-8")
    for name in COPIED:
        if (source / name).is_file():
            writers[name] = partial(_copy, source / name)
    try:
        write_folder(target, writers)
    except SafetensorError as error:
        raise UsageError(f"{source} is damaged ({error}); download it again") from error
    after = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    return {"modules": len(turned), "before": sum(path.stat().st_size for path in files), "after": after}


def _quantised_modules(source: Path, settings: BitsAndBytesConfig) -> tuple[Any, dict[str, bool]]:
    """The model's configuration, and `{path: stored (in, out)}` of the modules that transformers would quantise."""
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    try:
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{source} is no causal language model that transformers knows: {str(error).splitlines()[0]}"
        ) from error
    if is_stored_quantised(config):
        raise UsageError(f"{source} is quantised already")
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    dense = {
        path: isinstance(module, Conv1D) for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))
    }
    replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=settings)
    quantised = {path for path, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    return config, {path: turned for path, turned in dense.items() if path in quantised}


def _placed(files: list[Path]) -> dict[str, tuple[Path, int]]:
    """`{tensor: (file, bytes)}`, in the files' order."""
    found: dict[str, tuple[Path, int]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (no mapping)
                    part = file.get_slice(name)
                    count = torch.Size(part.get_shape()).numel()
                    found[name] = (path, count * _width(part.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path} is missing, damaged or no safetensors file ({error}); download it again") from error
    return found


def _width(dtype: str) -> int:
    """Bytes of a number, from safetensors' name for its type ("BF16", "F8_E4M3", "BOOL")."""
    digits = "".join(c for c in dtype.partition("_")[0] if c.isdigit())
    return int(digits) // 8 if digits else 1


def _shards(where: dict[str, tuple[Path, int]], turned: dict[str, bool], limit: int) -> list[list[str]]:
    """The tensors of each file to write: a quantised 16-bit one takes somewhat more than a quarter of its bytes."""
    shards: list[list[str]] = [[]]
    filled = 0.0
    for name, (_, size) in where.items():
        after = 0.3 * size if name.removesuffix(".weight") in turned else size
        if shards[-1] and filled + after > limit:
            shards.append([])
            filled = 0.0
        shards[-1].append(name)
        filled += after
    return shards


def _write_shard(
    names: list[str],
    where: dict[str, tuple[Path, int]],
    turned: dict[str, bool],
    settings: BitsAndBytesConfig,
    placed: dict[str, str],
    target: Path,
) -> None:
    tensors: dict[str, Tensor] = {}
    for name in names:
        with safe_open(where[name][0], framework="pt") as file:
            value = file.get_tensor(name)
        path = name.removesuffix(".weight")
        if name.endswith(".weight") and path in turned:
            tensors.update(_quantised(name, value.T if turned[path] else value, settings))
        else:
            tensors[name] = value
    save_file(tensors, target, metadata={"format": "pt"})
    placed.update(dict.fromkeys(tensors, target.name))


def _quantised(name: str, value: Tensor, settings: BitsAndBytesConfig) -> Iterator[tuple[str, Tensor]]:
    """A weight `(out, in)` in its stored form."""
    from bitsandbytes.functional import quantize_4bit

    data, state = quantize_4bit(
        value.contiguous(),
        blocksize=64,
        compress_statistics=settings.bnb_4bit_use_double_quant,
        quant_type=settings.bnb_4bit_quant_type,
    )
    yield name, data
    for key, part in state.as_dict(packed=True).items():
        yield f"{name}.{key}", part.contiguous()


def _write_index(placed: dict[str, str], path: Path) -> None:
    path.write_text(json.dumps({"metadata": {}, "weight_map": placed}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy(source: Path, path: Path) -> None:
    path.write_bytes(source.read_bytes())
