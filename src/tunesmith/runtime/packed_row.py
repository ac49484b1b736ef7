"""Packed rows: several texts concatenated into one row, each of which attends only to itself.

`packed_attention` defines the attention. A packed call runs in a frame that holds the boundaries of the texts. In this frame
the base's attentions, and the stack that would build their masks, are replaced by module views whose config selects that
attention. The config that other handles and threads read is unchanged, and layers that are recomputed in a backward pass run
in the same frame again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import ModuleCopy
from ..bases import architecture
from ..bases.view import module_view
from ..errors import UsageError
from ..labels import IGNORED
from . import cache, site
from .frame import BOUNDARIES, PACKED_KEYS, Frame, Replacement, Segments
from .packed_attention import ATTENTION
from .rows import embedded, tokens_of

# Architectures for which tests/runtime/test_packed_row.py proves that packed texts do not attend to each other.
PROVED = frozenset({
    "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2",
    "gpt_bigcode", "gpt_neox", "granite", "helium", "llama", "mistral", "nemotron", "olmo", "olmo2", "opt", "phi", "phi3",
    "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2",
})  # fmt: skip


class WithConfig(Replacement):
    """Replaces a module by a view of it that has another config."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, module: nn.Module) -> nn.Module:
        view = module_view(module, {})
        view.__dict__["config"] = self.config
        return view


def packed(
    base: Any, frame: Frame, inputs: dict[str, Any], virtual: Tensor | None = None, multiple_of: int = 1
) -> tuple[Frame, dict[str, Any]]:
    """The frame of a packed call, and the keyword arguments of the base's forward.

    Args:
        inputs: the call's keyword arguments; not changed.
        virtual: virtual tokens in front of each text, `(n, dim)`, or other ones for each text, `(texts, n, dim)`.
        multiple_of: the row is padded to a multiple of this length with one more text, which has no labels.

    Raises:
        UsageError: the base or an adapter cannot keep texts of one row apart, or the boundaries do not fit the row.
    """
    attentions: list[tuple[str, Any]] = architecture.attention_modules(base)
    reason = _fault(base, frame, attentions)
    if reason:
        raise UsageError(
            f"this row holds several texts ({BOUNDARIES} is given), but {reason}; pad the texts into rows of a batch"
        )
    segments = Segments.of(inputs)
    inputs = {name: value for name, value in inputs.items() if name not in PACKED_KEYS}
    tokens = tokens_of(inputs)
    _check(tokens, segments, inputs)
    if inputs.get("position_ids") is None:
        positions = torch.cat([torch.arange(length) for length in segments.lengths])
        inputs["position_ids"] = positions[None].to(tokens.device)  # (1, T)
    if virtual is not None:
        inputs, segments = _insert(virtual, inputs, segments, base.get_input_embeddings())
    if multiple_of > 1:
        inputs, segments = _pad(inputs, segments, multiple_of)
    modules = [module for _, module in attentions]
    configs = {id(module.config): module.config for module in modules}  # usually a single one
    views = {key: WithConfig(architecture.with_attention(config, ATTENTION)) for key, config in configs.items()}
    frame = frame.packed(segments, {site.install(module): views[id(module.config)] for module in modules})
    return frame, {**inputs, "use_cache": False}


def _insert(virtual: Tensor, inputs: dict[str, Any], segments: Segments, embed: nn.Module) -> tuple[dict[str, Any], Segments]:
    """Inputs with virtual tokens in front of each text, `[v v | x x x | v v | y y]`, and the new boundaries."""
    inputs, texts, n = dict(inputs), len(segments.lengths), virtual.shape[-2]
    if virtual.dim() == 3 and len(virtual) != texts:
        raise UsageError(f"{len(virtual)} task_ids for {texts} texts; give one for each text")
    embeds = embedded(inputs, embed)
    before: dict[str, Any] = {"inputs_embeds": virtual.to(embeds.dtype).expand(texts, -1, -1)}
    before["position_ids"] = torch.arange(n, device=embeds.device).expand(texts, -1)
    inputs |= {"inputs_embeds": embeds, "position_ids": inputs["position_ids"] + n}
    for name, fill in (("labels", IGNORED), ("token_type_ids", 0)):
        if inputs.get(name) is not None:
            before[name] = inputs[name].new_full((texts, n), fill)
    for name, firsts in before.items():
        own = inputs[name].split(segments.lengths, dim=1)
        inputs[name] = torch.cat([part for first, text in zip(firsts, own) for part in (first[None], text)], dim=1)
    moved = segments.boundaries + n * torch.arange(texts + 1, dtype=torch.int32, device=segments.boundaries.device)
    return inputs, Segments(moved, segments.longest + n)


