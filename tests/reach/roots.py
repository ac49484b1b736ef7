"""Ways from a handle to its whole base, what is asked of a model, and code that people write around models."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reach.ways import tensors_of
from tunesmith import PeftModel

Inputs = dict[str, Tensor]

# --- roots: what stands for the whole model --------------------------------------------------------------------------


class _Holder(nn.Module):
    """A model kept in a module of the user's, as trainers, value heads and reward models do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.pretrained_model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.pretrained_model(*args, **kwargs)


ROOTS: dict[str, Callable[[PeftModel], Any]] = {
    "handle": lambda handle: handle,
    "get_base_model": lambda handle: handle.get_base_model(),
    "base_model": lambda handle: handle.base_model,
    "base_model.model": lambda handle: handle.base_model.model,
    "kept in a module": lambda handle: _Holder(handle.get_base_model()).pretrained_model,
    "get_submodule": lambda handle: handle.get_submodule("base_model"),
    "named_children": lambda handle: dict(handle.named_children())["base_model"],
    "modules": lambda handle: next(m for m in handle.modules() if m is handle.get_base_model()),
    "get_base_model twice": lambda handle: handle.get_base_model().get_submodule(""),
}

# --- uses: what a whole model is asked for ---------------------------------------------------------------------------


def _streamed(model: Any, inputs: Inputs) -> Tensor:
    """As chat applications do: `generate` on a thread of its own, tokens as they come."""
    received: list[int] = []

    class Streamer:
        def put(self, value: Tensor) -> None:
            received.extend(value.flatten().tolist())

        def end(self) -> None: ...

    one_row = {name: value[:1] for name, value in _prompt(inputs).items()}
    keywords = {**one_row, "streamer": Streamer(), "max_new_tokens": 4, "do_sample": False}
    thread = threading.Thread(target=model.generate, kwargs=keywords)
    thread.start()
    thread.join()
    return torch.tensor(received).double()


def _prompt(inputs: Inputs) -> Inputs:
    return {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}


def _generated(model: Any, inputs: Inputs, **how: Any) -> list[Any]:
    torch.manual_seed(0)
    settings = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True, **how}
    found = model.generate(**_prompt(inputs), **settings)
    return [found.sequences.double(), *found.logits]


def _bound_generate(model: Any, inputs: Inputs) -> Any:
    generate = model.generate
    return generate(**_prompt(inputs), max_new_tokens=4, do_sample=False).double()


def _with_labels(model: Any, inputs: Inputs) -> Any:
    labels = inputs.get("decoder_input_ids", inputs["input_ids"])
    return model(**{name: value for name, value in inputs.items() if name != "decoder_input_ids"}, labels=labels).loss


def _with_embeddings(model: Any, inputs: Inputs) -> Any:
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    return model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]), **rest)


def _callback(model: Any, inputs: Inputs) -> list[Tensor]:
    """`generate` calls back; what the callback asks of the model must be the adapted model's answer."""
    seen: list[Tensor] = []

    def look(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        if "decoder_input_ids" not in inputs:
            seen.extend(tensors_of(model(input_ids=ids).logits[:, -1]))
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    model.generate(**_prompt(inputs), max_new_tokens=2, do_sample=False, stopping_criteria=[look])
    return seen


EVERY = "every family"
OF_TRANSFORMERS = "families of transformers"
GENERATING = "families that generate"
USES: dict[str, tuple[str, Callable[[Any, Inputs], Any]]] = {
    "call": (EVERY, lambda model, inputs: model(**inputs)),
    "forward": (EVERY, lambda model, inputs: model.forward(**inputs)),
    "the class's __call__": (EVERY, lambda model, inputs: nn.Module.__call__(model, **inputs)),
    "functional_call": (EVERY, lambda model, inputs: torch.func.functional_call(model, {}, (), inputs)),
    "hidden states": (OF_TRANSFORMERS, lambda model, inputs: model(**inputs, output_hidden_states=True)),
    "tuple": (OF_TRANSFORMERS, lambda model, inputs: model(**inputs, return_dict=False)),
    "embeddings of its own": (OF_TRANSFORMERS, _with_embeddings),
    "loss": (GENERATING, _with_labels),
    "generate": (GENERATING, _generated),
    "beams": (GENERATING, lambda model, inputs: _generated(model, inputs, num_beams=2)),
    "sampling": (GENERATING, lambda model, inputs: _generated(model, inputs, do_sample=True)),
    "with a cache": (GENERATING, lambda model, inputs: _generated(model, inputs, use_cache=True)),
    "bound generate": (GENERATING, _bound_generate),
    "streamer": (GENERATING, _streamed),
    "callback": (GENERATING, _callback),
}

# --- code around models: the same lines for a handle and for a plain model -------------------------------------------


def base(model: Any) -> Any:
    """What libraries write to come to the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _backbone(model: Any) -> Any:
    return getattr(base(model), base(model).base_model_prefix)


def _backbone_inputs(model: Any, inputs: Inputs) -> Any:
    return _backbone(model)(**inputs)[0]


def _head_on_decoder(model: Any, inputs: Inputs) -> Tensor:
    return model.get_output_embeddings()(model.get_decoder()(**inputs)[0])


def _weight_of_the_head(model: Any, inputs: Inputs) -> Tensor:
    return F.linear(base(model).get_decoder()(**inputs)[0], base(model).get_output_embeddings().weight)


def _weight_of_the_embedding(model: Any, inputs: Inputs) -> Tensor:
    return F.embedding(inputs["input_ids"], model.get_input_embeddings().weight)


class _ValueHead(nn.Module):
    """A critic of reinforcement learning: a frozen head on the hidden states of the policy."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.backbone = _backbone(policy)

    def forward(self, **inputs: Tensor) -> Tensor:
        states = self.backbone(**inputs)[0]
        return states @ torch.linspace(-1, 1, states.shape[-1]).to(states)


def _value_head(model: Any, inputs: Inputs) -> Tensor:
    return _ValueHead(model)(**inputs)


def _loss_by_hand(model: Any, inputs: Inputs) -> Tensor:
    """A fused loss: backbone, then the head on a few positions at a time."""
    states = model.model(**inputs)[0]
    logits = torch.cat([model.lm_head(part) for part in states.split(3, dim=1)], dim=1)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())


