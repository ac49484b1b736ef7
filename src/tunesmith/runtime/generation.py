"""Virtual tokens in `generate`.

`generate` compares lengths of text, mask and cache, and slices one by another. So it gets the text as it is, and virtual
tokens enter where it calls the base (`Entrance`), as they do in a loop written by hand. Two things it derives from the cache,
which holds virtual tokens, too: masks, where the cache is laid out in advance, and which tokens of a text are in the cache
already. There all lengths count virtual tokens, which are embedded in front of the text. Encoders read their input once, so
for them it is the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from ..bases import architecture
from ..bases.view import class_forward
from ..errors import UsageError
from . import cache, site
from .call_inputs import prepare
from .frame import Around, Frame, Mixture, current_frame
from .prefix import with_columns
from .rows import tokens_of
from .virtual_tokens import InputSpec, check_tasks

PER_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
IMAGES = ("image_grid_thw", "video_grid_thw")
DRAFTS = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens")
# What reads the ids of the input again, and what compares the text with the cache or calls the base by itself.
OF_IDS = (
    "guidance_scale",
    "assistant_model",
    "assistant_early_exit",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
)
OF_TEXT = ("custom_generate", "prefill_chunk_size", "prompt_lookup_num_tokens", *OF_IDS)
UNPROVED = ("penalty_alpha", "dola_layers", "num_beam_groups", "constraints", "force_words_ids", "use_mtp", "speculation_type")
NEUTRAL = {"guidance_scale": 1, "num_beam_groups": 1, "encoder_repetition_penalty": 1}  # 0 and None for all


class Entrance(Around):
    """Wraps the base's forward: each call that `generate` makes gets virtual tokens."""

    def __init__(self, base: Any, spec: InputSpec, task_ids: Tensor | None) -> None:
        self.base = base
        self.spec = spec
        self.task_ids = task_ids
        self.names = tuple(inspect.signature(class_forward(base)).parameters)

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inputs = {**dict(zip(self.names, args)), **kwargs}
        frame, task_ids = current_frame(), self.task_ids
        assert frame is not None
        if task_ids is not None:  # beams follow each other row by row
            task_ids = task_ids.repeat_interleave(tokens_of(inputs).shape[0] // len(task_ids))
        return call(**prepare(self.base, self.spec, frame, inputs, task_ids))

    def by_rows(self, parts: list[Any], mixture: Mixture, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self(call, *args, **kwargs)


def for_generate(
    base: Any, spec: InputSpec, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any], task_ids: Tensor | None = None
) -> tuple[Frame, tuple[Any, ...], dict[str, Any]]:
    """The frame and the arguments of the base's `generate`, for a frame with virtual tokens.

    Raises:
        UsageError: virtual tokens cannot be exact in this mode of generation.
    """
    kwargs = dict(kwargs)
    if args:
        kwargs["input_ids"], *rest = args
        args = (None, *rest)
    if kwargs.get("inputs") is not None:
        kwargs["input_ids"] = kwargs.pop("inputs")
    if task_ids is not None and (kwargs.get("input_ids") is not None or kwargs.get("inputs_embeds") is not None):
        check_tasks(len(task_ids), tokens_of(kwargs).shape[0])
    prefixed = {prompt.in_cache for prompt, _ in frame.prompts} == {True}
    repeats, laid_out = _repeats_cached(spec, kwargs), _is_laid_out(base, kwargs)
    faults = _faults(base, spec, frame, kwargs, repeats or laid_out)
    if faults:
        raise UsageError("generate with virtual tokens is not exact with " + "; ".join(faults))
    if prefixed and not repeats:
        return frame, args, kwargs
    if spec.encoder_decoder or repeats or laid_out:
        return frame.unwrapped() if prefixed else frame, args, _before_input(base, spec, frame, kwargs, task_ids)
    return frame.wrapping(site.install(base), Entrance(base, spec, task_ids)), args, kwargs


def _faults(base: Any, spec: InputSpec, frame: Frame, kwargs: dict[str, Any], counted: bool) -> list[str]:
    """With what virtual tokens cannot be exact, and what to do instead.

    Args:
        counted: all lengths count virtual tokens.
    """
    found = cache.given(kwargs)
    held, of_states = not cache.is_empty(found), cache.length(found) == 0
    kinds = {prompt.in_cache for prompt, _ in frame.prompts}
    in_encoder = spec.encoder_decoder and False in kinds
    from_ids = "inputs_embeds" not in inspect.signature(base.prepare_inputs_for_generation).parameters
    laid_out, paged = _is_laid_out(base, kwargs), _setting(base, kwargs, "cache_implementation") == "paged"
    rules = (
        (True, UNPROVED, "leave it out"),
        (counted, OF_TEXT, "give it a text from its start and a cache that grows"),
        (counted and spec.image_positions, IMAGES, "give it a text from its start and a cache that grows"),
        (in_encoder, OF_IDS, "leave it out"),
        (not in_encoder and not cache.crops_from_the_end(), DRAFTS, "this release of transformers crops by lengths; update it"),
        (held, DRAFTS, "leave the cache out, so that the text is read from its start"),
        (True in kinds, ("assistant_early_exit",), "a prefix has keys for all layers; use assistant_model"),
    )
    faults = {name: advice for applies, names, advice in rules if applies for name in _given(base, kwargs, names)}
    others = (
        (laid_out and True in kinds, "a fixed cache: prefix tuning needs a cache that can grow; use a DynamicCache"),
        (paged, 'a paged cache, which has no room for virtual tokens; use "dynamic"'),
        (held and of_states, "a cache of states, which do not tell how much of the text they have read; leave it out"),
        (held and len(kinds) > 1, "prefixes and prompts in one cache; continue it one adapter at a time"),
        (
            counted and from_ids,
            f"{type(base).__name__} here, which reads ids alone; give it a cache that is empty and can grow",
        ),
    )
    return [*(f"{name}: {advice}" for name, advice in faults.items()), *(fault for applies, fault in others if applies)]


def _setting(base: Any, kwargs: dict[str, Any], name: str) -> Any:
    """A setting of `generate`: given by the caller, in the caller's configuration, or the base's own."""
    configs = (kwargs.get("generation_config"), getattr(base, "generation_config", None))
    found = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in found if value is not None), None)


