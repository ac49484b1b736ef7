"""EVA's init for an adapter that has been made: a pass over data, then new ranks and a new A (`inits/eva.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..attach.build import build, replace_stored, stored_in
from ..bases.view import view_of
from ..errors import UsageError, bullet_list
from ..inits.eva import StreamingSvd, share_out
from ..methods.lora import Lora
from ..methods.lora_config import LoraConfig
from ..model import PeftModel


def call_with_names(model: Any, inputs: dict[str, Any]) -> Any:
    return model(**inputs)


def tokens_that_count(inputs: dict[str, Any], config: LoraConfig) -> Tensor | None:
    """`(rows, tokens)`: which tokens are not padding and (with `use_label_mask`) part of the loss; None where all are."""
    eva: Any = config.eva_config
    mask, labels = inputs.get("attention_mask"), inputs.get("labels")
    mask = mask.bool() if isinstance(mask, Tensor) else None
    if not eva.use_label_mask or labels is None or (mask is not None and labels.shape != mask.shape):
        return mask
    counted: Tensor = labels != eva.label_mask_value
    return counted if mask is None else mask & counted


def rows_that_count(layer_input: Tensor, mask: Tensor | None, path: str) -> Tensor:
    """`(rows, in)` of a module's input; modules that see anything but the masked tokens give all their rows."""
    if mask is not None and layer_input.shape[:-1] == mask.shape:
        return layer_input[mask.to(layer_input.device)]
    return layer_input.reshape(-1, layer_input.shape[-1])


def initialize_lora_eva_weights(
    model: PeftModel,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: dict[str, Tensor] | None = None,
    forward_fn: Callable[[Any, Any], Any] = call_with_names,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = tokens_that_count,
    prepare_layer_inputs_fn: Callable[[Tensor, Any, str], Tensor] = rows_that_count,
    adapter_name: str = "default",
    show_progress_bar: bool = True,
) -> None:
    """Initialise an adapter made with `init_lora_weights="eva"` from data; its old values are lost.

    Modules whose inputs explain little lose their adapter, others get more rank; `rank_pattern`, `alpha_pattern` and
    `target_modules` of the handle's configuration say which. Make the optimiser afterwards.

    Args:
        dataloader: batches; they are read until every direction has converged (`EvaConfig.tau`) or they end.
        eva_state_dict: the result of `get_eva_state_dict`, in place of a dataloader.
        forward_fn: how a batch runs: `forward_fn(model, batch)`.
        prepare_model_inputs_fn: turns `(batch, config)` into what the next function gets; None passes the batch itself.
        prepare_layer_inputs_fn: turns `(a module's input, that, module path)` into the rows `(rows, in)` to decompose.

    Raises:
        UsageError: the adapter has another init or is merged, or no module got an input.
    """
    config = _eva_config(model, adapter_name)
    if eva_state_dict is None:
        if dataloader is None:
            raise UsageError("initialize_lora_eva_weights needs a dataloader (or the eva_state_dict of an earlier call)")
        eva_state_dict = get_eva_state_dict(
            model, dataloader, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name, show_progress_bar
        )
    unknown = sorted(set(eva_state_dict) - {path for path, _ in model.tree(adapter_name).items()})
    if unknown:
        raise UsageError("eva_state_dict names modules that carry no adapter here:\n" + bullet_list(unknown))
    ranks = {path: len(directions) for path, directions in eva_state_dict.items()}
    plan, new = model.plan_adapter(_with_ranks(config, model, adapter_name, ranks), current_names=True)
    full_precision = any(parameter.dtype == torch.float32 for parameter in model.tree(adapter_name).parameters())
    tree = build(model.bare_base, new, plan, full_precision=full_precision, initialise=True)
    with torch.no_grad():
        for path, directions in eva_state_dict.items():
            if len(directions):
                tree.node(path)._modules["_adapter"].lora_A.copy_(directions)  # type: ignore[union-attr, operator]
    replace_stored(tree, stored_in(model.tree(adapter_name)))
    model.take_adapter(adapter_name, new, tree)


