"""Facts about a model's architecture: the only module that reads transformers' configurations and knows their field names.

Each fact is one function. If releases of transformers or model families use different names, all of them are listed here and
nowhere else. A configuration may be None, as it is for plain modules; a fact is then absent.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .stored_tensors import shape_of

_POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe", "position_embedding")
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer")
_HEAD_COUNTS = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")
_ROPES_BY_LENGTH = ("dynamic", "longrope")  # the longest text of a call decides the rotation for all of them
_TABLE, _ATTENTION = "ALL_ATTENTION_FUNCTIONS", "_attn_implementation"
RECOMPUTES = "gradient_checkpointing"  # attribute of a module that can compute its layers again in the backward pass


# --- what kind of model ---------------------------------------------------------------------------------------------


def config_of(model: Any) -> Any:
    """The model's configuration; None if it has none."""
    return getattr(model, "config", None)


def text_config(config: Any) -> Any:
    """The configuration of the text decoder, if the model has several towers."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def model_type(config: Any) -> str | None:
    """transformers' name for the architecture, such as "llama"."""
    kind: str | None = getattr(config, "model_type", None)
    return kind


def is_encoder_decoder(config: Any) -> bool:
    """Whether the model has an encoder and a decoder."""
    return bool(getattr(config, "is_encoder_decoder", False))


def is_causal_lm(model: nn.Module, kind: str) -> bool:
    """Whether a model is the causal language model of that model type, or derived from it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) in {cls.__name__ for cls in type(model).__mro__}


def is_decoder_only(config: Any) -> bool:
    """Whether a configuration states that there is no encoder; if it states nothing, there may be one."""
    return getattr(config, "is_encoder_decoder", None) is False


def auto_class(config: Any) -> str:
    """Name of transformers' auto class for language models with such a configuration."""
    if is_speech_model(config):
        return "AutoModelForSpeechSeq2Seq"
    return "AutoModelForSeq2SeqLM" if is_encoder_decoder(config) else "AutoModelForCausalLM"


def is_speech_model(config: Any) -> bool:
    """Whether the encoder reads audio."""
    return model_type(config) == "whisper"


def is_bidirectional(config: Any) -> bool:
    """Whether tokens attend to later ones."""
    return not getattr(config, "is_causal", True) or bool(getattr(config, "use_bidirectional_attention", None))


def has_cross_attention(config: Any) -> bool:
    """Whether a decoder also attends to another sequence."""
    return bool(getattr(config, "add_cross_attention", False))


# --- sizes ----------------------------------------------------------------------------------------------------------


def hidden_size(config: Any) -> int:
    """Width of the hidden states."""
    width: int = _language(config).hidden_size
    return width


def layers_in(config: Any) -> int | None:
    """Number of layers of the language model; of an encoder-decoder, those of its encoder."""
    return _first(_language(config), _LAYER_COUNTS)


def heads_in(config: Any) -> int | None:
    """Number of query heads of a layer."""
    return _first(_language(config), _HEAD_COUNTS)


def vocabulary(config: Any) -> int:
    """Size of the vocabulary."""
    count: int = _language(config).vocab_size
    return count


def vocabulary_of(model: Any, published: str | None = None) -> int | None:
    """What a model's configuration gives as its vocabulary's size; None if it gives none.

    Args:
        published: a folder or Hub id to read the configuration from, in place of the model's own; nothing is downloaded.
    """
    config = config_of(model)
    if published is not None and hasattr(type(config), "from_pretrained"):
        try:
            config = type(config).from_pretrained(published, local_files_only=True)
        except (OSError, ValueError):
            return None
    size: int | None = getattr(config, "vocab_size", None)
    return size


def spectrogram_shape(config: Any) -> tuple[int, int]:
    """`(mel bins, frames)` of the spectrogram that a speech model reads."""
    return config.num_mel_bins, 2 * config.max_source_positions


def stored_dtype(config: Any) -> Any:
    """The dtype of a model's stored weights according to its configuration; None if that is not given."""
    return getattr(config, "dtype", None)


def longest_input(config: Any) -> int | None:
    """The longest input in tokens that a model supports; None if its configuration does not say."""
    return getattr(config, "max_position_embeddings", None)


def key_shapes(config: Any, layers: int) -> set[tuple[int, int]]:
    """All shapes `(heads, head_dim)` of keys among the layers.

    Releases before 5.14 have no per-layer configuration: one describes all layers, except for Gemma 4's wider ones.
    """
    text = text_config(config)
    by_layer = getattr(text, "per_layer_config", None)
    if by_layer is not None:
        return {_key_shape(by_layer[index]) for index in range(layers)}
    wider = getattr(text, "global_head_dim", None)
    heads, head_dim = _key_shape(text)
    return {(heads, head_dim)} if wider in (None, head_dim) else {(heads, head_dim), (heads, wider)}


