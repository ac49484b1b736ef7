"""Facts about a model's architecture: the one place that reads transformers' configurations and the names of their parts.

Each fact is one function. Where releases of transformers or families of models name a fact differently, all names are here,
and nowhere else. A configuration may be None: bases that are plain modules have none, and then a fact is absent.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

_POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe", "position_embedding")
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer")
_HEAD_COUNTS = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")
# What configs call a cap or a scale of logits.
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
_ROPES_BY_LENGTH = ("dynamic", "longrope")  # the longest text of a call decides how positions of all are turned
_TABLE, _ATTENTION = "ALL_ATTENTION_FUNCTIONS", "_attn_implementation"
RECOMPUTES_BY = "_gradient_checkpointing_func"  # attribute of a module that was told to recompute: the function it does it by


# --- what kind of model ---------------------------------------------------------------------------------------------


def config_of(model: Any) -> Any:
    """The model's configuration; None where it has none."""
    return getattr(model, "config", None)


def text_config(config: Any) -> Any:
    """The part of a configuration that describes what writes text, where a model has several towers."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def model_type(config: Any) -> str | None:
    """transformers' name for the architecture, such as "llama"."""
    kind: str | None = getattr(config, "model_type", None)
    return kind


def is_encoder_decoder(config: Any) -> bool:
    """Whether an encoder reads one text and a decoder writes another."""
    return bool(getattr(config, "is_encoder_decoder", False))


def is_causal_lm(model: nn.Module, kind: str) -> bool:
    """Whether a model is the causal language model of that model type, or derived from it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) in {cls.__name__ for cls in type(model).__mro__}


def is_decoder_only(config: Any) -> bool:
    """Whether a configuration says that there is no encoder; one that says nothing may have one."""
    return getattr(config, "is_encoder_decoder", None) is False


def auto_class(config: Any) -> str:
    """transformers' class that makes language models of such configurations."""
    if hears(config):
        return "AutoModelForSpeechSeq2Seq"
    return "AutoModelForSeq2SeqLM" if is_encoder_decoder(config) else "AutoModelForCausalLM"


def hears(config: Any) -> bool:
    """Whether an encoder reads sound."""
    return model_type(config) == "whisper"


def attends_both_ways(config: Any) -> bool:
    """Whether tokens see those behind them."""
    return not getattr(config, "is_causal", True) or bool(getattr(config, "use_bidirectional_attention", None))


def attends_elsewhere(config: Any) -> bool:
    """Whether a decoder reads another text beside its own."""
    return bool(getattr(config, "add_cross_attention", False))


# --- sizes ----------------------------------------------------------------------------------------------------------


def hidden_size(config: Any) -> int:
    """Width of the hidden states."""
    width: int = _language(config).hidden_size
    return width


def layers_in(config: Any) -> int | None:
    """How many layers the language model has; of an encoder-decoder, its encoder."""
    return _first(_language(config), _LAYER_COUNTS)


def heads_in(config: Any) -> int | None:
    """How many heads the queries of a layer have."""
    return _first(_language(config), _HEAD_COUNTS)


def vocabulary(config: Any) -> int:
    """How many tokens there are."""
    count: int = _language(config).vocab_size
    return count


def sound_shape(config: Any) -> tuple[int, int]:
    """`(bands, frames)` of the spectrogram that a model which hears reads."""
    return config.num_mel_bins, 2 * config.max_source_positions


def stored_dtype(config: Any) -> Any:
    """The type of a model's stored weights, as its configuration says; None where it does not."""
    return getattr(config, "dtype", None)


def longest_input(config: Any) -> int | None:
    """How many tokens a model was made for; None where its configuration does not say."""
    return getattr(config, "max_position_embeddings", None)


def key_shapes(config: Any, layers: int) -> set[tuple[int, int]]:
    """`(heads, head_dim)` of keys, all that occur among the layers.

    Releases before 5.14 have no configuration of each layer: there, one describes all of them, but for Gemma 4's wider ones.
    """
    text = text_config(config)
    by_layer = getattr(text, "per_layer_config", None)
    if by_layer is not None:
        return {_key_shape(by_layer[index]) for index in range(layers)}
    wider = getattr(text, "global_head_dim", None)
    heads, head_dim = _key_shape(text)
    return {(heads, head_dim)} if wider in (None, head_dim) else {(heads, head_dim), (heads, wider)}


def compresses_keys(config: Any) -> bool:
    """Whether layers keep one short vector in place of keys and values (multi-head latent attention)."""
    return bool(getattr(text_config(config), "kv_lora_rank", None))


def shares_keys(config: Any) -> bool:
    """Whether some layers use the keys and values of others."""
    return bool(getattr(text_config(config), "num_kv_shared_layers", None))


def _key_shape(config: Any) -> tuple[int, int]:
    """Fewer heads than the queries have under grouped-query attention; T5 calls the width `d_kv`."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1, head_dim
    return getattr(config, "num_key_value_heads", None) or heads, head_dim


def _language(config: Any) -> Any:
    """The part of a configuration that describes the language model, of an encoder-decoder both its stacks."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    found: Iterator[int] = (value for name in names if (value := getattr(config, name, None)) is not None)
    return next(found, None)


