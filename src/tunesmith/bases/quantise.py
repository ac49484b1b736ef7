"""Converts a dense checkpoint to 4 bits, tensor by tensor: one tensor and one shard of the result are in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from ..errors import UsageError
from ..storage.folder import write_folder, write_text
from .architecture import is_stored_quantised
from .loading import stored_in
from .stored_base import weight_files

COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja",
)  # fmt: skip


@dataclass
class Conversion:
    """What is known of a conversion before a tensor is read.

    Args:
        locations: `{tensor: (file, bytes)}`, in the files' order.
        transposed: for each module to quantise whether its dense weight is stored `(in, out)`.
        settings: of the quantised form.
        weight_map: `{tensor: file}` of what has been written so far.
    """

    locations: dict[str, tuple[Path, int]]
    transposed: dict[str, bool]
    settings: BitsAndBytesConfig
    weight_map: dict[str, str] = field(default_factory=dict)


def quantise_folder(
    source: Path,
    target: Path,
    *,
    quant_type: str = "nf4",
    double_quant: bool = True,
    compute_dtype: str = "bfloat16",
    shard_bytes: int = 2 * 2**30,
) -> dict[str, int]:
    """Write `target`, which transformers loads as a 4-bit model; completely or not at all.

    The values are those that loading `source` with a `BitsAndBytesConfig` gives, bit for bit.

    Args:
        source: a folder with `config.json` and safetensors files of a causal language model.
        target: a folder that does not exist yet or is empty.
        double_quant: also quantise the scales, which saves 0.4 bits per weight.
        shard_bytes: maximum size of a file of the result (a single tensor may be larger).

    Returns:
        `{"modules": quantised, "before": bytes, "after": bytes}`.

    Raises:
        UsageError: something is missing or damaged, or `target` is not empty.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} is not empty; give a new folder, or empty this one")
    files = weight_files(source)
    if not files:
        raise UsageError(f"{source} holds no safetensors files; save the model with save_pretrained first")
    settings = stored_in(4, getattr(torch, compute_dtype), quant_type, double_quant)["quantization_config"]
    config, transposed = _quantised_modules(source, settings)
    config.quantization_config = settings
    conversion = Conversion(_locations(files), transposed, settings)
    _check_complete(conversion)
    writers = _weight_writers(conversion, shard_bytes)
    writers["config.json"] = partial(write_text, config.to_json_string())
    writers |= {name: partial(shutil.copyfile, source / name) for name in COPIED if (source / name).is_file()}
    try:
        write_folder(target, writers)
    except SafetensorError as error:
        raise UsageError(f"{source} is damaged ({error}); download it again") from error
    after = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    return {"modules": len(transposed), "before": sum(path.stat().st_size for path in files), "after": after}


def _check_complete(conversion: Conversion) -> None:
    """Reject files that lack a weight to quantise."""
    missing = [path for path in conversion.transposed if f"{path}.weight" not in conversion.locations]
    if missing:
        raise UsageError(
            f"the files do not hold {missing[0]}.weight ({len(missing)} of {len(conversion.transposed)} such weights are "
            "missing): their tensor names differ from the model's; load it with a BitsAndBytesConfig and call save_pretrained"
        )


def _weight_writers(conversion: Conversion, shard_bytes: int) -> dict[str, Callable[[Path], object]]:
    """`{file: function that writes it}` of the weights and their index."""
    shards = _shards(conversion, shard_bytes)
    if len(shards) == 1:
        return {"model.safetensors": partial(_write_shard, conversion, shards[0])}
    writers: dict[str, Callable[[Path], object]] = {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": partial(_write_shard, conversion, names)
        for number, names in enumerate(shards, 1)
    }
    writers["model.safetensors.index.json"] = partial(_write_index, conversion)
    return writers


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
            f"{source} is not a causal language model that transformers knows: {str(error).splitlines()[0]}"
        ) from error
    if is_stored_quantised(config):
        raise UsageError(f"{source} is already quantised")
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    dense = {
        path: isinstance(module, Conv1D) for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))
    }
    replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=settings)
    quantised = {path for path, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    return config, {path: transposed for path, transposed in dense.items() if path in quantised}


def _locations(files: list[Path]) -> dict[str, tuple[Path, int]]:
    """`{tensor: (file, bytes)}`, in the files' order."""
    found: dict[str, tuple[Path, int]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a mapping)
                    part = file.get_slice(name)
                    count = torch.Size(part.get_shape()).numel()
                    found[name] = (path, count * _width(part.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path} is missing, damaged or not a safetensors file ({error}); download it again") from error
    return found


def _width(dtype: str) -> int:
    """Bytes per element, from safetensors' name of the dtype ("BF16", "F8_E4M3", "BOOL")."""
    digits = "".join(c for c in dtype.partition("_")[0] if c.isdigit())
    return int(digits) // 8 if digits else 1


def _shards(conversion: Conversion, limit: int) -> list[list[str]]:
    """The tensors of each file to write: a quantised 16-bit one takes somewhat more than a quarter of its bytes."""
    shards: list[list[str]] = [[]]
    filled = 0.0
    for name, (_, size) in conversion.locations.items():
        after = 0.3 * size if name.removesuffix(".weight") in conversion.transposed else size
        if shards[-1] and filled + after > limit:
            shards.append([])
            filled = 0.0
        shards[-1].append(name)
        filled += after
    return shards


def _write_shard(conversion: Conversion, names: list[str], target: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for name in names:
        with safe_open(conversion.locations[name][0], framework="pt") as file:
            value = file.get_tensor(name)
        path = name.removesuffix(".weight")
        if name.endswith(".weight") and path in conversion.transposed:
            tensors.update(_quantised(name, value.T if conversion.transposed[path] else value, conversion.settings))
        else:
            tensors[name] = value
    save_file(tensors, target, metadata={"format": "pt"})
    conversion.weight_map.update(dict.fromkeys(tensors, target.name))


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


def _write_index(conversion: Conversion, path: Path) -> None:
    index = {"metadata": {}, "weight_map": conversion.weight_map}
    write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", path)
