"""Prepares a quantised base for training adapters, under the ecosystem's name for this step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from . import architecture

WIDENED = "_widened_for_training"  # attribute of a model: `{parameter: original dtype}`


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
    *,
    widen: bool = True,
) -> Any:
    """Freeze a base, convert its unquantised parameters to fp32 and enable gradient checkpointing; returns the same model.

    Adapters train without this call, because handles freeze their base anyway; it exists for scripts that make it. Merging
    restores the original dtypes.

    Args:
        model: a base, before `get_peft_model`.
        use_gradient_checkpointing: for a quantised base; costs a second forward pass and saves most activation memory.
        gradient_checkpointing_kwargs: such as `{"use_reentrant": False}`.
        auto_clear_cache: return the memory freed by the conversion to the accelerator.
        widen: convert 16-bit parameters to fp32; False keeps them, which takes half the memory and is faster on a CPU.

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
            quantised = getattr(parameter, "quant_state", None) is not None
            if parameter.dtype in (torch.float16, torch.bfloat16) and not quantised:
                before[name] = parameter.dtype
                parameter.data = parameter.data.float()
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
    if architecture.is_quantised(model) and use_gradient_checkpointing:
        kwargs = gradient_checkpointing_kwargs or {}
        if kwargs.get("use_reentrant", True):  # this needs an input that requires a gradient, and nothing in the base does
            model.enable_input_require_grads()
        architecture.enable_recomputing(model, kwargs)
    return model


def require_input_gradients(model: Any) -> None:
    """Let what a model's embeddings give require gradients, which reentrant checkpointing needs; a hook on the model does so.

    A quantised model is left alone: `prepare_model_for_kbit_training` has done it.
    """
    if architecture.is_quantised(model):
        return
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    elif hasattr(model, "get_input_embeddings"):
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))


def restore_dtypes(model: nn.Module) -> None:
    """Convert parameters back to the dtypes they had before `prepare_model_for_kbit_training`."""
    before: dict[str, torch.dtype] = model.__dict__.pop(WIDENED, {})
    parameters = dict(model.named_parameters())
    for name, dtype in before.items():
        if name in parameters:
            parameters[name].data = parameters[name].data.to(dtype)
