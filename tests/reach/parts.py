"""What a handle's own call computes in one module of its base: what any other way to that module must compute, too."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from tests.reach.methods import OFF, UNMERGEABLE, handle_and_base
from tests.reach.models import FAMILIES
from tests.reach.ways import tensors_of, weighted_sum
from tunesmith import PeftModel

EXACT = {"rtol": 1e-9, "atol": 1e-10}  # float64; what is merged adds its terms in another order


@dataclass
class Case:
    """One method on one family.

    Args:
        handle: in evaluation mode between tests.
        base: the bare base, as the user holds it.
        merged: an independent model with the merged weights, None if the method cannot be merged.
        inputs: of the base's forward.
        plain: the bare base's result.
    """

    handle: PeftModel
    base: nn.Module
    merged: nn.Module | None
    inputs: dict[str, Tensor]
    plain: list[Tensor]

    @property
    def models(self) -> list[nn.Module]:
        return [self.handle] if self.merged is None else [self.handle, self.merged]

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.handle.adapters.named_parameters() if p.requires_grad}

    def assert_bare(self) -> None:
        """The base that the user holds computes what it did before there was a handle."""
        with torch.no_grad():
            found = tensors_of(self.base.eval()(**self.inputs))
        assert all(torch.equal(a, b) for a, b in zip(found, self.plain, strict=True)), "the bare base no longer runs bare"


@functools.lru_cache(maxsize=4)  # tests of one method and family follow each other
def case_of(method: str, family: str) -> Case:
    handle, base = handle_and_base(method, family)
    inputs = FAMILIES[family].inputs()
    with torch.no_grad():
        plain = [tensor.clone() for tensor in tensors_of(base(**inputs))]
    merged = None if method in UNMERGEABLE else copy.deepcopy(base) if method == OFF else handle.merge_and_unload(copy=True)
    return Case(handle, base, merged if merged is None else merged.eval(), inputs, plain)


@dataclass
class Call:
    """A module's first call within a handle's own: its inputs, result and the gradients of its adapters by that result."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: list[Tensor]
    gradients: dict[str, Tensor | None]

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of their own, because caches are written into."""
        return copy.deepcopy((self.args, self.kwargs))


def called_paths(case: Case) -> list[str]:
    """Paths of the base's modules that its forward calls and that hold adapters (or parameters, if no module has adapters).

    Without those that are given a cache: they would write into it again.
    """
    seen: list[str] = []

    def note(path: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        if not any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            seen.append(path)

    hooks = [
        module.register_forward_pre_hook(functools.partial(note, path), with_kwargs=True)
        for path, module in case.base.named_modules()
        if path and next(module.parameters(), None) is not None
    ]
    try:
        with torch.no_grad():
            case.handle(**case.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    adapted = {path for name in case.handle.peft_config for path, _ in case.handle.tree(name).items()}
    return sorted({path for path in seen if any(f"{other}.".startswith(f"{path}.") for other in adapted)} or set(seen))


def call_within(case: Case, path: str) -> Call:
    """Run the handle and watch the module: hooks on the bare base see what happens inside its forward."""
    module, found = case.base.get_submodule(path), []

    def detach(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if found:
            return None
        args, kwargs = _detached((args, kwargs))
        found.append(copy.deepcopy((args, kwargs)))
        return args, kwargs

    def keep(_: nn.Module, args: Any, result: Any) -> None:
        if len(found) == 1:
            found.append(result)

    hooks = [module.register_forward_pre_hook(detach, with_kwargs=True), module.register_forward_hook(keep)]
    try:
        case.handle(**case.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    (args, kwargs), result = found
    return Call(args, kwargs, [t.detach() for t in tensors_of(result)], gradients_of(case, result))


def gradients_of(case: Case, result: Any) -> dict[str, Tensor | None]:
    """Of a weighted sum of the result, by the adapters' parameters."""
    parameters, total = case.parameters(), weighted_sum(result)
    if not isinstance(total, Tensor) or not total.requires_grad:
        return dict.fromkeys(parameters)
    case.handle.zero_grad()
    try:
        total.backward()  # torch.autograd.grad passes reentrant checkpoints by
    except RuntimeError as error:
        if "none of output has requires_grad" not in str(error):  # a reentrant checkpoint around what has no adapter
            raise
    found = {name: parameter.grad for name, parameter in parameters.items()}
    case.handle.zero_grad()
    return found


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {name: _detached(item) for name, item in value.items()}
    return type(value)(_detached(item) for item in value) if type(value) in (tuple, list) else value


def assert_same(found: Any, expected: Any, told: str) -> None:
    found, expected = tensors_of(found), tensors_of(expected)
    assert len(found) == len(expected), told
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.detach(), b.detach(), **EXACT, msg=lambda text: f"{told}: {text}")


def assert_same_gradients(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], told: str) -> None:
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None, f"{told}: {name} has a gradient"
            continue
        assert found[name] is not None, f"{told}: {name} has no gradient"
        scale = {"rtol": EXACT["rtol"], "atol": EXACT["atol"] * max(1.0, gradient.abs().max().item())}
        torch.testing.assert_close(found[name], gradient, **scale, msg=lambda text, name=name: f"{told}: {name}: {text}")


def slope_of_merged(case: Case, use: Callable[[nn.Module], Any], step: float = 1e-5) -> tuple[float, dict[str, Tensor]]:
    """How a weighted sum of what the merged model gives changes as the adapters move along a random direction.

    The merged model's own gradients, times the central difference of its weights, which are smooth functions of the adapters
    (differences through the whole model err: its norms compute in fp32, and are steep).
    """
    generator = torch.Generator().manual_seed(5)
    parameters = case.parameters()
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in parameters.items()}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    weights = []
    with torch.no_grad():
        for sign in (1, -1):
            for name, parameter in parameters.items():
                parameter.copy_(before[name] + sign * step * direction[name])
            weights.append(dict(case.handle.merge_and_unload(copy=True).named_parameters()))
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
    merged = case.handle.merge_and_unload(copy=True).train(case.handle.training).requires_grad_(True)
    merged.zero_grad()
    total = weighted_sum(use(merged))
    if not isinstance(total, Tensor) or not total.requires_grad:
        return 0.0, direction
    total.backward()
    upper, lower = weights
    found = {name: p.grad for name, p in merged.named_parameters() if p.grad is not None}
    return sum(float((found[name] * (upper[name] - lower[name])).sum()) for name in found) / (2 * step), direction


def slope(gradients: dict[str, Tensor | None], direction: dict[str, Tensor]) -> float:
    return sum(float((gradient * direction[name]).sum()) for name, gradient in gradients.items() if gradient is not None)
