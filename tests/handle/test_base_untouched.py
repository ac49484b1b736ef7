"""Nothing that is done with a handle, or written to what it leads to, is left on the base that the user holds.

What is written through a handle is the handle's own, or refused with a `UsageError`. Neither the bare base's own calls nor
anything that can be read from it show it, while the handle lives and after it has gone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tests.handles import lora
from tunesmith import PeftModel, UsageError
from tunesmith.runtime.site import site_of


class WithBatchNorm(nn.Module):
    """Dropout, batch norm, a buffer of its own and an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.dropout = nn.Dropout(0.25)
        self.register_buffer("scale", torch.full((3,), 2.0))
        self.temperature = 1.5

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(torch.tanh(self.norm(self.first(x))))) * self.scale / self.temperature


def _gpt2() -> nn.Module:
    return tiny.make("gpt2")


BASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], dict[str, Any]]] = {
    "batch norm": (WithBatchNorm, lambda: {"x": torch.randn(5, 6)}, {"target_modules": ["first", "last"]}),
    "gpt2": (_gpt2, lambda: tiny.inputs_for("gpt2"), {}),
    "llama": (lambda: tiny.make("llama"), lambda: tiny.inputs_for("llama"), {}),
    "bert": (
        lambda: tiny.make("bert-classifier"), lambda: tiny.inputs_for("bert-classifier"), {"task_type": "SEQ_CLS"},
    ),
}  # fmt: skip
OF_TRANSFORMERS = ["gpt2", "llama", "bert"]
HOOKS = [
    name
    for name in vars(nn.Module())
    if name.endswith("_hooks") or name.endswith(("_hooks_with_kwargs", "_hooks_always_called"))
]


class Seen:
    """Everything that a user can read of a base.

    Args:
        while_used: leave out what a handle may change as long as it lives: sites, and which parameters are frozen.
    """

    def __init__(self, base: nn.Module, while_used: bool = False) -> None:
        modules = dict(base.named_modules())
        parameters = dict(base.named_parameters(remove_duplicate=False))
        self.facts: dict[str, Any] = {
            "modules": {path: (id(module), type(module)) for path, module in modules.items()},
            "modes": {path: module.training for path, module in modules.items()},
            "hooks": {path: [len(getattr(module, name)) for name in HOOKS] for path, module in modules.items()},
            "plain values": {path: _plain_values(module) for path, module in modules.items()},
            "parameters": {name: (id(p), p.dtype, p.device) for name, p in parameters.items()},
            "gradients": {name: p.grad is None for name, p in parameters.items()},
            "config": _settings(base, "config"),
            "generation_config": _settings(base, "generation_config"),
        }
        if not while_used:
            self.facts["names of attributes"] = {path: sorted(vars(module)) for path, module in modules.items()}
            self.facts["sites"] = {path: site_of(module) is not None for path, module in modules.items()}
            self.facts["requires_grad"] = {name: p.requires_grad for name, p in parameters.items()}
        self.tensors = {name: value.detach().clone() for name, value in base.state_dict(keep_vars=True).items()}
        self.while_used = while_used

    def assert_still(self, base: nn.Module) -> None:
        now = Seen(base, self.while_used)
        for kind, before in self.facts.items():
            assert now.facts[kind] == before, f"{kind} of the base: {_differences(before, now.facts[kind])}"
        assert now.tensors.keys() == self.tensors.keys()
        for name, value in self.tensors.items():
            assert torch.equal(now.tensors[name], value), f"{name} of the base has other values"


def _plain_values(module: nn.Module) -> dict[str, Any]:
    kinds = (bool, int, float, str, type(None))
    return {name: value for name, value in vars(module).items() if isinstance(value, kinds) and name != "training"}


def _settings(base: nn.Module, name: str) -> Any:
    settings = getattr(base, name, None)
    return None if settings is None else copy.deepcopy(settings.to_dict())


def _differences(before: Any, now: Any) -> Any:
    if not isinstance(before, dict) or not isinstance(now, dict):
        return before, now
    return {key: (before.get(key), now.get(key)) for key in before.keys() | now.keys() if before.get(key) != now.get(key)}


# --- what is done ---------------------------------------------------------------------------------------------------