# --- positions ------------------------------------------------------------------------------------------------------


def position_table(model: nn.Module) -> nn.Embedding | None:
    """The learned table of absolute positions, found by the names architectures give it."""
    tables = (m for path, m in model.named_modules() if isinstance(m, nn.Embedding) and path.endswith(_POSITION_TABLES))
    return next(tables, None)


def positions_behind_padding(table: nn.Embedding) -> bool:
    """Whether positions are counted from the padding id on, as RoBERTa does."""
    return getattr(table, "padding_idx", None) is not None


def turns_by_length(config: Any) -> bool:
    """Whether rotary positions depend on how long the longest text of a call is."""
    rope = str(getattr(config, "rope_parameters", None))
    return any(kind in rope for kind in _ROPES_BY_LENGTH)


# --- head and embeddings --------------------------------------------------------------------------------------------


def output_head(model: Any) -> Any:
    """The map from hidden states to logits; None where a model has none."""
    return getattr(model, "get_output_embeddings", lambda: None)()


def embedding_width(model: Any) -> int:
    """In how many dimensions tokens are embedded."""
    table = model.get_input_embeddings()
    width: int = getattr(table, "embedding_dim", None) or table.weight.shape[1]
    return width


def changes_logits(config: Any) -> bool:
    """Whether logits are capped or scaled behind the output head."""
    return any(getattr(config, name, None) not in (None, 1.0) for name in _LOGIT_CHANGES)


def ties_embeddings(config: Any) -> bool:
    """Whether the output head is the table of input embeddings."""
    return bool(getattr(config, "tie_word_embeddings", False))


def tie_embeddings(config: Any, tied: bool) -> None:
    """Say in the configuration whether they are one."""
    config.tie_word_embeddings = tied


def reads_last_token(model: nn.Module) -> bool:
    """Of a classifier, whether its head reads the last position (on causal models) and not the first."""
    return hasattr(model, "score")


def pools_first_token(model: nn.Module) -> bool:
    """Whether the first position is pooled, beside what is computed for each token."""
    return getattr(model, "pooler", None) is not None


def shifts_labels(model: nn.Module) -> bool:
    """Whether an encoder-decoder makes its decoder's inputs from labels by a method, which others may call, too."""
    return hasattr(model, "prepare_decoder_input_ids_from_labels")


# --- layers and attentions ------------------------------------------------------------------------------------------


def layer_index(module: nn.Module) -> int | None:
    """Which layer an attention belongs to; None for other modules."""
    index = getattr(module, "layer_idx", None)
    return index if isinstance(index, int) else None


def attends(module: nn.Module) -> bool:
    """Whether a module is an attention that looks its function up in transformers' table."""
    return hasattr(module, "is_causal") and hasattr(module, "config")


def attending(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Paths and modules of the attentions, and of the stacks around them, which make masks."""
    from transformers import PreTrainedModel

    inner = [(path, module) for path, module in model.named_modules() if path]
    return [(path, module) for path, module in inner if attends(module) or isinstance(module, PreTrainedModel)]


def attention_fault(model: nn.Module) -> str | None:
    """Why a model's attentions cannot be exchanged for another one with the same result; None where they can.

    Nemotron's are classes of their own before 5.13. `sdpa` leaves out the cap of Gemma 2's scores, and releases before 5.23
    let it.
    """
    for path, module in model.named_modules():
        if not attends(module):
            continue
        homes = (sys.modules.get(cls.__module__) for cls in type(module).__mro__)
        if not any(hasattr(home, _TABLE) for home in homes):
            return f"{path} computes its attention itself"
        capped = getattr(module.config, "attn_logit_softcapping", None) is not None
        if capped and getattr(module.config, _ATTENTION, None) == "sdpa":
            return f'{path} caps its scores, which sdpa does not do; load the base with attn_implementation="eager"'
    return None


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Put a function into transformers' table of attentions."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(name, function)


def with_attention(config: Any, name: str) -> Any:
    """A shallow copy of a configuration that names another attention; the given one is not touched."""
    other = copy.copy(config)
    setattr(other, _ATTENTION, name)
    return other


def stores_by_default(config: Any) -> bool:
    """Whether a call that does not say so keeps keys and values."""
    return bool(getattr(config, "use_cache", False))


# --- gradient checkpointing -----------------------------------------------------------------------------------------


def may_recompute(model: nn.Module) -> list[Any]:
    """The modules that can be told to compute their layers anew in a backward pass."""
    return [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]


def recomputes(module: Any) -> bool:
    """Whether one was told to."""
    return bool(getattr(module, "gradient_checkpointing", False))


def enable_recomputing(model: Any, settings: dict[str, Any] | None = None) -> None:
    """Turn gradient checkpointing on; `gradient_checkpointing_enable` is an old name in newer releases."""
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
    """Take away what says that `model` is quantised, once nothing of it is."""
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    for config in configs(model):
        config.__dict__.pop("quantization_config", None)
        config.__dict__.pop("_is_quantized", None)


def configs(model: nn.Module) -> Iterator[Any]:
    """Every configuration that a module of the model holds, once."""
    return iter({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())
