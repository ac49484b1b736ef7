"""From a config to a plan: every pattern is resolved on the base, and every fault found, before anything changes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from ..adapter import LinearAdapter, ParameterAdapter, StoredSettings, SublayerAdapter
from ..bases import architecture
from ..bases.stored_tensors import FLOAT8
from ..bases.view import view_of, view_type
from ..config import PeftConfig, PromptConfig, Settings, TargetedConfig, TaskType
from ..errors import TargetError, Unmatched, bullet_list, did_you_mean
from ..paths import ends_with, is_inside, is_named, matches
from ..registry import adapter_type, part_type
from ..runtime import site
from . import former
from .plan_names import HEAD_NAMES, linear_paths, nearest_modules, of_layers, short_names, summary
from .plan_parameters import ParameterPlan, plan_parameters, take_attentions
from .plan_ties import plan_ties
from .plan_tokens import TokenPlan, plan_tokens

logger = logging.getLogger(__name__)
Modules = dict[str, nn.Module]  # by path


@dataclass
class Plan:
    """What an adapter will consist of, by module path; nothing is built yet.

    Args:
        adapted: settings of modules that get the method's adapter.
        biases: paths of modules whose bias is trained as a private copy.
        copied: paths of modules trained whole, as private copies.
        tokens: of embeddings with trained rows, and of modules that follow them (`plan_tokens.py`).
        parameters: `{path: {parameter: settings}}` of parameters that are adapted themselves (`plan_parameters.py`).
        stored: of modules with parameters whose values come with the adapter's file (`checkpoint/embeddings.py`).
        absent: paths of targets of which the file that is loaded holds nothing.
        unmatched: what the configuration says beyond this; no fault where an adapter is loaded whose tensors all fit.
        ties: `{path: path whose adapter or copy it follows}` of modules that hold the same weight (`plan_ties.py`).
    """

    adapted: dict[str, Settings] = field(default_factory=dict)
    biases: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    tokens: TokenPlan = field(default_factory=dict)
    parameters: ParameterPlan = field(default_factory=dict)
    stored: dict[str, StoredSettings] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    ties: dict[str, str] = field(default_factory=dict)

    def paths(self) -> set[str]:
        return {*self.adapted, *self.biases, *self.copied, *self.tokens, *self.parameters, *self.ties}


def match(
    model: nn.Module, config: PeftConfig, held: Collection[str] | None = None, current_names: bool = False
) -> tuple[Plan, PeftConfig]:
    """Resolve every pattern of `config` on `model`.

    Args:
        held: paths of modules of which the file that is loaded holds tensors, None where an adapter is made anew. A
            configuration may then say more than the file holds: the tensors decide.
        current_names: `config` is a handle's own: it names modules as they are called now, never as in transformers 4
            (`former.py`). So does a file's, once it is translated.

    Returns:
        The plan, and a copy of the config with what follows from the model filled in (its usual targets, for one).

    Raises:
        TargetError: naming every pattern and pattern key that matches nothing (with the nearest names), and every
            matched module that cannot carry the adapter.
    """
    config, modules = copy.copy(config), dict(model.named_modules())
    plan, faults, left_out = Plan(), list(_parallel_faults(model)), []
    plan.copied = _copied(modules, config, faults)
    if isinstance(config, TargetedConfig):
        left_out = _plan_targets(model, modules, config, plan, faults, current_names or held is not None)
        _keep_held(plan, held)
        faults += _unmatched_pattern_keys(modules, config, plan)
        faults += _unfit(modules, config, plan)
        plan.biases = _biases(modules, config, plan)
    plan.tokens = plan_tokens(model, modules, config, faults)
    faults += _claimed_twice(plan)
    faults += _unreachable(modules, config, plan)
    faults += _not_copyable(modules, config, plan)
    if held is not None and (plan.paths() or isinstance(config, PromptConfig)):
        plan.unmatched = [fault.partition("; ")[0] for fault in faults if isinstance(fault, Unmatched)]
        faults = [fault for fault in faults if not isinstance(fault, Unmatched)]
    if faults:
        raise TargetError(f"the adapter does not fit {type(model).__name__}:\n" + bullet_list(faults))
    if left_out:
        logger.warning("left out of this adapter:\n%s", bullet_list(left_out))
    return plan, config


def _plan_targets(
    model: nn.Module, modules: Modules, config: TargetedConfig, plan: Plan, faults: list[str], current_names: bool
) -> list[str]:
    """Which modules, parameters and biases `config` adapts; fills in its `target_modules`, and says what is left out."""
    config.resolve_targets(architecture.model_type(architecture.config_of(model)))
    chosen = config.target_modules
    left_out = [] if current_names else former.resolve(model, modules, config, faults)
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
            Unmatched(
                f'"{name}" is a target, but its modules are trained whole (modules_to_save, or the task\'s head); leave it out'
            )
            for name in twice
        ]
    plan.adapted = {path: config.settings(path) for path in config.chosen(free)}
    if getattr(config, "ensure_weight_tying", False):
        plan_ties(model, modules, config, plan, faults)
    attentions = take_attentions(modules, config, plan.adapted)
    faults += _unfit_attentions(modules, config, attentions)
    plan.parameters = plan_parameters(modules, config, faults) | attentions
    return left_out


def _keep_held(plan: Plan, held: Collection[str] | None) -> None:
    """Take out of the plan what the file does not hold; where it holds nothing of any target, the plan is what is missing."""
    kept = {path: settings for path, settings in plan.adapted.items() if held is None or path in held}
    if kept:
        plan.absent = [path for path in plan.adapted if path not in kept]
        plan.adapted = kept


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
        stored = next((p.dtype for p in modules[path].parameters() if p.dtype in FLOAT8), None)
        if stored is not None:
            yield f"{path}: it holds weights stored as {stored}, which do not train; adapt it, or load the base dequantised"


def _is_copied(path: str, plan: Plan) -> bool:
    return any(is_inside(path, copied) for copied in plan.copied)


def _parallel_faults(model: nn.Module) -> Iterator[str]:
    """Forms of parallelism under which an adapter could not be exact."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        yield f"the base is wrapped in {type(model).__name__}; adapt the bare model, then wrap the handle"
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
        linear = linear_paths(model, modules)
        config.target_modules = short_names(linear, (path for path in modules if path not in linear))
    wanted = config.target_modules or ()
    paths = [path for path in modules if path and is_named(path, wanted)]
    if isinstance(wanted, str):
        if not paths:
            faults.append(Unmatched(f'no module matches the regular expression "{wanted}"; there are {summary(modules)}'))
    else:
        for name in sorted(wanted):
            if not any(ends_with(path, name) for path in paths):
                faults.append(Unmatched(f'no module matches "{name}"; {nearest_modules(name, modules)}'))
    if config.exclude_modules:
        kept = [path for path in paths if not is_named(path, config.exclude_modules)]
        if paths and not kept:
            faults.append("exclude_modules excludes every target")
        paths = kept
    if config.layers_to_transform is not None:
        paths = of_layers(paths, config, faults)
    return paths


