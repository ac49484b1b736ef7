"""From a config to a plan: every pattern is resolved on the base, and every fault found, before anything changes."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..adapter import LinearAdapter, ParameterAdapter, SublayerAdapter
from ..bases import architecture
from ..bases.dense import LinearView
from ..bases.view import view_of, view_type
from ..config import PeftConfig, PromptConfig, Settings, TargetedConfig, TaskType
from ..errors import ConfigError, TargetError, bullet_list, did_you_mean, nearest
from ..paths import ends_with, is_inside, is_named, matches
from ..registry import adapter_type, part_type
from ..runtime import site
from .plan_parameters import ParameterPlan, plan_parameters, take_attentions
from .plan_tokens import TokenPlan, plan_tokens

Modules = dict[str, nn.Module]  # by path
HEAD_NAMES = ("classifier", "score", "qa_outputs")  # task heads that transformers initialises at random


@dataclass
class Plan:
    """What an adapter will consist of, by module path; nothing is built yet.

    Args:
        adapted: settings of modules that get the method's adapter.
        biases: paths of modules whose bias is trained as a private copy.
        copied: paths of modules trained whole, as private copies.
        tokens: of embeddings with trained rows, and of modules that follow them (`plan_tokens.py`).
        parameters: `{path: {parameter: settings}}` of parameters that are adapted themselves (`plan_parameters.py`).
    """

    adapted: dict[str, Settings] = field(default_factory=dict)
    biases: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    tokens: TokenPlan = field(default_factory=dict)
    parameters: ParameterPlan = field(default_factory=dict)

    def paths(self) -> set[str]:
        return {*self.adapted, *self.biases, *self.copied, *self.tokens, *self.parameters}


def match(model: nn.Module, config: PeftConfig) -> tuple[Plan, PeftConfig]:
    """Resolve every pattern of `config` on `model`.

    Returns:
        The plan, and a copy of the config with what follows from the model filled in (its usual targets, for one).

    Raises:
        TargetError: naming every pattern and pattern key that matches nothing (with the nearest names), and every
            matched module that cannot carry the adapter.
    """
    config, modules = copy.copy(config), dict(model.named_modules())
    plan, faults = Plan(), list(_parallel_faults(model))
    plan.copied = _copied(modules, config, faults)
    if isinstance(config, TargetedConfig):
        _plan_targets(model, modules, config, plan, faults)
    plan.tokens = plan_tokens(model, modules, getattr(config, "trainable_token_indices", None), faults)
    faults += _claimed_twice(plan)
    faults += _unreachable(modules, config, plan)
    faults += _not_copyable(modules, config, plan)
    if faults:
        raise TargetError(f"the adapter does not fit {type(model).__name__}:\n" + bullet_list(faults))
    return plan, config


def _plan_targets(model: nn.Module, modules: Modules, config: TargetedConfig, plan: Plan, faults: list[str]) -> None:
    """Which modules, parameters and biases `config` adapts; fills in its `target_modules`."""
    config.resolve_targets(architecture.model_type(architecture.config_of(model)))
    chosen = config.target_modules
    if chosen is None:
        config.target_modules = adapter_type(config).usual_targets(modules)
        if not config.target_modules:
            faults.append(f"{config.method} finds nothing to train here; name target_modules, or choose another method")
    paths = _matched(model, modules, config, faults)
    free = [path for path in paths if not _is_copied(path, plan)]
    twice = _trained_twice(config, paths, free)
    if chosen in (None, "all-linear"):
        config.target_modules = set(config.target_modules or ()) - set(twice)
    else:
        faults += [
            f'"{name}" is a target, but its modules are trained whole (modules_to_save, or the task\'s head); leave it out'
            for name in twice
        ]
    plan.adapted = {path: config.settings(path) for path in config.chosen(free)}
    attentions = take_attentions(modules, config, plan.adapted)
    faults += _unfit_attentions(modules, config, attentions)
    plan.parameters = plan_parameters(modules, config, faults) | attentions
    parameters = [f"{path}.{name}" for path, names in plan.parameters.items() for name in names]
    faults += _unmatched_pattern_keys(config, [*plan.adapted, *attentions, *parameters])
    faults += _unfit(modules, config, plan)
    plan.biases = _biases(modules, config, plan)


def _claimed_twice(plan: Plan) -> Iterator[str]:
    """Modules whose tokens or parameters train, and that something else of the adapter changes, too."""
    for path in plan.tokens:
        if path in plan.adapted or _is_copied(path, plan):
            yield f"{path}: some of its tokens are trained (trainable_token_indices), so it cannot be a target or saved whole"
    for path in plan.parameters:
        if path in plan.adapted or path in plan.tokens or _is_copied(path, plan):
            yield f"{path}: its parameters are adapted (target_parameters), so it cannot be a target or saved whole"


def _unreachable(modules: Modules, config: PeftConfig, plan: Plan) -> Iterator[str]:
    """Modules whose call an adapter cannot see."""
    beside = isinstance(config, TargetedConfig) and issubclass(adapter_type(config), SublayerAdapter)
    for path in sorted(plan.paths()):
        reason = site.fault(modules[path]) or (_fused_fault(modules, path) if beside and path in plan.adapted else None)
        if reason:
            yield f"{path}: {reason}"


def _not_copyable(modules: Modules, config: PeftConfig, plan: Plan) -> Iterator[str]:
    """Modules whose values are elsewhere, although the adapter starts from a copy of them."""
    private = plan.adapted if isinstance(config, TargetedConfig) and issubclass(adapter_type(config), ParameterAdapter) else ()
    for path in (*plan.biases, *plan.copied, *private):
        if _is_offloaded(modules[path]):
            yield f"{path}: it is offloaded, so no trainable copy of it can be made; keep it on a device"


def _is_copied(path: str, plan: Plan) -> bool:
    return any(is_inside(path, copied) for copied in plan.copied)


_HEADS = {
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
}


def check_config(config: Any) -> None:
    if not isinstance(config, PeftConfig):
        raise ConfigError(f"peft_config must be a configuration such as LoraConfig(...), got {type(config).__name__}")


def check_task(model: Any, config: PeftConfig) -> None:
    """Refuse a task that the model cannot do, before anything is built."""
    task = config.task_type
    assert task is None or isinstance(task, TaskType), "a config turns a name into a TaskType"
    name = type(model).__name__
    base = architecture.config_of(model)
    encoder_decoder = architecture.is_encoder_decoder(base)
    if task == TaskType.SEQ_2_SEQ_LM and architecture.is_decoder_only(base):
        raise ConfigError(f"task_type=SEQ_2_SEQ_LM needs an encoder-decoder, {name} has none; use CAUSAL_LM")
    if task == TaskType.CAUSAL_LM and encoder_decoder and hasattr(model, "get_encoder"):
        raise ConfigError(f"task_type=CAUSAL_LM needs a decoder-only model, {name} has an encoder; use SEQ_2_SEQ_LM")
    if task in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM) and base is not None and not hasattr(model, "generate"):
        raise ConfigError(f"task_type={task.value} needs a model that generates, {name} does not; load it with its LM head")
    if task in _HEADS and architecture.output_head(model) is not None:
        raise ConfigError(
            f"task_type={task.value} needs a model with a task head, {name} has a language model's; load it with {_HEADS[task]}"
        )
    if isinstance(config, PromptConfig):
        if task is None:
            raise ConfigError(
                "virtual tokens need a task_type, which says how labels are aligned, e.g. task_type=TaskType.CAUSAL_LM"
            )
        if not hasattr(model, "get_input_embeddings"):
            raise ConfigError(f"virtual tokens need a model with input embeddings, {name} has none")


def _parallel_faults(model: nn.Module) -> Iterator[str]:
    """Forms of parallelism under which an adapter could not be exact."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        yield f"the base is wrapped in {type(model).__name__}; adapt the bare model, then wrap the result (never DataParallel)"
    if (getattr(model, "_tp_size", None) or 1) > 1:
        yield "the base's weights are split by tensor parallelism; load it without tp_plan"


