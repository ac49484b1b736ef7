"""Which parameters a configuration adapts where no module computes with them alone (`target_parameters`)."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..bases.stored_tensors import FLOAT8, shape_of
from ..config import Settings
from ..errors import Unmatched, did_you_mean
from ..paths import ends_with

ATTENTION_WEIGHTS = ("in_proj_weight", "out_proj.weight")  # as the ecosystem's files adapt them
ParameterPlan = dict[str, dict[str, Settings]]  # {module path: {parameter: settings}}


def plan_parameters(modules: dict[str, nn.Module], config: Any, faults: list[str]) -> ParameterPlan:
    """Resolve the endings in `target_parameters`; of one module, parameters come in the module's order."""
    wanted = getattr(config, "target_parameters", None) or []
    if not wanted:
        return {}
    plan: ParameterPlan = {}
    found = set()
    known = set()
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            full = f"{path}.{name}" if path else name
            known.add(".".join(full.split(".")[-2:]))
            names = {ending for ending in wanted if ends_with(full, ending)}
            if parameter is None or not names:
                continue
            found |= names
            plan.setdefault(path, {})[name] = config.settings(full)
            reason = _fault(path, parameter)
            if reason:
                faults.append(f"target_parameters: {full} {reason}")
    for ending in sorted(set(wanted) - found):
        faults.append(Unmatched(f'target_parameters: no parameter matches "{ending}"{did_you_mean(ending, known)}'))
    return plan


def take_attentions(modules: dict[str, nn.Module], config: Any, adapted: dict[str, Settings]) -> ParameterPlan:
    """Move each `nn.MultiheadAttention` from the targets to the parameters: no module computes with its weights alone."""
    if not hasattr(config, "target_parameters"):
        return {}
    paths = [path for path in adapted if isinstance(modules[path], nn.MultiheadAttention)]
    return {path: dict.fromkeys(ATTENTION_WEIGHTS, adapted.pop(path)) for path in paths}


def _fault(path: str, parameter: nn.Parameter) -> str | None:
    if not path:
        return "belongs to the model itself rather than to a module inside it; move it into a submodule"
    if len(shape_of(parameter)) not in (2, 3):
        return f"has the shape {tuple(shape_of(parameter))}; only matrices and stacks of them (experts) can be adapted"
    if not parameter.is_floating_point() or parameter.dtype in FLOAT8:
        return f"is stored as {parameter.dtype}, which cannot be adapted"
    return None