def compresses_keys(config: Any) -> bool:
    """Whether layers cache one short vector instead of keys and values (multi-head latent attention)."""
    return bool(getattr(text_config(config), "kv_lora_rank", None))


def shares_keys(config: Any) -> bool:
    """Whether some layers use the keys and values of others."""
    return bool(getattr(text_config(config), "num_kv_shared_layers", None))


def _key_shape(config: Any) -> tuple[int, int]:
    """With grouped-query attention there are fewer key heads than query heads; T5 calls the width `d_kv`."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1, head_dim
    return getattr(config, "num_key_value_heads", None) or heads, head_dim


def _language(config: Any) -> Any:
    """The configuration of the language model; of an encoder-decoder, of both stacks."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    found: Iterator[int] = (value for name in names if (value := getattr(config, name, None)) is not None)
    return next(found, None)


# --- positions ------------------------------------------------------------------------------------------------------


def position_table(model: nn.Module) -> nn.Embedding | None:
    """The learned table of absolute positions, found by its usual names."""
    tables = (m for path, m in model.named_modules() if isinstance(m, nn.Embedding) and path.endswith(_POSITION_TABLES))
    return next(tables, None)


def counts_image_positions(model: Any) -> bool:
    """Whether the model counts positions along several axes, from ids and the sizes of images (Qwen-VL)."""
    return _counts_positions(model) is not None


def _counts_positions(model: Any) -> Any:
    return next((one for one in (model, getattr(model, "model", None)) if hasattr(one, "get_rope_index")), None)


