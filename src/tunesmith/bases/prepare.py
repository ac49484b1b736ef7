"""Make a quantised base ready to train adapters on, under the name that the ecosystem has for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from . import architecture

WIDENED = "_widened_for_training"  # attribute of a model: `{parameter: type before}`


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
    *,
    widen: bool = True,
) -> Any:
    """Freeze a base, give what of it is not quantised fp32 and switch gradient checkpointing on; returns the same model.

    Adapters train without it: handles freeze their base anyway. It is there for scripts that call it, and does what they
    expect. Merging gives widened parameters their first type back.

    Args:
        model: a base, before `get_peft_model`.
        use_gradient_checkpointing: of a quantised base; costs a second forward pass and saves most of the activations.
        gradient_checkpointing_kwargs: such as `{"use_reentrant": False}`.
        auto_clear_cache: give memory that widening freed back to the accelerator.
        widen: make 16-bit parameters fp32; False leaves them, which takes half their memory and is faster on a CPU.

    Raises:
        UsageError: the model is a handle.
    """
    is_base = isinstance(model, nn.Module) and not hasattr(model, "peft_config")
    if not is_base:
        raise UsageError(
            f"prepare_model_for_kbit_training takes the base, got {type(model).__name__}; call it before get_peft_model"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if widen:
        before = model.__dict__.setdefault(WIDENED, {})
        for name, parameter in model.named_parameters():
            stored = getattr(parameter, "quant_state", None) is not None
            if parameter.dtype in (torch.float16, torch.bfloat16) and not stored:
                before[name] = parameter.dtype
                parameter.data = parameter.data.float()
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
    if architecture.is_quantised(model) and use_gradient_checkpointing:
        kwargs = gradient_checkpointing_kwargs or {}
        if kwargs.get("use_reentrant", True):  # which needs an input with a gradient, and the base has none that trains
            model.enable_input_require_grads()
        architecture.enable_recomputing(model, kwargs)
    return model


def narrowed(model: nn.Module) -> None:
    """Give parameters their type back that they had before they were widened."""
    before: dict[str, torch.dtype] = model.__dict__.pop(WIDENED, {})
    parameters = dict(model.named_parameters())
    for name, dtype in before.items():
        if name in parameters:
            parameters[name].data = parameters[name].data.to(dtype)
