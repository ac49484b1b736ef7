"""Packed rows: several texts one after another in one row, none of which attends to another.

For each text s, with its own queries, keys and values:

    Y_s = softmax(Q_s K_s^T / sqrt(d) + causal mask) V_s

so there is no padding to compute and no mask over the whole row. Where K and V hold more tokens than the row has (a prefix
in the cache), the first ones are seen by every token of every text. A packed call runs in a frame that says where the texts
lie. In it the base's attentions, and the stack that would make masks for them, are called as shallow twins whose config
names the attention defined here; the config that other handles and threads read is not touched, and layers that are
recomputed in a backward pass find the frame again.
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
from .rows import tokens_of

# Architectures for which tests/runtime/test_packed_row.py proves that texts of a row do not see each other.
PROVED = frozenset({
    "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2",
    "gpt_bigcode", "gpt_neox", "granite", "helium", "llama", "mistral", "nemotron", "olmo", "olmo2", "opt", "phi", "phi3",
    "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2",
})  # fmt: skip


class OtherConfig(Replacement):
    """Calls a module as a twin whose config is another one."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, module: nn.Module) -> nn.Module:
        twin = module_view(module, {})
        twin.__dict__["config"] = self.config
        return twin


def packed(
    base: Any, frame: Frame, inputs: dict[str, Any], virtual: Tensor | None = None, even: int = 1
) -> tuple[Frame, dict[str, Any]]:
    """The frame of a packed call, and the keyword arguments of the base's forward.

    Args:
        inputs: of the call; not changed.
        virtual: what is put in front of each text, `(n, dim)`, or other tokens for each, `(texts, n, dim)`.
        even: of this the row's length is made a multiple, by one more text without labels.

    Raises:
        UsageError: the base or an adapter cannot keep texts of one row apart, or the boundaries do not fit the row.
    """
    reason = fault(base, frame)
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
        inputs, segments = _behind(virtual, inputs, segments, base.get_input_embeddings())
    if even > 1:
        inputs, segments = _evened(inputs, segments, even)
    modules: list[Any] = [module for _, module in architecture.attending(base)]
    configs = {id(module.config): module.config for module in modules}  # mostly one for all
    twins = {of: OtherConfig(architecture.with_attention(config, ATTENTION)) for of, config in configs.items()}
    frame = frame.packed(segments, {site.install(module): twins[id(module.config)] for module in modules})
    return frame, {**inputs, "use_cache": False}


def _behind(virtual: Tensor, inputs: dict[str, Any], segments: Segments, embed: nn.Module) -> tuple[dict[str, Any], Segments]:
    """Inputs with virtual tokens in front of each text, `[v v | x x x | v v | y y]`, and where the texts lie then."""
    inputs, texts, n = dict(inputs), len(segments.lengths), virtual.shape[-2]
    if virtual.dim() == 3 and len(virtual) != texts:
        raise UsageError(f"{len(virtual)} task_ids for {texts} texts; give one for each text")
    ids, embeds = inputs.pop("input_ids", None), inputs.get("inputs_embeds")
    embeds = embed(ids) if embeds is None else embeds
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


def _evened(inputs: dict[str, Any], segments: Segments, multiple: int) -> tuple[dict[str, Any], Segments]:
    """Inputs with a last text that nobody asks for, where the row's length is no multiple yet."""
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


def cut(inputs: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Where the texts lie in some columns of a row; nothing where the row is not packed."""
    if inputs.get(BOUNDARIES) is None:
        return {}
    stop = min(stop, int(inputs[BOUNDARIES][-1]))
    boundaries = inputs[BOUNDARIES].clamp(start, stop).unique() - start
    longest = int(boundaries.diff().max())
    return dict(zip(PACKED_KEYS, (boundaries, boundaries, longest, longest)))


def fault(base: Any, frame: Frame) -> str | None:
    """Why texts of one row cannot be kept apart on this base with the frame's adapters; None where they can."""
    config, name = architecture.config_of(base), type(base).__name__
    kind = architecture.model_type(config)
    if kind is None or kind not in PROVED:
        return f"no test proves that {name} keeps them apart"
    if not architecture.is_causal_lm(base, kind):
        return f"{name} is no causal language model"
    if architecture.attends_both_ways(config):
        return f"this {name} attends in both directions"
    if architecture.attends_elsewhere(config):
        return f"this {name} attends to another text, too"
    if architecture.turns_by_length(config):
        return f"this {name} turns the positions of all texts by the length of the longest one"
    attention_fault = architecture.attention_fault(base)
    if attention_fault:
        return attention_fault
    if frame.mixture is not None:
        return "adapter_names tells rows apart and not texts"
    for path, module in architecture.attending(base):
        if site.fault(module):
            return f"{path}: {site.fault(module)}"
    copied = [at.module() for at, adapters in frame.adapters.items() if any(isinstance(a, ModuleCopy) for a in adapters)]
    if any(architecture.attends(inner) for module in copied if module is not None for inner in module.modules()):
        return f"{', '.join(frame.names)} has a private copy of an attention (modules_to_save)"
    return None


def _check(tokens: Tensor, segments: Segments, inputs: dict[str, Any]) -> None:
    given = [name for name in ("attention_mask", *cache.NAMES) if inputs.get(name) is not None]
    if given:
        raise UsageError(f"a packed row has {BOUNDARIES} in place of {' and '.join(given)}; leave {given[0]} out")
    if inputs.get("output_attentions"):
        raise UsageError("attention weights over a packed row are never computed; leave output_attentions out")
    if tokens.shape[0] != 1:
        raise UsageError(f"texts are packed into one row, this batch has {tokens.shape[0]}; put them one after another")
    if tokens.device.type == "cpu" and (
        int(segments.boundaries[0]) != 0 or sum(segments.lengths) != tokens.shape[1] or min(segments.lengths) < 1
    ):
        found = segments.boundaries.tolist()
        raise UsageError(f"{BOUNDARIES} must rise from 0 to {tokens.shape[1]}, the row's number of tokens; found {found}")
