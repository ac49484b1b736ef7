"""Optimisers that treat LoRA's two factors differently.

LoRA+: B learns faster than A. Hayou, Ghosh, Yu 2024, https://arxiv.org/abs/2402.12354.

LoRA-FA: A is frozen, and B's gradient is corrected so that `s dB A` is as close as possible to the full gradient's step:
`dB = g (A A^T)^-1 / s^2`. Zhang et al. 2023, https://arxiv.org/abs/2308.03303.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
from transformers.trainer_pt_utils import get_parameter_names

from ..errors import ConfigError, UsageError
from ..methods.lora import Lora
from ..model import PeftModel

RIDGE = 1e-8  # added to A A^T, so that it can be inverted


def create_loraplus_optimizer(
    model: PeftModel,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> Optimizer:
    """An optimiser under which B, and every vector, learns `loraplus_lr_ratio` times as fast as the rest.

    Args:
        lr: learning rate of A and of whatever else trains.
        loraplus_lr_ratio: at least 1; larger for tasks that are far from what the base knows.
        loraplus_weight_decay: of everything but biases and norms.
        loraplus_lr_embedding: learning rate of both factors of embeddings.
        kwargs: further arguments of `optimizer_cls`.

    Raises:
        ConfigError: a learning rate or the ratio is out of range.
    """
    _check_handle(model)
    faults = [
        f"{name}={value!r} must be a finite number of at least {least}"
        for name, value, least in (("lr", lr, 0), ("loraplus_lr_ratio", loraplus_lr_ratio, 1))
        if not (math.isfinite(value) and value >= least)
    ]
    if faults:
        raise ConfigError("; ".join(faults))
    slow, embedding, fast, fast_plain = _by_speed(model)
    groups = [
        {"params": slow, "lr": lr, "weight_decay": loraplus_weight_decay},
        {"params": embedding, "lr": loraplus_lr_embedding, "weight_decay": loraplus_weight_decay},
        {"params": fast, "lr": lr * loraplus_lr_ratio, "weight_decay": loraplus_weight_decay},
        {"params": fast_plain, "lr": lr * loraplus_lr_ratio, "weight_decay": 0.0},
    ]
    return optimizer_cls(groups, lr=lr, **kwargs)  # type: ignore[call-arg]


def _by_speed(model: PeftModel) -> tuple[list[nn.Parameter], ...]:
    """Trained parameters as `(slow, of embeddings, fast, fast and without weight decay)`."""
    of_embeddings = {factor for module, adapter in _loras(model) if isinstance(module, nn.Embedding)
                     for factor in (adapter.lora_A, adapter.lora_B)}  # fmt: skip
    names: Any = get_parameter_names
    decaying = {name for name in names(model, ALL_LAYERNORM_LAYERS) if "bias" not in name}
    slow: list[nn.Parameter] = []
    embedding: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    fast_plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter in of_embeddings:
            embedding.append(parameter)
        elif "lora_B" not in name and parameter.dim() > 1:
            slow.append(parameter)
        else:
            (fast if name in decaying else fast_plain).append(parameter)
    return slow, embedding, fast, fast_plain


class LoraFAOptimizer(AdamW):
    """AdamW that corrects the gradients of B while it steps.

    Args:
        pairs: `(A, B, scale)` of each adapted module.
    """

    def __init__(self, params: Any, pairs: Sequence[tuple[Tensor, Tensor, float]], **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self.pairs = pairs

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plain = [b.grad for _, b, _ in self.pairs]
        for a, b, scale in self.pairs:
            if b.grad is not None:
                flat = a.flatten(1).float()
                gram = flat @ flat.T + RIDGE * torch.eye(len(a), device=a.device)  # (r, r)
                corrected = torch.linalg.solve(gram, b.grad.flatten(1).float(), left=False) / scale**2  # (out, r)
                b.grad = corrected.to(b.dtype).view_as(b)
        super().step()
        for (_, b, _), gradient in zip(self.pairs, plain):
            b.grad = gradient
        return loss


def create_lorafa_optimizer(
    model: PeftModel, r: int, lora_alpha: int | float, lr: float, weight_decay: float = 0.0
) -> LoraFAOptimizer:
    """Freeze A of the active adapters and make the optimiser for what is left to train.

    Both factors of embeddings, whose A starts at zero, train as under AdamW. `set_adapter` makes A trainable again.

    Args:
        r, lora_alpha: those of the adapters' configuration; modules keep the scale that patterns give them.

    Raises:
        ConfigError: the adapters have another `r` or `lora_alpha`.
        UsageError: no active adapter is LoRA on modules.
    """
    _check_handle(model)
    _check_lorafa(model, r, lora_alpha)
    pairs = []
    for module, adapter in _loras(model):
        if not isinstance(module, nn.Embedding):
            adapter.lora_A.requires_grad_(False)
            pairs.append((adapter.lora_A, adapter.lora_B, adapter.scale))
    if not pairs:
        raise UsageError("no active adapter is LoRA, so there is no A to freeze")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return LoraFAOptimizer(trained, pairs, lr=lr, eps=1e-6, weight_decay=weight_decay)


def _check_lorafa(model: PeftModel, r: int, lora_alpha: int | float) -> None:
    for name in model.active_adapters:
        config = model.peft_config[name]
        for field, value in (("r", r), ("lora_alpha", lora_alpha)):
            if getattr(config, field, value) != value:
                raise ConfigError(f'{field}={value!r}, but the adapter "{name}" has {field}={getattr(config, field)!r}')
        if getattr(config, "target_parameters", None):
            raise UsageError(f'the adapter "{name}" changes parameters (target_parameters); LoRA-FA is for modules')
        if any(getattr(module, "groups", 1) > 1 for module, _ in _loras(model)):
            raise UsageError("LoRA-FA has no correction for grouped convolutions; leave them out of target_modules")


def _loras(model: PeftModel) -> Iterator[tuple[nn.Module, Lora]]:
    """`(base module, adapter)` of the active adapters."""
    for name in model.active_adapters:
        for path, adapter in model.tree(name).items():
            if isinstance(adapter, Lora):
                yield model.bare_base.get_submodule(path), adapter


def _check_handle(model: Any) -> None:
    if not isinstance(model, PeftModel):
        raise UsageError(f"expected a handle (get_peft_model), got {type(model).__name__}")
