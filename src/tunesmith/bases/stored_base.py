"""Checks of folders that hold a base in bitsandbytes' stored form, made before anything is loaded.

<module>.weight                               codes, two to a byte, `(bytes, 1)`; in 8 bits `(out, in)`
<module>.weight.absmax                        one scale per block; with nested scales, their codes
<module>.weight.quant_map                     the 16 levels
<module>.weight.nested_absmax, .nested_quant_map   scales and levels of nested scales
<module>.weight.quant_state.bitsandbytes__nf4 or __fp4   JSON as bytes: shape, block size, original dtype
<module>.SCB                                  in 8 bits: one scale per output
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UsageError, bullet_list

STATE = ".weight.quant_state.bitsandbytes__"
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOATS = ("float32", "float16", "bfloat16")


def check_stored(folder: Path) -> None:
    """Find every fault in a folder's quantised weights; does nothing for other folders.

    Raises:
        UsageError: naming each damaged tensor.
    """
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    except (OSError, ValueError, AttributeError):
        return  # transformers will explain
    if settings.get("quant_method") != "bitsandbytes":
        return
    faults = [fault for path in weight_files(folder) for fault in _file_faults(path)]
    if faults:
        raise UsageError(
            f'base model "{folder}" cannot be loaded because its files are damaged; download or quantise it again:\n'
            + bullet_list(faults)
        )


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder; with an index, all files that it names, whether or not they exist."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(
            f"{index} is damaged ({type(error).__name__}: {error}); download or quantise the base again"
        ) from error


def _file_faults(path: Path) -> Iterator[str]:
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name in sorted(names):
                if STATE in name:
                    module = name.partition(STATE)[0]
                    yield from (f"{path.name}: {module}: {fault}" for fault in _faults_of_4_bits(file, module, name, names))
                elif name.endswith(".SCB"):
                    module = name.removesuffix(".SCB")
                    yield from (f"{path.name}: {module}: {fault}" for fault in _faults_of_8_bits(file, module, names))
                elif name.endswith(".weight.absmax") and not any(
                    other.startswith(name[:-7] + ".quant_state") for other in names
                ):
                    yield f"{path.name}: {name.removesuffix('.weight.absmax')}: its quant_state is missing"
    except (SafetensorError, OSError) as error:
        yield f"{path.name}: {error}"


def _faults_of_4_bits(file: Any, module: str, name: str, names: set[str]) -> Iterator[str]:
    state, reason = _read_state(file.get_tensor(name))
    if reason:
        yield f"its quant_state {reason}"
        return
    if name.rpartition("__")[2] != state["quant_type"]:
        yield f"its quant_state says {state['quant_type']}, its name {name.rpartition('__')[2]}"
    count = math.prod(state["shape"])
    blocks = -(-count // state["blocksize"])
    nested = "nested_blocksize" in state
    expected: dict[str, tuple[int, str | None]] = {
        "weight": (-(-count // 2), None),
        "weight.absmax": (blocks, "uint8" if nested else "float32"),
        "weight.quant_map": (16, "float32"),
    }
    if nested:
        expected["weight.nested_absmax"] = (-(-blocks // state["nested_blocksize"]), "float32")
        expected["weight.nested_quant_map"] = (256, "float32")
    for leaf, (size, dtype) in expected.items():
        if f"{module}.{leaf}" not in names:
            yield f"{leaf} is missing"
            continue
        value = file.get_tensor(f"{module}.{leaf}")
        found = value.nbytes if leaf == "weight" else value.numel()
        if found != size:
            yield f"{leaf} has {found:,} {'bytes' if leaf == 'weight' else 'values'}, {size:,} expected for {state['shape']}"
        elif dtype and value.dtype != getattr(torch, dtype):
            yield f"{leaf} is stored as {value.dtype}, torch.{dtype} expected"
        elif value.is_floating_point() and leaf != "weight" and not torch.isfinite(value).all():
            yield f"{leaf} holds values that are not finite"


def _read_state(packed: Tensor) -> tuple[dict[str, Any], str]:
    """The fields of a packed `quant_state`, and what is wrong with them."""
    try:
        state = json.loads(bytes(packed.tolist()).decode("utf-8"))
        faults = [
            key
            for key, fine in {
                "quant_type": state.get("quant_type") in ("nf4", "fp4"),
                "blocksize": state.get("blocksize") in BLOCK_SIZES,
                "dtype": state.get("dtype") in FLOATS,
                "shape": _is_shape(state.get("shape")),
                "nested_blocksize": state.get("nested_blocksize", 256) == 256,
                "nested_offset": math.isfinite(state.get("nested_offset", 0.0)),
            }.items()
            if not fine
        ]
    except (ValueError, TypeError, AttributeError) as error:
        return {}, f"cannot be read ({type(error).__name__})"
    return state, f"has no usable {', '.join(faults)}" if faults else ""


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(size, int) and size > 0 for size in value)


def _faults_of_8_bits(file: Any, module: str, names: set[str]) -> Iterator[str]:
    if f"{module}.weight" not in names:
        yield "weight is missing"
        return
    scales, shape = file.get_tensor(f"{module}.SCB"), file.get_slice(f"{module}.weight").get_shape()
    dtype = file.get_slice(f"{module}.weight").get_dtype()
    if dtype != "I8" or len(shape) != 2:
        yield f"weight is {dtype} of shape {shape}, a matrix of I8 expected"
    elif list(scales.shape) != shape[:1]:
        yield f"SCB has shape {list(scales.shape)}, {shape[:1]} expected"
    if not torch.isfinite(scales.float()).all():
        yield "SCB holds values that are not finite"