def _fused_fault(modules: Modules, path: str) -> str | None:
    """torch's encoder layer, in eval mode without gradients, reads its children's weights, which tell of no such adapter."""
    parents = [path.rsplit(".", i)[0] for i in range(1, path.count(".") + 1)] + [""]
    if torch.backends.mha.get_fastpath_enabled() and any(isinstance(modules[p], nn.TransformerEncoderLayer) for p in parents):
        return "its fast inference path would bypass the adapter; call torch.backends.mha.set_fastpath_enabled(False) first"
    return None


def _is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the module's values elsewhere and puts them in place for the call."""
    on_meta = any(p.device.type == "meta" for p in module.parameters())
    return on_meta and any(hasattr(m, "_hf_hook") for m in module.modules())


def _matched(model: nn.Module, modules: Modules, config: TargetedConfig, faults: list[str]) -> list[str]:
    """Paths that `target_modules` names, less the excluded ones and those of other layers."""
    if config.target_modules == "all-linear":
        config.target_modules = set(_all_linear(model, modules))
    wanted = config.target_modules or ()
    paths = [path for path in modules if path and is_named(path, wanted)]
    if isinstance(wanted, str):
        if not paths:
            faults.append(f'no module matches the regular expression "{wanted}"; there are {_summary(modules)}')
    else:
        for name in sorted(wanted):
            if not any(ends_with(path, name) for path in paths):
                faults.append(f'no module matches "{name}"; {_nearest_modules(name, modules)}')
    if config.exclude_modules:
        kept = [path for path in paths if not is_named(path, config.exclude_modules)]
        if paths and not kept:
            faults.append("exclude_modules excludes every target")
        paths = kept
    if config.layers_to_transform is not None:
        paths = _of_layers(paths, config, faults)
    return paths


def _all_linear(model: Any, modules: Modules) -> Iterator[str]:
    """The shortest endings that name every linear module except the output head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = {p for p, m in modules.items() if p and m is not head and issubclass(view_type(m) or object, LinearView)}
    linear = {path for path in linear if path.rpartition(".")[2] not in HEAD_NAMES}
    ambiguous = {ending for path in modules if path not in linear for ending in _endings(path)}
    for path in linear:
        yield next((ending for ending in _endings(path) if ending not in ambiguous), path)


def _endings(path: str) -> list[str]:
    """Every ending of `path` at a dot, the shortest first."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


