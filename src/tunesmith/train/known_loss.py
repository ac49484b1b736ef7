"""Where a model's loss is known to be the cross-entropy of a plain output head, so that no logits are needed for it.

    loss = sum over labels of cross_entropy(W h + b, label) / items

Models scale or cap their logits and add to their losses in ways that equal numbers on one batch cannot rule out (the routers'
loss of a mixture of experts has a coefficient of 0.001). So it is a list, and whatever is not known to be as
`tests/train/test_known_loss.py` proves it, by value, by gradient and by reading the forwards, is left to the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .. import tested
from ..bases import architecture
from ..model import PeftModel
from ..runtime import site
from ..runtime.frame import PACKED_KEYS, Frame

CAUSAL = frozenset({
    "ApertusForCausalLM", "ArceeForCausalLM", "BloomForCausalLM", "CodeGenForCausalLM", "CwmForCausalLM",
    "DeepseekV3ForCausalLM", "Ernie4_5ForCausalLM", "Ernie4_5_MoeForCausalLM", "Exaone4ForCausalLM", "FalconForCausalLM",
    "GPT2LMHeadModel", "GPTBigCodeForCausalLM", "GPTJForCausalLM", "GPTNeoForCausalLM", "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GemmaForCausalLM", "Glm4ForCausalLM", "Glm4MoeForCausalLM",
    "GlmForCausalLM", "GptOssForCausalLM", "HeliumForCausalLM", "HunYuanDenseV1ForCausalLM", "Lfm2ForCausalLM",
    "LlamaForCausalLM", "Ministral3ForCausalLM", "MinistralForCausalLM", "MistralForCausalLM", "MixtralForCausalLM",
    "MptForCausalLM", "NemotronForCausalLM", "OPTForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM",
    "OlmoForCausalLM", "OlmoeForCausalLM", "PersimmonForCausalLM", "Phi3ForCausalLM", "PhiForCausalLM",
    "PhimoeForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM",
    "SeedOssForCausalLM", "SmolLM3ForCausalLM", "StableLmForCausalLM", "Starcoder2ForCausalLM",
})  # fmt: skip
ENCODER_DECODER = frozenset({
    "MT5ForConditionalGeneration", "T5ForConditionalGeneration", "UMT5ForConditionalGeneration",
})  # fmt: skip
PROVED = CAUSAL | ENCODER_DECODER

# Of a batch; whatever else there is may select other logits, labels or losses.
INPUTS = frozenset({
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "labels",
    "decoder_input_ids", "decoder_attention_mask", "use_cache", *PACKED_KEYS,
})  # fmt: skip

_DTYPES = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
_WRAPPERS = {"tunesmith", "accelerate", "torch"}  # packages that may wrap a handle's forward (mixed precision)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_hf_hook")


def fault(handle: PeftModel, base: Any, frame: Frame, inputs: dict[str, Any]) -> str | None:
    """Why the model must compute the loss of this batch itself; None if the loss is known.

    Args:
        base: the handle's.
        frame: the one that the batch runs in.
        inputs: of the handle's forward.
    """
    return _of_class(base) or _of_state(base) or _of_call(handle, base, frame) or _of_inputs(frame, inputs)


def _of_class(base: Any) -> str | None:
    kind = type(base)
    if kind.__name__ not in PROVED or not kind.__module__.startswith("transformers.models."):
        return f"no test proves what the loss of {kind.__name__} is"
    if set(_packages(kind.forward)) != {"transformers"}:
        return f"the forward of {kind.__name__} was replaced"
    return tested.installed_fault()


def _of_state(base: Any) -> str | None:
    config, head = base.config, architecture.output_head(base)
    if not architecture.has_plain_loss(base):
        return "its loss_function is another"
    if architecture.caps_logits(config):
        return "it caps its logits"
    if architecture.adds_router_loss(config):
        return "its routers add to its loss"
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter or head.weight.dtype not in _DTYPES:
        return "its output head is not a plain matrix"
    if head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad):
        return "its output head is trained"
    if len(head.weight) != architecture.vocabulary(config):
        return "its output head has another size than its configuration says"
    return None


def _of_call(handle: PeftModel, base: Any, frame: Frame) -> str | None:
    head = architecture.output_head(base)
    if handle.task_class.__module__ != PeftModel.__module__ or not set(_packages(handle.forward)) <= _WRAPPERS:
        return "the handle's forward was replaced"
    if site.fault(base) or site.fault(head):
        return "its forward, or that of its output head, was replaced"
    if any(frame.adapters.get(at) for module in (base, head) if (at := site.site_of(module)) is not None):
        return "an adapter acts on its output head"
    if any(getattr(module, hooks, None) for module in (handle, base, head) for hooks in _HOOKS) or any(
        getattr(nn.modules.module, f"_global{hooks}", None) for hooks in _HOOKS
    ):
        return "hooks are called with its outputs, or those of its output head"
    return None


def _of_inputs(frame: Frame, inputs: dict[str, Any]) -> str | None:
    unknown = inputs.keys() - INPUTS - ({"task_ids"} if frame.prompts else set())
    if unknown:
        return f"it is given {', '.join(sorted(unknown))}"
    if inputs.get("labels") is None or inputs["labels"].dim() != 2:
        return "it is given no labels of tokens"
    return None


def _packages(function: Any) -> Iterator[str]:
    """The packages that a function's code, and the code of what it wraps, comes from.

    Decorators copy names (`functools.wraps`), so the code's globals are asked.
    """
    while function is not None:
        function = getattr(function, "__func__", function)
        module = getattr(function, "__globals__", {}).get("__name__") or type(function).__module__
        yield module.partition(".")[0]
        function = getattr(function, "__wrapped__", None)