def _pad(inputs: dict[str, Any], segments: Segments, multiple: int) -> tuple[dict[str, Any], Segments]:
    """Inputs padded with one last, unlabelled text unless the row's length is already a multiple."""
    length = inputs["position_ids"].shape[-1]
    rest = -length % multiple
    if not rest:
        return inputs, segments
    inputs = dict(inputs)
    for name, fill in (("input_ids", 0), ("labels", IGNORED), ("token_type_ids", 0), ("position_ids", 0)):
        if inputs.get(name) is not None:
            inputs[name] = F.pad(inputs[name], (0, rest), value=fill)
    if inputs.get("inputs_embeds") is not None:
        inputs["inputs_embeds"] = F.pad(inputs["inputs_embeds"], (0, 0, 0, rest))
    return inputs, Segments(F.pad(segments.boundaries, (0, 1), value=length + rest), max(segments.longest, rest))


def fault(base: Any, frame: Frame) -> str | None:
    """Why texts of one row cannot be kept apart on this base with the frame's adapters; None if they can."""
    return _fault(base, frame, architecture.attention_modules(base))


def _fault(base: Any, frame: Frame, attentions: list[tuple[str, Any]]) -> str | None:
    config, name = architecture.config_of(base), type(base).__name__
    kind = architecture.model_type(config)
    if kind is None or kind not in PROVED:
        return f"no test proves that {name} keeps them apart"
    if not architecture.is_causal_lm(base, kind):
        return f"{name} is not a causal language model"
    if architecture.is_bidirectional(config):
        return f"this {name} attends in both directions"
    if architecture.has_cross_attention(config):
        return f"this {name} also has cross-attention"
    if architecture.rope_depends_on_length(config):
        return f"this {name} scales the rotary positions of all texts by the length of the longest one"
    if reason := architecture.attention_fault(attentions):
        return reason
    if frame.mixture is not None:
        return "adapter_names selects adapters by row, not by text"
    for path, module in attentions:
        if site.fault(module):
            return f"{path}: {site.fault(module)}"
    copied = [at.module() for at, adapters in frame.adapters.items() if any(isinstance(a, ModuleCopy) for a in adapters)]
    if any(architecture.is_attention(inner) for module in copied if module is not None for inner in module.modules()):
        return f"{', '.join(frame.names)} has a private copy of an attention (modules_to_save)"
    return None


def _check(tokens: Tensor, segments: Segments, inputs: dict[str, Any]) -> None:
    given = [name for name in ("attention_mask", *cache.NAMES) if inputs.get(name) is not None]
    if given:
        raise UsageError(f"a packed row takes {BOUNDARIES} instead of {' and '.join(given)}; leave {given[0]} out")
    if inputs.get("output_attentions"):
        raise UsageError("attention weights are not available for packed rows; leave output_attentions out")
    if tokens.shape[0] != 1:
        raise UsageError(f"packed texts must be in a single row, but this batch has {tokens.shape[0]}; concatenate them")
    if tokens.device.type == "cpu" and (
        int(segments.boundaries[0]) != 0 or sum(segments.lengths) != tokens.shape[1] or min(segments.lengths) < 1
    ):
        found = segments.boundaries.tolist()
        raise UsageError(f"{BOUNDARIES} must increase from 0 to {tokens.shape[1]}, the row's number of tokens; found {found}")