def _train(handle: PeftModel, inputs: dict[str, Tensor]) -> None:
    handle.train()
    optimizer = torch.optim.SGD([p for p in handle.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        _sum(handle(**inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()


def _sum(result: Any) -> Tensor:
    return (result if isinstance(result, Tensor) else tiny.main_output(result)).square().sum()


def _train_then_evaluate(handle: PeftModel, inputs: dict[str, Tensor]) -> None:
    _train(handle, inputs)
    handle.eval()(**inputs)


def _train_the_bare_base_between(handle: PeftModel, inputs: dict[str, Tensor]) -> None:
    """A handle in training mode, an inner view in evaluation mode: neither is the bare base's mode."""
    _train(handle, inputs)
    handle.get_base_model().eval()
    handle.train()


def _fail_in_the_forward(handle: PeftModel, inputs: dict[str, Tensor]) -> None:
    with suppress(TypeError):
        handle.train()(**inputs, no_such_argument=1)


def _last_linear(handle: PeftModel) -> nn.Module:
    return [module for module in handle.get_base_model().modules() if isinstance(module, nn.Linear)][-1]


def _disable_dropout(handle: PeftModel, inputs: dict[str, Tensor]) -> None:
    """As TRL does for reference models and for reinforcement learning."""
    for module in handle.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0


def _hook(register: str) -> Callable[[PeftModel, dict[str, Tensor]], None]:
    def write(handle: PeftModel, inputs: dict[str, Tensor]) -> None:
        getattr(_last_linear(handle), register)(lambda *_: None)

    return write


def _prune(handle: PeftModel, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        _last_linear(handle).weight.zero_()


def _new_parameter(handle: PeftModel, inputs: dict[str, Tensor]) -> None:
    module = _last_linear(handle)
    module.weight = nn.Parameter(torch.zeros_like(module.weight))


def _new_module(handle: PeftModel, inputs: dict[str, Tensor]) -> None:
    handle.get_base_model().extra = nn.Linear(2, 2)


def _new_attribute(handle: PeftModel, inputs: dict[str, Tensor]) -> None:
    _last_linear(handle).noted_by_a_client = 1
    handle.get_base_model().noted_by_a_client = 1


def _other_forward(handle: PeftModel, inputs: dict[str, Tensor]) -> None:
    _last_linear(handle).forward = lambda x: x


def _through(method: str, *args: Any) -> Callable[[PeftModel, dict[str, Tensor]], None]:
    """A method of modules, of the base's view."""
    return lambda handle, inputs: getattr(handle.get_base_model(), method)(*args) and None


def _through_inner(method: str, *args: Any) -> Callable[[PeftModel, dict[str, Tensor]], None]:
    """A method of modules, of each view below the base."""

    def write(handle: PeftModel, inputs: dict[str, Tensor]) -> None:
        for module in list(handle.get_base_model().children()):
            getattr(module, method)(*args)

    return write


DEEDS: dict[str, Callable[[PeftModel, dict[str, Tensor]], None]] = {
    "a call": lambda handle, inputs: handle(**inputs),
    "training": _train,
    "training and evaluation": _train_then_evaluate,
    "modes that differ": _train_the_bare_base_between,
    "train()": lambda handle, inputs: handle.train(),
    "a failing call": _fail_in_the_forward,
    "train() of the base's view": _through("train"),
    "train() of inner views": _through_inner("train"),
    "requires_grad_ of the base's view": _through("requires_grad_", True),
    "requires_grad_ of inner views": _through_inner("requires_grad_", True),
    "half of the base's view": _through("half"),
    "double of inner views": _through_inner("double"),
    "to(dtype) of the base's view": _through("to", torch.bfloat16),
    "zero_grad": _through("zero_grad"),
    "apply": lambda handle, inputs: handle.get_base_model().apply(lambda module: module.train()) and None,
    "dropouts off": _disable_dropout,
    "forward hook": _hook("register_forward_hook"),
    "forward pre-hook": _hook("register_forward_pre_hook"),
    "backward hook": _hook("register_full_backward_hook"),
    "values in place": _prune,
    "another parameter": _new_parameter,
    "another module": _new_module,
    "an attribute": _new_attribute,
    "another forward": _other_forward,
}
DEEDS_WITH_TRANSFORMERS: dict[str, Callable[[PeftModel, dict[str, Tensor]], None]] = {
    "checkpointing by the handle": lambda handle, inputs: handle.gradient_checkpointing_enable(),
    "checkpointing by the base's view": _through("gradient_checkpointing_enable"),
    "gradients of inputs": lambda handle, inputs: handle.enable_input_require_grads(),
    "config by the handle": lambda handle, inputs: setattr(handle.config, "use_cache", not handle.config.use_cache),
    "config by the base's view": lambda handle, inputs: setattr(handle.get_base_model().config, "use_cache", False),
    "generation_config": lambda handle, inputs: setattr(handle.generation_config, "max_new_tokens", 3),
}
CASES = [(name, deed) for name in BASES for deed in DEEDS]
CASES += [
    (name, deed)
    for name in OF_TRANSFORMERS
    for deed in DEEDS_WITH_TRANSFORMERS
    if (name, deed) != ("bert", "generation_config")
]


def _do(deed: str, handle: PeftModel, inputs: dict[str, Tensor]) -> None:
    """Do it, or be refused; in both cases the base stays."""
    with suppress(UsageError):
        {**DEEDS, **DEEDS_WITH_TRANSFORMERS}[deed](handle, inputs)


def _base(name: str) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    torch.manual_seed(0)
    make, inputs, fields = BASES[name]
    base = make().eval()
    next(base.parameters()).requires_grad_(False)  # one that the user froze
    return base, inputs(), fields


def _result(base: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(1)
    result = base(**inputs)
    return (result if isinstance(result, Tensor) else tiny.main_output(result)).detach()


@pytest.mark.each_value_once
@pytest.mark.parametrize(("name", "deed"), CASES)
def test_the_base_does_not_show_it_while_the_handle_lives(name, deed):
    base, inputs, fields = _base(name)
    expected = _result(base, inputs)
    handle = lora(base, **fields)
    before, frozen = Seen(base, while_used=True), [p.requires_grad for p in base.parameters()]
    _do(deed, handle, inputs)
    before.assert_still(base)
    assert [p.requires_grad for p in base.parameters()] == frozen
    assert torch.equal(_result(base, inputs), expected)


@pytest.mark.each_value_once
@pytest.mark.parametrize("end", ["unload", "delete", "drop"])
@pytest.mark.parametrize(("name", "deed"), CASES)
def test_nothing_is_left_when_the_handle_has_gone(name, deed, end):
    base, inputs, fields = _base(name)
    expected, before = _result(base, inputs), Seen(base, while_used=end == "drop")
    handle = lora(base, **fields)
    _do(deed, handle, inputs)
    if end == "delete":
        handle.delete_adapter("default")
    if end != "drop":
        assert handle.unload() is base
    del handle
    before.assert_still(base)
    assert torch.equal(_result(base, inputs), expected)


@pytest.mark.parametrize("deed", ["training", "dropouts off", "train() of the base's view", "another module", "forward hook"])
def test_another_handle_of_the_base_does_not_show_it(deed):
    base, inputs, fields = _base("batch norm")
    handle, other = lora(base, 1, **fields).eval(), lora(base, 2, **fields).eval()
    expected = _result(other, inputs)
    _do(deed, handle, inputs)
    assert torch.equal(_result(other, inputs), expected)
    assert not other.training


def test_dropouts_switched_off_through_a_handle_are_off_in_its_calls_or_it_is_refused():
    base, inputs, fields = _base("batch norm")
    handle = lora(base, **fields).train()
    try:
        _disable_dropout(handle, inputs)
    except UsageError:
        return
    assert torch.equal(handle(**inputs), handle(**inputs))


def test_an_attribute_set_through_a_handle_can_be_read_there_or_it_is_refused():
    base, _, fields = _base("batch norm")
    handle = lora(base, **fields)
    try:
        handle.last.noted = 3
    except UsageError:
        return
    assert handle.last.noted == 3
    assert not hasattr(base.last, "noted")


def test_batch_norm_trains_on_its_batches_and_evaluates_on_the_bases_statistics():
    """Where nothing of a batch norm is trained, its statistics are the base's, whatever batches came by."""
    base, inputs, fields = _base("batch norm")
    handle = lora(base, **fields)
    expected = _result(handle.eval(), inputs)
    for _ in range(3):
        handle.train()(x=torch.randn(5, 6) * 3 + 1)
    assert torch.equal(_result(handle.eval(), inputs), expected)


def test_a_copied_batch_norm_keeps_statistics_of_its_own():
    base, inputs, fields = _base("batch norm")
    before = Seen(base, while_used=True)
    handle = lora(base, **fields, modules_to_save=["norm"])
    first = _result(handle.eval(), inputs)
    handle.train()(x=torch.randn(5, 6) * 3 + 1)
    assert not torch.equal(_result(handle.eval(), inputs), first)
    before.assert_still(base)


def test_a_hook_set_through_a_handle_runs_in_its_calls_only():
    base, inputs, fields = _base("batch norm")
    handle, seen = lora(base, **fields), []
    hook = handle.first.register_forward_hook(lambda *_: seen.append(1))
    base(**inputs)
    assert not seen
    handle(**inputs)
    assert seen == [1]
    hook.remove()
    handle(**inputs)
    assert seen == [1]