@torch.no_grad()
def get_eva_state_dict(
    model: PeftModel,
    dataloader: Iterable[Any],
    forward_fn: Callable[[Any, Any], Any] = call_with_names,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = tokens_that_count,
    prepare_layer_inputs_fn: Callable[[Tensor, Any, str], Tensor] = rows_that_count,
    adapter_name: str = "default",
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """`{module path: A}`, each A `(rank, in)` with the module's new rank; arguments as above."""
    config = _eva_config(model, adapter_name)
    eva: Any = config.eva_config
    inputs = _LayerInputs(model, config, adapter_name, prepare_layer_inputs_fn)
    was_training = model.training
    model.eval()
    try:
        for batch in tqdm(dataloader, desc="EVA", disable=not show_progress_bar):
            batch = _on_device(batch, next(model.bare_base.parameters()).device)
            inputs.batch = batch if prepare_model_inputs_fn is None else prepare_model_inputs_fn(batch, config)
            with model.disable_adapter():
                forward_fn(model, batch)
            if inputs.all_settled(eva.tau):
                break
    finally:
        inputs.remove()
        model.train(was_training)
    if not inputs.parts:
        raise UsageError("EVA saw no inputs: the dataloader is empty, or no adapted linear module ran")
    return inputs.directions(eva.whiten)


class _LayerInputs:
    """Decomposes the inputs of one adapter's linear modules; modules with the very same input share one decomposition."""

    def __init__(self, model: PeftModel, config: LoraConfig, name: str, rows_of: Callable[[Tensor, Any, str], Tensor]) -> None:
        self.rows_of = rows_of
        self.batch: Any = None
        self.limits: dict[str, int] = {}  # the rank each module may grow to
        self.budget = 0
        self.parts: dict[str, StreamingSvd] = {}
        self.alike: dict[str, str] = {}  # {module: the first module that got the same input}
        self.seen: list[tuple[Tensor, str]] = []
        self.hooks = []
        self.settled: set[str] = set()
        eva: Any = config.eva_config
        for path in _lora_paths(model, name):
            module = model.bare_base.get_submodule(path)
            if view_of(module).is_matrix:
                r, inner = config.settings(path).r, view_of(module).shape[1]
                self.budget += r
                self.limits[path] = min(round(r * eva.rho), inner)
                self.hooks.append(module.register_forward_pre_hook(self._hook(path)))

    def _hook(self, path: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def hook(_: Any, args: tuple[Any, ...]) -> None:
            if path not in self.alike:
                self.alike[path] = next((first for tensor, first in self.seen if tensor is args[0]), path)
                self.seen.append((args[0], path))
            if self.alike[path] != path or path in self.settled:
                return
            rows = self.rows_of(args[0], self.batch, path)
            if len(rows):
                self.parts.setdefault(path, StreamingSvd(max(self.limits.values()))).add(rows)

        return hook

    def ranks(self) -> dict[str, int]:
        shares = {path: self.parts[first] for path, first in self.alike.items() if first in self.parts}
        return share_out({path: part.explained()[: self.limits[path]] for path, part in shares.items()}, self.budget)

    def all_settled(self, tau: float) -> bool:
        """Whether the directions of every module, as many as its present rank, stayed the same in the last batch."""
        self.seen, self.settled, ranks = [], set(), self.ranks()
        for path, part in self.parts.items():
            asked = max(rank for other, rank in ranks.items() if self.alike[other] == path)
            if part.converged(asked, tau):
                self.settled.add(path)
        return bool(self.parts) and len(self.settled) == len(self.parts)

    def directions(self, whiten: bool) -> dict[str, Tensor]:
        found = {}
        for path, rank in self.ranks().items():
            part: Any = self.parts[self.alike[path]]
            rows = part.directions[:rank]
            found[path] = rows / part.sizes[:rank, None].sqrt() if whiten else rows.clone()
        return found

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _with_ranks(config: LoraConfig, model: PeftModel, name: str, ranks: dict[str, int]) -> LoraConfig:
    """`config` with these ranks; modules of rank 0 are no longer targets."""
    eva: Any = config.eva_config
    paths = _lora_paths(model, name)
    kept = [path for path in paths if ranks.get(path) != 0]
    changed: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
    for path in kept:
        settings = config.settings(path)
        old, rank = settings.r, ranks.get(path, settings.r)
        steady = rank if eva.adjust_scaling_factors else old  # the scale is alpha over this
        alpha = settings.scale * (math.sqrt(steady) if config.use_rslora else steady)
        if rank != config.r:
            changed["rank_pattern"][path] = rank
        if not math.isclose(alpha, config.lora_alpha):
            changed["alpha_pattern"][path] = alpha
    if len(kept) < len(paths):
        changed["target_modules"] = kept
    return type(config)(**{**vars(config), **changed})


def _lora_paths(model: PeftModel, name: str) -> list[str]:
    return sorted(path for path, adapter in model.tree(name).items() if isinstance(adapter, Lora))


def _eva_config(model: PeftModel, name: str) -> LoraConfig:
    if not isinstance(model, PeftModel):
        raise UsageError(f"EVA initialises an adapter of a handle (get_peft_model), got {type(model).__name__}")
    model.require_adapter(name)
    config = model.peft_config[name]
    if not isinstance(config, LoraConfig) or config.init_lora_weights != "eva":
        raise UsageError(f'the adapter "{name}" was not made with LoraConfig(init_lora_weights="eva")')
    if model.merged_adapters:
        raise UsageError("adapters are merged into the weights; call unmerge_adapter() first")
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise UsageError(
            "EVA uses the data of one process; initialise and save the adapter in one process, then load it in all"
        )
    return config


def _on_device(batch: Any, device: torch.device) -> Any:
    if hasattr(batch, "to"):
        return batch.to(device)
    return {key: _on_device(value, device) for key, value in batch.items()} if isinstance(batch, dict) else batch