def image_positions(model: Any, inputs: dict[str, Any], seen: int) -> Tensor | None:
    """The positions of a text with images, `(3, B, T)`, counted without virtual tokens; None if it has none.

    The model keeps for later steps by how much they differ from a count of tokens.

    Args:
        seen: number of tokens before those of the call.

    Raises:
        UsageError: they cannot be told from what is given.
    """
    inner = _counts_positions(model)
    tokens = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
    rows, length = tokens.shape[:2]
    if seen:
        mask = inputs.get("attention_mask")
        if mask is None:
            positions = torch.arange(seen, seen + length, device=tokens.device).expand(rows, -1)
        else:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
        if inner.rope_deltas is not None:
            positions = positions + inner.rope_deltas.repeat_interleave(rows // len(inner.rope_deltas), 0)
        return positions.expand(3, -1, -1)
    if inputs.get("image_grid_thw") is None and inputs.get("video_grid_thw") is None:
        inner.rope_deltas = torch.zeros((rows, 1), dtype=torch.long, device=tokens.device)
        return None
    names = inspect.signature(inner.get_rope_index).parameters
    missing = [name for name in ("input_ids", "mm_token_type_ids") if name in names and inputs.get(name) is None]
    if missing:
        raise UsageError(f"positions of images are counted from {' and '.join(missing)}; give them, or position_ids")
    found, inner.rope_deltas = inner.get_rope_index(**{name: inputs[name] for name in names if inputs.get(name) is not None})
    return cast(Tensor, found)


def column_window(config: Any) -> int | None:
    """Over how many columns of text, padding among them, a token's attention is the same; None if over all of them."""
    config = text_config(config)
    if getattr(getattr(config, "attn_config", None), "alibi", False):
        return 0  # MPT counts the distance in columns
    kinds = getattr(config, "layer_types", None) or ["sliding_attention", "chunked_attention"]
    sizes = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    found = [size for kind, name in sizes.items() if kind in kinds and (size := getattr(config, name, None)) is not None]
    return min(found, default=None)


def reads_ids_in_layers(config: Any) -> bool:
    """Whether layers look tokens up in embeddings of their own (Gemma 3n), so that they need ids."""
    return bool(getattr(text_config(config), "hidden_size_per_layer_input", 0))


def positions_behind_padding(table: nn.Embedding) -> bool:
    """Whether positions are counted from the padding id, as in RoBERTa."""
    return getattr(table, "padding_idx", None) is not None


def rope_depends_on_length(config: Any) -> bool:
    """Whether rotary positions depend on the longest text of a call."""
    rope = str(getattr(config, "rope_parameters", None))
    return any(kind in rope for kind in _ROPES_BY_LENGTH)


# --- head and embeddings --------------------------------------------------------------------------------------------


def input_embeddings(model: Any) -> Any:
    """The table of word embeddings; None if the model has none."""
    try:
        return getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # transformers' answer for models without words
        return None


def output_head(model: Any) -> Any:
    """The map from hidden states to logits; None if the model has none."""
    return getattr(model, "get_output_embeddings", lambda: None)()


def embedding_width(model: Any) -> int:
    """Dimension of the token embeddings."""
    table = model.get_input_embeddings()
    width: int = getattr(table, "embedding_dim", None) or shape_of(table.weight)[1]
    return width


def caps_logits(config: Any) -> bool:
    """Whether logits are capped after the output head, as in Gemma 2."""
    return getattr(config, "final_logit_softcapping", None) is not None


def adds_router_loss(config: Any) -> bool:
    """Whether a mixture of experts adds its routers' load-balancing loss to the loss of its labels."""
    return bool(getattr(config, "output_router_logits", False))


def has_plain_loss(model: Any) -> bool:
    """Whether the loss function of a language model is transformers' own: the cross-entropy of its logits, nothing added."""
    from transformers.loss import loss_utils

    own = {(function, loss_utils.__name__) for function in ("ForCausalLMLoss", "fixed_cross_entropy")}
    used = (model.loss_function, loss_utils.fixed_cross_entropy)
    return {(getattr(f, "__name__", ""), getattr(f, "__globals__", {}).get("__name__")) for f in used} == own


def ties_embeddings(config: Any) -> bool:
    """Whether the output head shares its weight with the input embeddings."""
    return bool(getattr(config, "tie_word_embeddings", False))


def tie_embeddings(config: Any, tied: bool) -> None:
    """Set in the configuration whether they are tied."""
    config.tie_word_embeddings = tied


def reads_last_token(model: nn.Module) -> bool:
    """Whether a classifier's head reads the last position (as on causal models) rather than the first."""
    return hasattr(model, "score")


def pools_first_token(model: nn.Module) -> bool:
    """Whether the first position is pooled, in addition to the outputs for each token."""
    return getattr(model, "pooler", None) is not None


# --- layers and attentions ------------------------------------------------------------------------------------------


def layer_index(module: nn.Module) -> int | None:
    """Index of the layer that an attention belongs to; None for other modules."""
    index = getattr(module, "layer_idx", None)
    return index if isinstance(index, int) else None


def is_attention(module: nn.Module) -> bool:
    """Whether a module is an attention that looks its function up in transformers' table."""
    return hasattr(module, "is_causal") and hasattr(module, "config")


def attention_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Paths and modules of the attentions, and of the stacks that contain them and build their masks."""
    from transformers import PreTrainedModel

    inner = [(path, module) for path, module in model.named_modules() if path]
    return [(path, module) for path, module in inner if is_attention(module) or isinstance(module, PreTrainedModel)]


def attention_fault(modules: Iterable[tuple[str, nn.Module]]) -> str | None:
    """Why the attention function of one of these modules, by path, cannot be replaced with the same result; None if all can.

    Nemotron has its own attention classes before 5.13. `sdpa` ignores the cap on Gemma 2's scores, which releases up to 5.18
    allow.
    """
    for path, module in modules:
        if not is_attention(module):
            continue
        if not any(_knows_attention_table(cls.__module__) for cls in type(module).__mro__):
            return f"{path} has its own attention implementation"
        capped = getattr(module.config, "attn_logit_softcapping", None) is not None
        if capped and getattr(module.config, _ATTENTION, None) == "sdpa":
            return f'{path} caps its scores, which sdpa does not support; load the base with attn_implementation="eager"'
    return None


@functools.cache
def _knows_attention_table(module_name: str) -> bool:
    """Whether a Python module has transformers' table of attentions at hand."""
    return hasattr(sys.modules.get(module_name), _TABLE)


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Register a function in transformers' table of attentions."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(name, function)


def with_attention(config: Any, name: str) -> Any:
    """A shallow copy of a configuration that selects another attention; the original is unchanged."""
    other = copy.copy(config)
    setattr(other, _ATTENTION, name)
    return other


def caches_by_default(config: Any) -> bool:
    """Whether a call caches keys and values unless told otherwise."""
    return bool(getattr(config, "use_cache", False))


# --- gradient checkpointing -----------------------------------------------------------------------------------------


def recomputes(module: Any) -> bool:
    """Whether gradient checkpointing is enabled on a module."""
    return bool(getattr(module, RECOMPUTES, False))


def enable_recomputing(model: Any, settings: dict[str, Any] | None = None) -> None:
    """Enable gradient checkpointing; in newer releases `gradient_checkpointing_enable` is the old name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings)


# --- quantised bases ------------------------------------------------------------------------------------------------


def is_stored_quantised(config: Any) -> bool:
    """Whether a checkpoint's configuration says that its weights are quantised."""
    return getattr(config, "quantization_config", None) is not None


def is_quantised(model: Any) -> bool:
    """Whether transformers loaded a model in 4 or 8 bits."""
    return any(getattr(model, name, False) for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"))


def drop_quantised_marks(model: Any) -> None:
    """Remove the attributes that mark `model` as quantised, once none of its modules is."""
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    for config in configs(model):
        config.__dict__.pop("quantization_config", None)
        config.__dict__.pop("_is_quantized", None)


def configs(model: nn.Module) -> Iterator[Any]:
    """Every configuration held by a module of the model, once each."""
    return iter({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())


# --- experts, and the names of earlier releases -----------------------------------------------------------------------


def is_router(module: nn.Module) -> bool:
    """Whether a module of transformers chooses experts with a matrix of its own, and so answers more than a product.

    Llama 4's and Phi-MoE's are `nn.Linear` by class.
    """
    kind, weight = type(module), module._parameters.get("weight")
    return "Router" in kind.__name__ and kind.__module__.startswith("transformers") and weight is not None and weight.dim() == 2


def expert_parameters(module: nn.Module) -> list[str]:
    """Names of parameters that hold the weights of all experts of a layer: stacks, and DBRX's matrices."""
    named = "Expert" in type(module).__name__
    own = {name: p for name, p in module._parameters.items() if p is not None and p.is_floating_point() and "bias" not in name}
    return [name for name, p in own.items() if len(p) > 1 and (p.dim() == 3 or (named and p.dim() == 2))]


class FormerNames:
    """What transformers 4 called a model's weights: its successor's own table for reading checkpoints, in both directions.

    Only tables that rename, or that stack the linear maps of experts, are used: what they do to a weight can be done to a
    change of that weight, too.
    """

    def __init__(self, model: nn.Module) -> None:
        table = _checkpoint_table(model)
        back = [reverse for transform in reversed(table) if (reverse := _reversed(transform)) is not None]
        self.renamings, self.stackings = _split(table)
        self.back_renamings, self.back_stackings = _split(back)

    def current(self, name: str) -> tuple[str, int | None]:
        """A weight's name now; if it has become an expert's share of a parameter, which of that expert's parts it is."""
        name = _renamed(name, self.renamings)
        for stacking in self.stackings:
            found, pattern = stacking.rename_source_key(name)
            if pattern is not None:
                return found, stacking.source_patterns.index(pattern)
        return name, None

    def former(self, name: str) -> list[str]:
        """Names that the parts of a weight had, with `*` for the number of the expert."""
        names = [name]
        for stacking in self.back_stackings:
            found, pattern = stacking.rename_source_key(name)
            if pattern is not None:
                targets = stacking.target_patterns
                names = [found.replace(targets[0], target, 1) for target in targets]
                break
        names = [_renamed(former, self.back_renamings) for former in names]
        back = [self.current(former.replace("*", "0")) for former in names]
        return names if back == [(name, part if "*" in former else None) for part, former in enumerate(names)] else [name]


def _checkpoint_table(model: nn.Module) -> list[Any]:
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model, add_legacy=False) if isinstance(model, PreTrainedModel) else []


def _reversed(transform: Any) -> Any:
    """The transform for writing; None where there is none, or where it needs to know how a checkpoint was read."""
    if hasattr(transform, "prefix_to_add"):
        return None
    try:
        return transform.reverse_transform()
    except (ValueError, NotImplementedError, AttributeError):
        return None


_STACKING = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])  # when reading; the inverses when writing
_UNSTACKING = (["SplitModulelist"], ["Chunk", "SplitModulelist"])


def _split(table: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Transforms that rename, and those that stack experts; renamings that depend on other keys are left out."""
    renamings, stackings = [], []
    for transform in table:
        steps = [type(step).__name__ for step in getattr(transform, "operations", ())]
        if not steps and type(transform).__name__ != "GroupWeightRename":
            renamings.append(transform)
        elif steps in (*_STACKING, *_UNSTACKING):
            stackings.append(transform)
    return renamings, stackings


def _renamed(name: str, renamings: Sequence[Any]) -> str:
    for renaming in renamings:
        name = renaming.rename_source_key(name)[0]
    return name