def _layer_by_layer(model: Any, inputs: Inputs) -> Tensor:
    """A loop over layers, as probes and early exits are written."""
    stack = model.model
    x = stack.embed_tokens(inputs["input_ids"])
    positions = torch.arange(x.shape[1])[None]
    angles = stack.rotary_emb(x, positions)
    for layer in stack.layers:
        x = layer(x, position_embeddings=angles, position_ids=positions)
        x = x[0] if isinstance(x, tuple) else x
    return model.lm_head(stack.norm(x))


def _first_layers(model: Any, inputs: Inputs) -> Tensor:
    blocks = nn.Sequential(*model.blocks[:2])
    return blocks(model.embed(inputs["input_ids"]))


def _own_method(model: Any, inputs: Inputs) -> Tensor:
    return model.features(**inputs)


def _own_method_in_a_thread(model: Any, inputs: Inputs) -> Tensor:
    """Whether gradients are recorded is each thread's own affair, so it is said again."""
    method = torch.set_grad_enabled(torch.is_grad_enabled())(model.features)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(method, **inputs).result()


def _dictionary(model: Any, inputs: Inputs) -> list[Tensor]:
    features = model.features(**inputs)
    return [head(features) for head in model.heads.values()]


def _hooked(model: Any, inputs: Inputs) -> list[Tensor]:
    """Activations collected by hooks on every module with parameters of its own."""
    seen: list[Tensor] = []
    named = [
        (name, module)
        for name, module in base(model).named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    hooks = [module.register_forward_hook(lambda _, args, result: seen.extend(tensors_of(result))) for _, module in named]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


CAUSAL = {"llama", "llama-tied", "gpt2", "bloom", "opt", "mixtral", "gemma3"}
LLAMAS = {"llama", "llama-tied", "mixtral"}
CLIENTS: dict[str, tuple[set[str], Callable[[Any, Inputs], Any]]] = {
    "backbone by its prefix": (CAUSAL | {"llama-classifier", "bert-classifier", "bert-tagger"}, _backbone_inputs),
    "head on the decoder": (CAUSAL, _head_on_decoder),
    "value head": (CAUSAL | {"llama-classifier", "bert-tagger"}, _value_head),
    "loss by hand": (LLAMAS | {"opt", "gemma3"}, _loss_by_hand),
    "layer by layer": (LLAMAS, _layer_by_layer),
    "encoder": ({"t5", "t5-untied"}, lambda model, inputs: model.get_encoder()(inputs["input_ids"])[0]),
    "weight of the head": (CAUSAL, _weight_of_the_head),
    "weight of the embedding": (CAUSAL | {"t5", "t5-untied", "bert-tagger"}, _weight_of_the_embedding),
    "first layers in a sequence": ({"own"}, _first_layers),
    "a method of its own": ({"own"}, _own_method),
    "a method of its own in a thread": ({"own"}, _own_method_in_a_thread),
    "a dictionary of heads": ({"own"}, _dictionary),
    "hooks on every module": (CAUSAL | {"own", "conv", "t5", "bert-classifier"}, _hooked),
}
