"""What an adapter's files hold, summarized without loading its base."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import PeftConfig, read_config
from ..errors import AdapterFileError, ConfigError
from ..storage.folder import CARD_FILE, CONFIG_FILE, ENCODER_FILE, OLD_WEIGHTS_FILE, WEIGHTS_FILE, AdapterFolder

LAYER = re.compile(r"\.(\d+)\.")


@dataclass
class AdapterSummary:
    """What an adapter's files hold.

    Args:
        files: `{name: (bytes, SHA-256)}` of the files that make an adapter.
        layers: `{layer: {module: norm}}`; -1 stands for modules outside layers. For LoRA it is the weight change's norm.
        faults: what makes it unusable or without effect.
    """

    name: str
    config: PeftConfig | None = None
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    tensors: int = 0
    parameters: int = 0
    types: Counter[str] = field(default_factory=Counter)
    ranks: Counter[int] = field(default_factory=Counter)
    modules: Counter[str] = field(default_factory=Counter)
    layers: dict[int, dict[str, float]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def summarize(name_or_path: str) -> AdapterSummary:
    """Summarize an adapter's folder, whichever tool wrote it.

    Raises:
        AdapterFileError: there is no such folder or repository.
    """
    folder = AdapterFolder.find(name_or_path)
    found = AdapterSummary(folder.name)
    for filename in (CONFIG_FILE, WEIGHTS_FILE, OLD_WEIGHTS_FILE, ENCODER_FILE, "tunesmith_template.json", CARD_FILE):
        path = folder.locate(filename)
        if path is not None:
            data = path.read_bytes()
            found.files[filename] = (len(data), hashlib.sha256(data).hexdigest())
    try:
        found.config = read_config(folder)
    except (AdapterFileError, ConfigError) as error:
        found.faults.append(str(error))
    try:
        tensors = folder.tensors()
    except AdapterFileError as error:
        found.faults.append(str(error))
        return found
    found.tensors, found.parameters = len(tensors), sum(tensor.numel() for tensor in tensors.values())
    found.types = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    found.faults += _faults(tensors)
    scales = _scale(found.config)
    for module, (norm, rank) in _norms(tensors, scales).items():
        layer = LAYER.search(module)
        leaf = module.rpartition(".")[2]
        found.layers.setdefault(int(layer.group(1)) if layer else -1, {})[leaf] = norm
        found.modules[leaf] += 1
        if rank:
            found.ranks[rank] += 1
    return found


def _faults(tensors: dict[str, Tensor]) -> list[str]:
    faults = [] if tensors else ["the file holds no tensors"]
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if broken:
        faults.append(f"{len(broken)} tensors hold values that are not finite (NaN or infinity): {', '.join(broken[:3])}")
    outward = [tensor for name, tensor in tensors.items() if ".lora_B." in name or "lora_embedding_B" in name]
    if outward and all(not tensor.any() for tensor in outward):
        faults.append("every lora_B is zero, so the adapter changes nothing: it is untrained, or was saved wrongly")
    return faults


def _scale(config: PeftConfig | None) -> float:
    """The factor on LoRA's product; patterns for single modules are ignored."""
    values: Any = dataclasses.asdict(config) if config is not None else {}
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)) or rank < 1:
        return 1.0
    return alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


def _norms(tensors: dict[str, Tensor], scale: float) -> dict[str, tuple[float, int]]:
    """`{module: (norm, rank)}`; the rank is 0 if there is none."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parts = name.removeprefix("base_model.model.").split(".")
        if parts[-1] in ("weight", "bias") and len(parts) > 1:
            *path, leaf, last = parts
            leaf = f"{leaf}.{last}"
        else:
            *path, leaf = parts
        modules.setdefault(".".join(path) or leaf, {})[leaf] = tensor
    return {module: _norm(leaves, scale) for module, leaves in modules.items()}


def _norm(leaves: dict[str, Tensor], scale: float) -> tuple[float, int]:
    down, up = leaves.get("lora_A.weight"), leaves.get("lora_B.weight")
    if down is not None and up is not None and down.dim() == 2 and up.dim() == 2:
        # |B A| without the product: trace((B^T B) (A A^T)), both of rank size.
        inner = (up.float().T @ up.float()) * (down.float() @ down.float().T).T
        return scale * math.sqrt(max(float(inner.sum()), 0.0)), down.shape[0]
    squares = sum(float(tensor.double().square().sum()) for tensor in leaves.values() if tensor.is_floating_point())
    return math.sqrt(squares), 0