def _copied(modules: Modules, config: PeftConfig, faults: list[str]) -> list[str]:
    """Modules trained whole: those that `modules_to_save` names, and the task head of a classifier."""
    wanted = list(getattr(config, "modules_to_save", None) or [])
    paths: list[str] = []
    heads = config.task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)
    for name in wanted:
        found = [path for path in modules if path and path.endswith(name)]
        if not found and not (heads and name in HEAD_NAMES):  # the ecosystem's files name every usual head
            faults.append(Unmatched(f'modules_to_save: no module matches "{name}"; {nearest_modules(name, modules)}'))
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


def _unmatched_pattern_keys(modules: Modules, config: TargetedConfig, plan: Plan) -> Iterator[str]:
    attentions = [path for path in plan.parameters if isinstance(modules[path], nn.MultiheadAttention)]
    paths = [*plan.adapted, *attentions, *(f"{path}.{name}" for path, names in plan.parameters.items() for name in names)]
    for name, keys in config.pattern_keys().items():
        for key in keys:
            if not any(matches(path, key) for path in paths):
                nearby = did_you_mean(key, {path.rpartition(".")[2] for path in paths})
                yield Unmatched(f'{name} key "{key}" matches no target{nearby}')


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
            reason = _router_fault(module) or view.storage_fault() or adapter.fault(view, config, settings)
        if reason:
            yield f"{path}: {reason}"
    for name, paths in by_type.items():
        others = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
        yield (
            f"{paths[0]}{others} is a {name}, which cannot carry {adapter.__name__}; "
            "name Linear, Conv1D, Embedding or convolution modules"
        )


def _router_fault(module: nn.Module) -> str | None:
    """A router that is a linear module by class answers scores and choices, to which no change can be added."""
    return "it is a router, which answers more than a product; leave it out" if architecture.is_router(module) else None


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