def _of_layers(paths: list[str], config: TargetedConfig, faults: list[str]) -> list[str]:
    wanted = config.layers_to_transform
    indices = {wanted} if isinstance(wanted, int) else set(wanted or [])
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    finder = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, patterns))})\.(\d+)\." if patterns else r".*?\.(\d+)\."
    found = {path: int(hit[1]) for path in paths if (hit := re.match(finder, path))}
    missing = indices - set(found.values())
    if missing:
        present = sorted(set(found.values()))
        faults.append(
            f"layers_to_transform: no target in layer {', '.join(map(str, sorted(missing)))}; "
            + (f"layers with targets: {present[0]} to {present[-1]}" if present else "the targets are not in numbered layers")
        )
    return [path for path in paths if found.get(path) in indices]


def _copied(modules: Modules, config: PeftConfig, faults: list[str]) -> list[str]:
    """Modules trained whole: those that `modules_to_save` names, and the task head of a classifier."""
    wanted = list(getattr(config, "modules_to_save", None) or [])
    paths: list[str] = []
    heads = config.task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)
    for name in wanted:
        found = [path for path in modules if path and path.endswith(name)]
        if not found and not (heads and name in HEAD_NAMES):  # the ecosystem's files name every usual head
            faults.append(f'modules_to_save: no module matches "{name}"; {_nearest_modules(name, modules)}')
        paths += found
    if heads:
        paths += [path for path in modules if path in HEAD_NAMES]
    return [path for path in dict.fromkeys(paths) if not any(is_inside(path, other) for other in paths if other != path)]


def _trained_twice(config: TargetedConfig, paths: list[str], free: list[str]) -> list[str]:
    """Targets all of whose modules are trained whole, so that they would get no adapter."""
    wanted = config.target_modules or ()
    if isinstance(wanted, str):
        return [wanted] if paths and not free else []
    by_name = {name: [path for path in paths if ends_with(path, name)] for name in sorted(wanted)}
    return [name for name, named in by_name.items() if named and not set(named) & set(free)]


def _unmatched_pattern_keys(config: TargetedConfig, paths: list[str]) -> Iterator[str]:
    for name, keys in config.pattern_keys().items():
        for key in keys:
            if not any(matches(path, key) for path in paths):
                yield f'{name} key "{key}" matches no target{did_you_mean(key, {p.rpartition(".")[2] for p in paths})}'


def _unfit(modules: Modules, config: TargetedConfig, plan: Plan) -> Iterator[str]:
    """Matched modules that cannot carry the adapter, grouped by type."""
    adapter = adapter_type(config)
    by_type: dict[str, list[str]] = {}
    for path, settings in plan.adapted.items():
        module = modules[path]
        if not issubclass(adapter, LinearAdapter):
            reason = adapter.fault(module, config, settings)
        elif view_type(module) is None:
            by_type.setdefault(type(module).__name__, []).append(path)
            continue
        else:
            view = view_of(module)
            reason = view.storage_fault() or adapter.fault(view, config, settings)
        if reason:
            yield f"{path}: {reason}"
    for name, paths in by_type.items():
        others = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
        yield (
            f"{paths[0]}{others} is a {name}, which cannot carry {adapter.__name__}; "
            "name Linear, Conv1D, Embedding or convolution modules"
        )


def _unfit_attentions(modules: Modules, config: TargetedConfig, attentions: ParameterPlan) -> Iterator[str]:
    for path, settings in attentions.items():
        reason = part_type("_parameters_changed").fault(modules[path], config, settings)
        if reason:
            yield f"{path}: {reason}"


def _biases(modules: Modules, config: TargetedConfig, plan: Plan) -> list[str]:
    which = getattr(config, "bias", "none")
    if which == "none":
        return []
    paths = modules if which == "all" else plan.adapted  # "lora_only", "vera_only", ...
    return [path for path in paths if modules[path]._parameters.get("bias") is not None and not _is_copied(path, plan)]


def _nearest_modules(name: str, modules: Modules) -> str:
    """`nearest: "q_proj" (32 modules), "k_proj" (32 modules)`."""
    counts: dict[str, int] = {}
    for path, module in modules.items():
        if path and view_type(module) is not None:
            leaf = path.rpartition(".")[2]
            counts[leaf] = counts.get(leaf, 0) + 1
    close = nearest(name.rpartition(".")[2], counts)
    if close:
        return "nearest: " + ", ".join(f'"{leaf}" ({counts[leaf]} modules)' for leaf in close)
    return f"there are {_summary(modules)}"


def _summary(modules: Modules) -> str:
    leaves = dict.fromkeys(path.rpartition(".")[2] for path, module in modules.items() if path and view_type(module))
    return ", ".join(f'"{leaf}"' for leaf in list(leaves)[:12]) or "no modules that can carry an adapter"