def _given(base: Any, kwargs: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Those of the settings that have an effect."""

    def acts(name: str, value: Any) -> bool:
        return value is not None and not (isinstance(value, (int, float)) and value in (0, NEUTRAL.get(name, 0)))

    return [name for name in names if acts(name, _setting(base, kwargs, name))]


def _is_laid_out(base: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the cache has a fixed size."""
    return cache.is_fixed(cache.given(kwargs)) or cache.is_laid_out(_setting(base, kwargs, "cache_implementation"))


def _repeats_cached(spec: InputSpec, kwargs: dict[str, Any]) -> bool:
    """Whether the input holds the tokens that are in the cache once more: `generate` tells it from a mask of their number."""
    if cache.length(cache.given(kwargs)) == 0 or spec.encoder_decoder:
        return False
    mask = kwargs.get("attention_mask")
    return mask is None or mask.shape[1] == tokens_of(kwargs).shape[1]


def _before_input(base: Any, spec: InputSpec, frame: Frame, kwargs: dict[str, Any], task_ids: Tensor | None) -> dict[str, Any]:
    """Arguments of `generate` with the virtual tokens embedded in front of the input, and all lengths counting them."""
    kwargs = _lengths_of_new_tokens(base, kwargs)
    given = {name: kwargs.pop(name) for name in PER_TOKEN if kwargs.get(name) is not None}
    found = cache.given(kwargs)
    if all(prompt.in_cache for prompt, _ in frame.prompts):
        inputs = with_columns(base, frame, given)
    else:
        inputs = prepare(base, spec, frame, given, task_ids)
    if cache.length(found) >= inputs["inputs_embeds"].shape[1]:
        raise UsageError(
            f"the cache holds {cache.length(found)} tokens, virtual ones included, and so does the input: no token is left to "
            "compute; give a longer text, or crop the cache"
        )
    if "position_ids" not in given:
        inputs.pop("position_ids", None)  # generate counts them from the mask itself
    if "input_ids" in given and not spec.encoder_decoder:
        inputs["input_ids"] = given["input_ids"]  # for the result and for processors that look at the text so far
    return {**kwargs, **inputs}


def _lengths_of_new_tokens(base: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `generate` in which lengths count new tokens only, and padding has a mask.

    `generate` counts embeddings into `max_length`; users do not count virtual tokens, so `max_length` and `min_length`
    become `max_new_tokens` and `min_new_tokens` for decoders. `generate` infers padding only from ids, which the
    model does not read here, so a missing mask is derived from ids in the same way.
    """
    kwargs = dict(kwargs)
    ids, settings = kwargs.get("input_ids"), kwargs.get("generation_config") or base.generation_config
    if ids is None:
        return kwargs
    if not architecture.is_encoder_decoder(base.config):
        for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            given = kwargs.pop(total, None)
            if given is None and kwargs.get("generation_config") is not None:
                given = getattr(settings, total, None)
            if given and kwargs.get(new) is None and getattr(kwargs.get("generation_config"), new, None) is None:
                kwargs[new] = given - ids.shape[1] if total == "max_length" else max(given - ids.shape[1], 0)
        if kwargs.get("max_new_tokens", 1) <= 0:
            raise UsageError(f"the prompt alone has {ids.shape[1]} tokens, which reaches max_length; increase max_length")
    if kwargs.get("attention_mask") is None:
        pad, eos = (kwargs.get(name, getattr(settings, name, None)) for name in ("pad_token_id", "eos_token_id"))
        ends = eos if isinstance(eos, (list, tuple)) else [eos]
        if isinstance(pad, int) and pad not in ends and bool((ids == pad).any()):
            kwargs["attention_mask"] = (ids != pad).long()
    return kwargs
