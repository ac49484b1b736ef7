"""The reference library beside ours: the same adapter in both, from files that either one writes."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import safe_open
from torch import Tensor, nn

import tunesmith as ts
from tests import tiny

CONFIGS = {
    "lora": (ts.LoraConfig, peft.LoraConfig, {"r": 4, "lora_alpha": 8, "init_lora_weights": False}),
    "p-tuning": (ts.PromptEncoderConfig, peft.PromptEncoderConfig, {"num_virtual_tokens": 4, "encoder_hidden_size": 12}),
    "adaption": (ts.AdaptionPromptConfig, peft.AdaptionPromptConfig, {"adapter_len": 4, "adapter_layers": 2}),
    "multitask": (
        ts.MultitaskPromptTuningConfig,
        peft.MultitaskPromptTuningConfig,
        {"num_virtual_tokens": 4, "num_tasks": 3, "num_ranks": 2, "num_transformer_submodules": 1},
    ),
    "prefix": (ts.PrefixTuningConfig, peft.PrefixTuningConfig, {"num_virtual_tokens": 4}),
    "prompt": (ts.PromptTuningConfig, peft.PromptTuningConfig, {"num_virtual_tokens": 4}),
}


def ours_on(base: nn.Module, kind: str, task: str | None, **options: Any) -> ts.PeftModel:
    """Our handle with a new adapter whose every tensor is random, so that each part of it acts."""
    config, _, defaults = CONFIGS[kind]
    handle = ts.get_peft_model(base, config(task_type=task, **{**defaults, **options}))
    return scrambled(handle).eval()


def theirs_on(base: nn.Module, kind: str, task: str | None, **options: Any) -> peft.PeftModel:
    """The reference's model on a copy of the base, with an adapter whose every tensor is random."""
    _, config, defaults = CONFIGS[kind]
    with quiet():
        model = peft.get_peft_model(copy.deepcopy(base), config(task_type=task, **{**defaults, **options}))
    return told_of_the_cache(scrambled(model).eval())


def read_by_peft(base: nn.Module, folder: Path, **kwargs: Any) -> peft.PeftModel:
    """The reference's model from files, on a copy of the base; a tensor it misses is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        return told_of_the_cache(peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder), **kwargs).eval())


def told_of_the_cache(model: Any) -> Any:
    """peft 0.21.2 looks for the cache under the name it had before transformers 5.24; here it finds it there.

    By itself, it puts its virtual tokens in at each step of `generate`, and refuses prefixes of classifiers.
    """
    for module in (model.get_base_model(), *model.get_base_model().children()):
        if "cache" in inspect.signature(module.forward).parameters:
            module.forward = _under_the_old_name(module.forward)
    prepare = getattr(model, "base_model_prepare_inputs_for_generation", None)
    if prepare is not None:
        model.base_model_prepare_inputs_for_generation = lambda *args, **kwargs: {
            "past_key_values" if name == "cache" else name: value for name, value in prepare(*args, **kwargs).items()
        }
    return model


def _under_the_old_name(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    parameters = inspect.signature(forward).parameters.values()
    renamed = [p.replace(name="past_key_values") if p.name == "cache" else p for p in parameters]
    wrapped.__signature__ = inspect.Signature(renamed)  # type: ignore[attr-defined]
    return wrapped


def written_by_peft(model: peft.PeftModel, folder: Path, **kwargs: Any) -> Path:
    with quiet():
        model.save_pretrained(str(folder), **kwargs)
    return folder


class quiet(warnings.catch_warnings):
    """The reference warns of things that are not tested here."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return tiny.main_output(model(**inputs))


def tensors(folder: Path) -> dict[str, Tensor]:
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def shapes(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, types and shapes in a file.

    Less what the reference adds to its files and does not need: the base's own embeddings, and under `bias="all"`
    second names of a copied module's bias.
    """
    added = ("base_layer.weight", ".modules_to_save.bias", ".original_module.bias")
    return {k: (t.dtype, tuple(t.shape)) for k, t in tensors(folder).items() if not k.endswith(added)}


def own_names(model: peft.PeftModel) -> dict[str, nn.Parameter]:
    """`{name in files: parameter}` of everything the reference trains."""
    named = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for mark in ("modules_to_save.default.", "default."):
                name = name.replace(f".{mark}", ".")
            named["prompt_embeddings" if name.startswith("prompt_encoder.") else name.removesuffix(".default")] = parameter
    return named


def agree(base: nn.Module, kind: str, task: str | None, inputs: dict[str, Tensor], folder: Path, **options: Any) -> None:
    """Assert that files go both ways: same names, types, shapes, outputs and trainable counts."""
    ours, theirs = ours_on(base, kind, task, **options), theirs_on(base, kind, task, **options)
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]

    ours.save_pretrained(folder / "ours")
    written_by_peft(theirs, folder / "theirs")
    assert shapes(folder / "ours") == shapes(folder / "theirs")

    for mine, reference in (
        (ours, read_by_peft(base, folder / "ours")),
        (ts.PeftModel.from_pretrained(base, folder / "theirs").eval(), theirs),
    ):
        expected, plain = output(reference, inputs), output(base, inputs)
        assert (expected[:, -plain.shape[1] :] - plain).abs().max() > 1e-3, "the adapter does nothing; this proves nothing"
        largest = max(1.0, expected.abs().max().item())  # T5's tiny untrained models make outputs of 10 and more
        torch.testing.assert_close(output(mine, inputs), expected, atol=1e-5 * largest, rtol=0)


def scrambled(model: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model
